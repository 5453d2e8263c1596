"""Tasks, batches and outcomes: seeds, token budgets, and rows that fail alone."""

import pickle
from dataclasses import replace

import pytest
import torch

from helpers.naive import make_guided
from rgtg.batch import tasks as tasks_module
from rgtg.batch.tasks import CompletedTask, FailedTask, Task, TaskBatch, complete_batch, plan_batches, prepare_tasks
from rgtg.data.prompts import PromptRow
from rgtg.errors import DataError, NonFiniteError, RgtgError, UsageError

SHORT = {"max_new_tokens": 4}


def rows(*prompts, **about):
    return [PromptRow(i, f"r{i}", prompt, **about) for i, prompt in enumerate(prompts, start=1)]


@pytest.fixture(scope="module")
def guided():
    return make_guided(beta=1.0)


def task(index, max_tokens, **settings):
    return Task(index, PromptRow(index + 1, f"r{index}", "a", settings), 0, 1, max_tokens)


def test_tasks_get_the_seeds_of_generate_and_repeated_prompts_differ(guided):
    texts = ["ab", "abc", "ab", "ab"]
    tasks, bad = prepare_tasks(guided, rows(*texts), SHORT, seed=3)
    assert not bad
    assert [t.seed for t in tasks] == guided.row_seeds(texts, 3)
    assert len({t.seed for t in tasks}) == 4
    assert [(t.index, t.prompt_tokens, t.max_tokens) for t in tasks] == [(0, 2, 6), (1, 3, 7), (2, 2, 6), (3, 2, 6)]
    own = [replace(row, seed=9) if row.number == 1 else row for row in rows("ab", "ab")]
    assert [t.seed for t in prepare_tasks(guided, own, SHORT, seed=3)[0]] == [9, guided.row_seeds(["ab"], 3)[0]]


def test_rows_that_do_not_fit_are_returned_separately_and_indices_have_no_gaps(guided):
    given = rows("a", "x" * 130, "b")
    given[2] = replace(given[2], settings={"max_new_tokens": 500})
    tasks, bad = prepare_tasks(guided, [*given, *rows("c")], SHORT, seed=0)
    assert [(t.index, t.row.prompt) for t in tasks] == [(0, "a"), (1, "c")]
    assert [(row.number, row.reason) for row in bad] == [(2, "too long"), (3, "too long")]
    assert "130 tokens and 4 new ones exceed the policy's context of 128" in bad[0].error


def test_a_row_s_unknown_setting_rejects_that_row_only(guided):
    given = rows("a") + rows("b", settings={"segment_length": 3})
    tasks, bad = prepare_tasks(guided, given, SHORT, seed=0)
    assert [t.row.prompt for t in tasks] == ["a"]
    assert bad[0].reason == "bad value"
    assert "segment_length applies to" in bad[0].error
    with pytest.raises(UsageError, match="segment_length applies to"):
        prepare_tasks(guided, rows("a"), {"segment_length": 3}, seed=0)


def test_chats_need_a_template_and_a_template_may_reject_a_row(guided, monkeypatch):
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UsageError, match="no chat template"):
        prepare_tasks(guided, rows(chat), SHORT, seed=0)
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    monkeypatch.setattr(guided.policy.tokenizer, "chat_template", template + "{{ m.content }}{% endfor %}")
    tasks, bad = prepare_tasks(guided, rows(chat, [{"role": "tool", "content": "x"}]), SHORT, seed=0)
    assert [t.row.prompt for t in tasks] == [chat]
    assert (bad[0].reason, "no tools here" in bad[0].error) == ("chat template", True)


def test_max_tokens_counts_the_branches_of_the_method():
    best = make_guided("best-of-n", n=3)
    assert prepare_tasks(best, rows("ab"), SHORT, seed=0)[0][0].max_tokens == 2 + 4 + 3 * 5
    blocks = make_guided("cd-blockwise", n=3)
    assert prepare_tasks(blocks, rows("ab"), SHORT | {"segment_length": 2}, seed=0)[0][0].max_tokens == 2 + 4 + 4 * 3


