"""Faults in one request of a batch: a function that raises, or returns NaN, for rows that hold a certain value."""

import torch

from rgtg.models.ops.lm_head import trunk

BOOM = RuntimeError("boom")


class Fault:
    """Wraps a function that reads rows, on an object, and makes it fail.

    ``mode`` is ``row`` (raises if any row holds ``bad``), ``nan`` (returns NaN for those rows), ``once`` (raises in
    the third call), ``always`` (from the third call on) or None.
    """

    def __init__(self, monkeypatch, owner, name, rows):
        """``rows``: of the function's arguments; the set of values in each row."""
        self.mode, self.bad, self.calls, self.seen = None, None, 0, {}
        self.rows, self.whole = rows, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        rows = self.rows(*args, **kwargs)
        self.calls += 1
        for values in rows:
            for value in sorted(values, key=repr):
                self.seen.setdefault(value, self.calls)
        hit = [self.bad in values for values in rows]
        if (
            (self.mode == "row" and any(hit))
            or (self.mode == "once" and self.calls == 3)
            or (self.mode == "always" and self.calls >= 3)
        ):
            raise BOOM
        result = self.whole(*args, **kwargs)
        if self.mode == "nan" and any(hit):
            states = getattr(result, "last_hidden_state", result)
            states[torch.tensor(hit)] = torch.nan
        return result

    def start(self, mode, bad=None):
        """Fail in this way from now on."""
        self.mode, self.bad, self.calls, self.seen = mode, bad, 0, {}


def of_tokens(monkeypatch, model):
    """A fault of the transformer of a model: rows hold its tokens."""
    return Fault(monkeypatch, trunk(model), "forward", _tokens)


def _tokens(input_ids=None, **kwargs):
    return [set(row) for row in input_ids.tolist()]


def of_states(monkeypatch, head):
    """A fault of a state head: rows hold its states, rounded."""

    def rows(states):
        return [{tuple((8 * state).round().int().tolist()[:6]) for state in row} for row in states]

    return Fault(monkeypatch, head, "forward", rows)


def of_candidates(monkeypatch, head):
    """A fault of a vocabulary head: rows hold its candidates."""
    return Fault(monkeypatch, head, "forward", lambda states, ids: [set(row) for row in ids.tolist()])


def of_texts(monkeypatch, scorer):
    """A fault of a scorer that puts texts together: each call reads one."""
    return Fault(monkeypatch, scorer, "full_text", lambda prompt, completion, **kwargs: [{completion}])


def of_committed_texts(monkeypatch, scorer):
    """A fault of the tokenizer that continues a text: each call reads one."""
    return Fault(monkeypatch, scorer.retokenizer, "append", lambda reading, text, suffix: [{text}])


def of_whole_texts(monkeypatch, scorer):
    """A fault of a scorer of whole texts: every row is one value."""
    return Fault(monkeypatch, scorer, "score_ids", lambda ids: [{tuple(row)} for row in ids])
