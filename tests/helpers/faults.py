"""Faults in one request of a batch: a function that raises, or returns NaN, for rows that hold a certain value."""

import torch

from rgtg.models.ops.lm_head import trunk

BOOM = RuntimeError("boom")


class Fault:
    """Wraps a function that reads rows, on an object, and makes it fail.

    ``mode`` is ``row`` (raises if any row holds ``bad``), ``nan`` (returns NaN for those rows), ``once`` (raises in
    call ``at``), ``always`` (from call ``at`` on) or None.

    Attributes:
        seen: values that it has read, with the call in which each came first.
        failed: whether it has.
    """

    def __init__(self, owner, name, rows):
        """``rows``: of the function's arguments; the set of values in each row."""
        self.start(None)
        self.rows, self.whole = rows, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        rows = self.rows(*args, **kwargs)
        self.calls += 1
        for values in rows:
            for value in sorted(values, key=repr):
                self.seen.setdefault(value, self.calls)
        hit = [self.bad in values for values in rows]
        if (
            (self.mode == "row" and any(hit))
            or (self.mode == "once" and self.calls == self.at)
            or (self.mode == "always" and self.calls >= self.at)
        ):
            self.failed = True
            raise BOOM
        result = self.whole(*args, **kwargs)
        if self.mode == "nan" and any(hit):
            states = getattr(result, "last_hidden_state", result)
            states[torch.tensor(hit)] = torch.nan
            self.failed = True
        return result

    def start(self, mode, bad=None, at=3):
        """Fail in this way from now on."""
        self.mode, self.bad, self.at, self.calls, self.seen, self.failed = mode, bad, at, 0, {}, False


def victim(seen, usable):
    """A run, and a usable value that no other run has read, as late as possible: ``usable(run, value)``."""
    found = []
    for i, values in enumerate(seen):
        others = set().union(*(other for j, other in enumerate(seen) if j != i))
        found += [(first, i, value) for value, first in values.items() if value not in others and usable(i, value)]
    _, i, value = max(found, key=lambda one: one[:2])
    return i, value


# What a fault is of: a policy or a scorer, of which one function fails.


def of_tokens(owner):
    """The transformer: rows hold its tokens."""
    return Fault(trunk(owner.model), "forward", lambda input_ids, **_: [set(row) for row in input_ids.tolist()])


def of_states(owner):
    """A state head: rows hold its states, rounded."""

    def rows(states):
        return [{tuple((8 * state).round().int().tolist()[:6]) for state in row} for row in states]

    return Fault(owner.head, "forward", rows)


def of_candidates(owner):
    """A vocabulary head: rows hold its candidates."""
    return Fault(owner.head, "forward", lambda states, ids: [set(row) for row in ids.tolist()])


def of_texts(owner):
    """What puts a candidate's text together: each call reads one."""
    return Fault(owner, "full_text", lambda prompt, completion, **_: [{completion}])


def of_committed_texts(owner):
    """The tokenizer that continues a text: each call reads one."""
    return Fault(owner.retokenizer, "append", lambda tokenized, text, suffix: [{text}])


def of_whole_texts(owner):
    """What scores whole texts: every row is one value."""
    return Fault(owner, "score_ids", lambda rows: [{tuple(row)} for row in rows])


# Where it fails: scorers of the requests (of `helpers.scorer_kinds.every_scorer`), what fails in one of them (or the
# policy), and in which.
PLACES = {
    "policy": ((), of_tokens, "policy"),
    "separate scorer": (("separate",), of_tokens, "separate"),
    "second separate scorer": (("other", "separate"), of_tokens, "separate"),
    "token reward": (("vocabulary scorer",), of_tokens, "vocabulary scorer"),
    "the policy's tree": (("state",), of_tokens, "policy"),
    "state head": (("state",), of_states, "state"),
    "vocabulary head": (("vocab",), of_candidates, "vocab"),
    "fused adapter": (("adapter",), of_tokens, "adapter"),
    "second pass": (("state", "adapter"), of_tokens, "adapter"),
    "text": (("text",), of_texts, "text"),
    "committed text": (("text",), of_committed_texts, "text"),
    "text scorer's model": (("text",), of_tokens, "text"),
    "encoder": (("encoder",), of_whole_texts, "encoder"),
    "overlapped scorer": (("separate",), of_tokens, "separate"),
    "overlapped policy": (("separate",), of_tokens, "policy"),
}
