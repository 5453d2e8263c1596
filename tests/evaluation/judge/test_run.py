"""A judge behind a local server: both orders, ties, retries, answers without a verdict, and the cache."""

from concurrent.futures import wait
from pathlib import Path

import pytest

from helpers.judge_server import serve
from helpers.synthetic import write_rows
from rgtg.config import JudgeSettings
from rgtg.errors import DataError, EndpointError, MissingExtraError, UsageError
from rgtg.evaluation.judge import client, run
from rgtg.evaluation.judge.run import estimate_calls, judge

KEY = "sk-secret-0123456789"
SOON = {"retry-after-ms": "5"}
FAULT = (500, {"error": {"message": "out of order"}}, SOON)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def sides(tmp_path):
    """Two files of completions: a's are good, b's are bad."""
    return write(tmp_path / "ours.jsonl", "good", 4), write(tmp_path / "theirs.jsonl", "bad", 4)


def write(path, text, count, **fields):
    rows = [{"prompt": f"Question {i}", "text": f"{text} {i}"} | fields for i in range(count)]
    write_rows(path, rows)
    return str(path)


def settings(tmp_path, server, sides=None, **options):
    given = {"a": sides[0], "b": sides[1]} if sides else {}
    values = {"model": "m", "base_url": server.url, "output": tmp_path / "out", "retries": 0, "bootstrap": 100}
    return JudgeSettings.model_validate(values | given | options)


def prefers_good(shown, _number):
    return f"Because. [[{'A' if shown[0].startswith('good') else 'B'}]]"


def test_both_orders_are_asked_and_the_better_side_wins(tmp_path, sides):
    with serve(prefers_good) as server:
        found = judge(settings(tmp_path, server, sides, seed=3))
        assert server.calls == 8
        body = server.bodies[0]
        assert {k: body[k] for k in ("model", "temperature", "seed", "max_tokens")} == {
            "model": "m", "temperature": 0, "seed": 3, "max_tokens": 512,
        }  # fmt: skip
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    (match,) = found.result.matches
    assert (match.a, match.b, match.win_rate.mean, match.win_rate.n) == ("ours", "theirs", 1.0, 4)
    assert (match.consistent.mean, match.first_preferred.mean, match.failed) == (1.0, 0.5, 0)
    assert [pair.verdicts for pair in found.pairs] == [["a", "a"]] * 4
    assert found.pairs[2].text_a == "good 2"
    assert found.result.failures == []


def test_position_bias_cancels_and_is_reported(tmp_path, sides):
    with serve(lambda *_: "[[A]]") as server:
        (match,) = judge(settings(tmp_path, server, sides)).result.matches
    assert match.win_rate.mean == 0.5
    assert (match.first_preferred.mean, match.consistent.mean) == (1.0, 0.0)


def test_ties_and_identical_texts(tmp_path, sides):
    rows = Path(sides[1]).read_text().replace("bad 3", "good 3")
    Path(sides[1]).write_text(rows)
    with serve(lambda *_: '{"verdict": "tie"}') as server:
        found = judge(settings(tmp_path, server, sides))
        assert server.calls == 6  # nobody is asked about the same text twice
    (match,) = found.result.matches
    assert (match.win_rate.mean, match.ties, match.identical) == (0.5, 4, 1)
    assert found.pairs[3].answers == []


def test_a_busy_server_is_retried(tmp_path, sides):
    def busy_at_first(shown, number):
        return (429, {"error": {"message": "slow down"}}, SOON) if number <= 2 else prefers_good(shown, number)

    with serve(busy_at_first) as server:
        result = judge(settings(tmp_path, server, sides, retries=3, concurrency=1)).result
        assert server.calls == 10
    assert result.matches[0].win_rate.mean == 1.0
    assert (result.usage.calls, result.usage.retries) == (8, 2)


def test_a_server_that_only_fails_is_an_error_with_its_url_after_bounded_retries(tmp_path, sides):
    with serve(lambda *_: FAULT) as server:
        with pytest.raises(EndpointError, match=f"{server.url}: 3 calls failed in a row.*out of order.*0 answers are"):
            judge(settings(tmp_path, server, sides, retries=1, concurrency=1))
        assert 6 <= server.calls <= 8  # one worker may begin the next call before it is told