def test_batches_keep_the_budget_start_with_the_longest_and_do_not_mix_settings():
    tasks = [task(0, 10), task(1, 40), task(2, 20), task(3, 20, beta=2.0), task(4, 200), task(5, 10), task(6, 10)]
    batches = plan_batches(tasks, rows=None, tokens=80)
    assert [[t.index for t in batch.tasks] for batch in batches] == [[4], [1, 2], [3], [0, 5, 6]]
    assert batches[2].settings == {"beta": 2.0}
    assert all(len(b.tasks) * b.tasks[0].max_tokens <= 80 or len(b.tasks) == 1 for b in batches)
    assert [len(b.tasks) for b in plan_batches(tasks, rows=1, tokens=80)] == [1] * 7
    assert plan_batches(reversed(tasks), rows=None, tokens=80) == batches


def test_a_batch_gives_the_same_completions_as_generate(guided):
    tasks, _ = prepare_tasks(guided, rows("ab", "abcd", "ab"), SHORT, seed=1)
    outcomes = complete_batch(guided, TaskBatch(tuple(tasks)), SHORT, trace=True)
    alone = [guided.generate([t.row.prompt], seed=[t.seed], **SHORT)[0] for t in tasks]
    assert [o.completion.token_ids for o in outcomes] == [one.token_ids for one in alone]
    assert [o.completion.id for o in outcomes] == ["r1", "r2", "r3"]
    assert all(len(o.completion.trace) == len(o.completion.token_ids) for o in outcomes)
    assert pickle.loads(pickle.dumps(outcomes)) == outcomes


def fail_for(guided, monkeypatch, prompt, error, *, whole_batch=False):
    """Fail the requests of ``prompt``, or every batch that holds it; return the sizes of the batches."""
    complete, sizes = guided.complete, []

    def failing(requests):
        sizes.append(len(requests))
        bad = [request for request in requests if request.prompt == prompt]
        bad = list(requests) if bad and whole_batch else bad
        complete([request for request in requests if request not in bad])
        for request in bad:
            request.error = error

    monkeypatch.setattr(guided, "complete", failing)
    return sizes


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (NonFiniteError("the scorer returned NaN"), "not a finite number", "the scorer returned NaN"),
        (DataError("no token"), "bad prompt", "no token"),
        (RuntimeError("shape mismatch"), "error", "RuntimeError: shape mismatch"),
    ],
)
def test_only_the_row_that_fails_is_lost(guided, monkeypatch, error, reason, message):
    tasks, _ = prepare_tasks(guided, rows("ab", "bad", "abc"), SHORT, seed=1)
    sizes = fail_for(guided, monkeypatch, "bad", error)
    outcomes = complete_batch(guided, TaskBatch(tuple(tasks)), SHORT)
    assert [type(o) for o in outcomes] == [CompletedTask, FailedTask, CompletedTask]
    assert (outcomes[1].task.index, outcomes[1].reason, outcomes[1].error) == (1, reason, message)
    assert sizes == [3], "no row is completed twice"


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_without_memory_is_halved_until_the_row_is_alone(guided, monkeypatch, error):
    tasks, _ = prepare_tasks(guided, rows("ab", "bad", "abc", "abcd", "a"), SHORT, seed=1)
    sizes = fail_for(guided, monkeypatch, "bad", error, whole_batch=True)
    outcomes = complete_batch(guided, TaskBatch(tuple(tasks)), SHORT)
    assert [o.task.index for o in outcomes] == [0, 1, 2, 3, 4]
    assert [type(o) for o in outcomes] == [CompletedTask, FailedTask, CompletedTask, CompletedTask, CompletedTask]
    assert (outcomes[1].reason, outcomes[1].error) == ("out of memory", str(error))
    assert sizes == [5, 3, 2, 1, 1, 1, 2]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_an_error_if_processes_split_the_models(guided, monkeypatch, error):
    tasks, _ = prepare_tasks(guided, rows("ab", "bad"), SHORT, seed=1)
    fail_for(guided, monkeypatch, "bad", error, whole_batch=True)
    monkeypatch.setattr(tasks_module, "is_tensor_parallel", lambda model: model is guided.policy.model)
    with pytest.raises(RgtgError, match="decode less at once"):
        complete_batch(guided, TaskBatch(tuple(tasks)), SHORT)


def test_invalid_settings_are_raised(guided):
    with pytest.raises(UsageError, match="temperature"):
        complete_batch(guided, TaskBatch((task(0, 5),)), SHORT | {"temperature": -1.0})