def test_a_single_failed_call_is_listed_and_the_other_pairs_count(tmp_path, sides):
    def one_fails(shown, number):
        return (400, {"error": {"message": "too long"}}) if shown[0] == "bad 2" else prefers_good(shown, number)

    with serve(one_fails) as server:
        found = judge(settings(tmp_path, server, sides))
    (match,), (failure,) = found.result.matches, found.result.failures
    assert (match.win_rate.n, match.failed) == (3, 1)
    assert (failure.prompt, failure.shown_first) == ("Question 2", "theirs")
    assert "too long" in failure.reason
    assert found.pairs[2].verdicts == ["a", None]
    with serve(prefers_good) as server:  # a rerun makes the failed call, and no other
        assert judge(settings(tmp_path, server, sides)).result.matches[0].failed == 0
        assert server.calls == 1


def test_rejected_texts_do_not_stop_a_run_with_other_answers(tmp_path, sides):
    def choosy(shown, number):
        return prefers_good(shown, number) if "3" in shown[0] else (400, {"error": {"message": "too long"}})

    with serve(lambda *_: "[[C]]") as server:  # some answers are there
        judge(settings(tmp_path, server, sides, limit=1))
    for calls in (6, 4):  # in the first run, prompt 3 is answered too
        with serve(choosy) as server:
            found = judge(settings(tmp_path, server, sides))
            assert server.calls == calls
        assert len(found.result.failures) == 4
        assert found.result.matches[0].failed == 2


def test_an_answer_that_is_there_counts_before_its_turn(tmp_path, sides, monkeypatch):
    def refusals_first(asked):
        futures = list(asked)
        wait(futures)  # as_completed gives those that are done in any order
        return sorted(futures, key=lambda future: future.result().fault != "refused")

    def choosy(shown, number):
        return prefers_good(shown, number) if "3" in shown[0] else (400, {"error": {"message": "too long"}})

    monkeypatch.setattr(run, "as_completed", refusals_first)
    for calls in (8, 6):  # in the second run, the answers are those of the first
        with serve(choosy) as server:
            assert len(judge(settings(tmp_path, server, sides)).result.failures) == 6
            assert server.calls == calls


def test_a_parameter_that_is_always_rejected_stops_the_run(tmp_path, sides):
    refusal = (400, {"error": {"message": "unknown parameter seed"}})
    with serve(lambda *_: refusal) as server, pytest.raises(EndpointError, match=r"3 calls failed.*unknown parameter"):
        judge(settings(tmp_path, server, sides, concurrency=1))
    assert server.calls <= 5


def test_an_answer_without_a_verdict_is_retried_and_then_listed(tmp_path, sides):
    said = "They differ."

    def unclear(shown, number):
        return said if shown[0] == "good 1" else prefers_good(shown, number)

    with serve(unclear) as server:
        found = judge(settings(tmp_path, server, sides, answer_retries=2))
        assert server.calls == 7 + 3
        longest = max(server.bodies, key=lambda body: len(body["messages"]))["messages"]
    assert [m["role"] for m in longest] == ["user", "assistant", "user", "assistant", "user"]
    (failure,) = found.result.failures
    assert (failure.shown_first, failure.reason, failure.answer) == (
        "ours",
        "the answer holds no verdict",
        "They differ.",
    )
    assert found.result.matches[0].failed == 1


def test_a_verdict_in_a_later_answer_counts(tmp_path, sides):
    seen = set()

    def at_second(shown, number):
        first_time = shown not in seen
        seen.add(shown)
        return "[[A]] [[B]]" if first_time else prefers_good(shown, number)

    with serve(at_second) as server:
        result = judge(settings(tmp_path, server, sides)).result
        assert server.calls == 16
    assert (result.matches[0].win_rate.mean, result.failures) == (1.0, [])


@pytest.mark.parametrize(
    ("body", "reason"),
    [({"choices": []}, "not in the chat completions format"), (b"<html>", "not JSON"),
     ({"choices": [{"message": {"content": None}}]}, "the answer is empty")],
)  # fmt: skip
def test_a_malformed_response_is_a_failed_call(tmp_path, sides, body, reason):
    def odd(shown, number):
        return (200, body) if shown[0] == "good 0" else prefers_good(shown, number)

    with serve(odd) as server:
        (failure,) = judge(settings(tmp_path, server, sides, answer_retries=0)).result.failures
    assert reason in failure.reason


def test_an_unreachable_server_is_an_error(tmp_path, sides):
    with serve(prefers_good) as server:
        pass
    with pytest.raises(EndpointError, match=rf"the judge at {server.url}: cannot be reached .*is it running\?"):
        judge(settings(tmp_path, server, sides))


def test_answers_are_kept_if_the_endpoint_goes_down(tmp_path, sides):
    def dies(shown, number):
        return prefers_good(shown, number) if number <= 3 else FAULT

    with (
        serve(dies) as server,
        pytest.raises(EndpointError, match=r"3 answers are kept in .*; run the same"),
    ):
        judge(settings(tmp_path, server, sides, concurrency=1))
    with serve(prefers_good) as server:
        result = judge(settings(tmp_path, server, sides)).result
        assert server.calls == 5
    assert (result.usage.calls, result.usage.cached) == (5, 3)
    with serve(prefers_good) as server:
        again = judge(settings(tmp_path, server, sides)).result
        assert server.calls == 0
    assert again.matches == result.matches


def test_an_incomplete_line_of_the_cache_is_asked_again(tmp_path, sides):
    with serve(prefers_good) as server:
        judge(settings(tmp_path, server, sides))
        answers = tmp_path / "out" / "answers.jsonl"
        answers.write_bytes(answers.read_bytes()[:-20])
        judge(settings(tmp_path, server, sides))
        assert server.calls == 9
        judge(settings(tmp_path, server, sides))
        assert server.calls == 9


@pytest.mark.parametrize("change", [{"model": "n"}, {"temperature": 0.5}, {"seed": 1}, {"request": {"top_p": 0.5}}])
def test_another_model_or_parameter_is_not_cached(tmp_path, sides, change):
    with serve(prefers_good) as server:
        judge(settings(tmp_path, server, sides))
        judge(settings(tmp_path, server, sides, **change))
        assert server.calls == 16


def test_request_fields_replace_and_null_removes_parameters(tmp_path, sides):
    with serve(prefers_good) as server:
        judge(settings(tmp_path, server, sides, temperature=None, request={"max_tokens": 9, "reasoning_effort": "low"}))
    body = server.bodies[0]
    assert "temperature" not in body
    assert (body["max_tokens"], body["reasoning_effort"]) == (9, "low")


def test_the_key_is_in_no_file_and_no_message(tmp_path, sides):
    with serve(lambda *_: (401, {"error": {"message": f"Incorrect API key: {KEY}"}})) as server:
        with pytest.raises(EndpointError, match="OPENAI_API_KEY") as raised:
            judge(settings(tmp_path, server, sides))
        assert KEY not in str(raised.value)
    given = settings(tmp_path, server, sides, api_key=KEY)
    assert KEY not in given.model_dump_json() + repr(given)
    with serve(prefers_good) as server:
        found = judge(settings(tmp_path, server, sides, api_key=KEY))
    files = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files
    assert KEY not in "".join(files) + found.result.model_dump_json()


def test_tokens_and_cost(tmp_path, sides):
    with serve(prefers_good) as server:
        usage = judge(settings(tmp_path, server, sides, price_in=2, price_out=10)).result.usage
        assert usage.completion_tokens == 16
        assert usage.cost == pytest.approx((usage.prompt_tokens * 2 + 16 * 10) / 1e6)
        again = judge(settings(tmp_path, server, sides, price_in=2, price_out=10)).result.usage
    assert (again.cost, again.total_cost) == (0, usage.cost)
    with serve(prefers_good, usage=False) as server:
        counted = judge(settings(tmp_path, server, sides, model="silent")).result.usage
    assert (counted.estimated, counted.cost) == (8, None)
    assert counted.prompt_tokens > 100


def test_a_dry_run_makes_no_call_and_counts_cached_answers(tmp_path, sides, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve(prefers_good) as server:
        before = estimate_calls(settings(tmp_path, server, sides, price_in=1, price_out=1))
        assert server.calls == 0
        assert not (tmp_path / "out").exists()
        judge(settings(tmp_path, server, sides, limit=1))
        after = estimate_calls(settings(tmp_path, server, sides, price_in=1, price_out=1))
    assert (before.pairs, before.calls, before.cached, before.completion_tokens_at_most) == (4, 8, 0, 8 * 512)
    assert before.cost_at_most == pytest.approx((before.prompt_tokens + 8 * 512) / 1e6)
    assert (after.calls, after.cached) == (6, 2)


def test_several_files_are_compared_pairwise_or_with_a_baseline(tmp_path, sides):
    third = write(tmp_path / "third.jsonl", "fair", 4)
    files = [sides[0], f"theirs x={sides[1]}", third]
    with serve(prefers_good) as server:
        every = judge(settings(tmp_path, server, completions=files)).result.matches
        one = judge(settings(tmp_path, server, completions=files, baseline="third")).result.matches
    assert [(m.a, m.b) for m in every] == [("ours", "theirs x"), ("ours", "third"), ("theirs x", "third")]
    assert [(m.a, m.b) for m in one] == [("ours", "third"), ("theirs x", "third")]


def test_a_folder_of_a_comparison_is_read_by_row_and_seed(tmp_path):
    folder = tmp_path / "comparison"
    folder.mkdir()
    rows = [("policy", "bad", 0), ("policy", "bad again", 1), ("greedy", "bad greedy", 0), ("pargs β=1", "good", 0),
            ("pargs β=1", "good again", 1)]  # fmt: skip
    parts = [
        write(tmp_path / f"{i}.jsonl", text, 3, row=label, run_seed=seed) for i, (label, text, seed) in enumerate(rows)
    ]
    (folder / "completions.jsonl").write_text("".join(Path(part).read_text() for part in reversed(parts)))
    with serve(prefers_good) as server:
        found = judge(settings(tmp_path, server, completions=[str(folder)]))
    matches = {(m.a, m.b): m for m in found.result.matches}
    assert list(matches) == [("pargs β=1", "greedy"), ("pargs β=1", "policy"), ("greedy", "policy")]
    assert matches["pargs β=1", "policy"].win_rate.mean == 1.0
    met = [(pair.text_a, pair.text_b) for pair in found.pairs if pair.prompt == "Question 1"]
    assert met == [
        ("good 1", "bad greedy 1"), ("good again 1", "bad again 1"), ("good 1", "bad 1"), ("bad greedy 1", "bad 1"),
    ]  # fmt: skip
    assert matches["pargs β=1", "policy"].win_rate.n == 3


def test_agreement_with_humans(tmp_path):
    rows = [{"prompt": f"Q{i}", "chosen": "good" if i else "bad", "rejected": "bad" if i else "good"} for i in range(4)]
    path = tmp_path / "pairs.jsonl"
    write_rows(path, rows)
    with serve(prefers_good) as server:
        result = judge(settings(tmp_path, server, pairs=str(path))).result
    (match,) = result.matches
    assert (result.kind, match.a, match.b) == ("agreement", "chosen", "rejected")
    assert match.win_rate.mean == 0.75
    assert match.win_rate.low < 0.75 < match.win_rate.high
    assert "pairs" in result.provenance.data


def test_human_pairs_of_the_real_data_are_read(tmp_path, shared_data):
    with serve(lambda *_: "[[C]]") as server:
        source = str(shared_data / "hh" / "helpful-base.test.jsonl.gz")
        with pytest.warns(UserWarning, match="left out 15 of"):
            result = judge(settings(tmp_path, server, pairs=source, on_bad="skip", limit=3)).result
    assert result.matches[0].win_rate.mean == 0.5
    assert server.calls == 6
    assert (tmp_path / "out" / "rejects.jsonl").read_text().count("\n") == 15


def test_unusable_inputs_are_errors(tmp_path, sides):
    def fails(kind, message, **options):
        with pytest.raises(kind, match=message):
            estimate_calls(JudgeSettings.model_validate({"model": "m", "output": tmp_path / "out"} | options))

    a, b = sides
    for options in ({}, {"a": a}, {"a": a, "b": b, "pairs": a}, {"a": a, "completions": [b]}):
        fails(UsageError, "give the judge one of", **options)
    fails(UsageError, "at least two", completions=[a])
    fails(UsageError, "was given before", a=f"x={a}", b=f"x={b}")
    fails(UsageError, "baseline = 'z' is none of ours, theirs", a=a, b=b, baseline="z")
    fails(UsageError, "no such file", a=a, b="absent.jsonl")
    fails(UsageError, "must hold no password", a=a, b=b, base_url="http://user:pw@host/v1")
    fails(UsageError, "something like http://localhost", a=a, b=b, base_url="localhost:8000")
    short = write(tmp_path / "short.jsonl", "good", 3)
    fails(
        DataError,
        "ours and short do not answer the same prompts.*1 completions have no counterpart.*Question 3",
        a=a,
        b=short,
    )
    both = tmp_path / "both.jsonl"
    both.write_text('{"prompt": "p", "text": "t", "row": "x"}\n{"prompt": "p", "text": "t"}\n')
    fails(UsageError, "more than two labels", a=str(both), b=b)


def test_files_with_the_same_name_are_labelled_by_their_folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "completions.jsonl", name, 2)
    found = estimate_calls(
        JudgeSettings(
            model="m", output=tmp_path, a=str(tmp_path / "one"), b=str(tmp_path / "two" / "completions.jsonl")
        )
    )
    assert (found.pairs, found.calls) == (2, 4)


def test_openai_needs_a_key_and_a_missing_extra_is_named(tmp_path, sides, monkeypatch):
    import sys

    given = {"model": "m", "output": tmp_path / "out", "a": sides[0], "b": sides[1]}
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(UsageError, match="needs OPENAI_API_KEY"):
        judge(JudgeSettings.model_validate(given))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"rgtg\[judge\]"):
        judge(JudgeSettings.model_validate(given | {"base_url": "http://127.0.0.1:1/v1"}))


def test_the_url_can_come_from_the_environment(monkeypatch, tmp_path):
    given = JudgeSettings(model="m", output=tmp_path)
    assert client.endpoint_url(given) == client.OPENAI
    monkeypatch.setenv("OPENAI_BASE_URL", "http://10.0.0.1/v1/")
    assert client.endpoint_url(given) == "http://10.0.0.1/v1"


def test_chats_are_shown_as_people_read_them(tmp_path):
    """Policies with other chat templates answer the same messages; their renderings differ."""
    chats = [[{"role": "user", "content": f"Question {i}"}] for i in range(2)]
    chats.append([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    files = []
    for name, text, mark in (("ours", "good", "<s>[INST]"), ("theirs", "bad", "<|im_start|>")):
        rows = [{"prompt": f"{mark}{i}", "messages": chat, "text": f"{text} {i}"} for i, chat in enumerate(chats)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        files.append(str(tmp_path / f"{name}.jsonl"))
    with serve(prefers_good) as server:
        found = judge(settings(tmp_path, server, files))
        asked = "".join(body["messages"][0]["content"] for body in server.bodies)
    assert [pair.prompt for pair in found.pairs] == ["Question 0", "Question 1", "System: Be brief.\n\nUser: Why?"]
    assert found.result.matches[0].win_rate.mean == 1.0
    assert "Question 1" in asked
    assert "[INST]" not in asked
    pairs = tmp_path / "pairs.jsonl"
    reply = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
    write_rows(pairs, [{"prompt": chat, "chosen": reply[0], "rejected": reply[1]} for chat in chats])
    with serve(prefers_good) as server:
        agreed = judge(settings(tmp_path, server, pairs=str(pairs), output=tmp_path / "agreed"))
    assert agreed.result.matches[0].win_rate.mean == 1.0
    assert agreed.pairs[2].prompt == "System: Be brief.\n\nUser: Why?"
