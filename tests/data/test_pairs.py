"""Preference pairs: reading, errors with file and line, splitting and tokenizing."""

import contextlib
import gzip
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgtg.data.pairs import read_pairs, run_together, split_pairs, tokenize_pairs
from rgtg.data.prompts import read_prompts
from rgtg.errors import DataError, OutputError, UsageError
from rgtg.types.generation import PreferencePair

GOOD = {"prompt": "Say hi", "chosen": " hello there", "rejected": " no"}
OTHER = {"prompt": "Say bye", "chosen": " goodbye", "rejected": " never mind that"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_rows(path: Path, *rows) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# --- bad rows ----------------------------------------------------------------------------------------------------

HH = "\n\nHuman: hi\n\nAssistant:"
BAD = {
    "not JSON": (b'{"prompt": "a", ', "not JSON: .* at column"),
    "number too long": (b'{"prompt": ' + b"1" * 5000 + b"}", "not JSON: a number is too long"),
    "nested": (b"[" * 100_000, "not JSON: .*nested too deeply"),
    "bad UTF-8": (b'{"prompt": "\xff"}', "bad UTF-8: byte 13 of the line"),
    "surrogate": (b'{"prompt": "a\\ud800", "chosen": "b", "rejected": "c"}', "bad UTF-8: prompt .*lone surrogate"),
    "missing chosen": ({"prompt": "a", "rejected": "b"}, "missing field: chosen"),
    "missing both": ({"prompt": "a"}, "missing field: chosen, rejected"),
    "missing prompt": ({"chosen": "a", "rejected": "b"}, "missing field: prompt"),
    "null prompt": ({**GOOD, "prompt": None}, "null field: prompt"),
    "null rejected": ({**GOOD, "rejected": None}, "null field: rejected"),
    "not an object": ([1, 2], "wrong type: the row is a list, expected an object"),
    "number": ({**GOOD, "chosen": 3}, "wrong type: chosen is a number, expected text"),
    "mixed sides": ({**GOOD, "chosen": [said("assistant", "a")]}, "wrong type: rejected is text"),
    "bad message": (
        {"prompt": [said("user", "a")], "chosen": [{"role": "assistant"}], "rejected": [said("assistant", "b")]},
        "wrong type: message 1 of chosen",
    ),
    "empty completion": ({**GOOD, "chosen": ""}, "empty completion: chosen"),
    "blank completion": ({**GOOD, "rejected": " \n\t"}, "empty completion: rejected"),
    "empty prompt": ({**GOOD, "prompt": ""}, "empty prompt"),
    "equal": ({**GOOD, "rejected": GOOD["chosen"]}, "chosen equals rejected"),
    "equal dialogues": ({"chosen": HH + " a", "rejected": HH + " a"}, "chosen equals rejected"),
    "equal chats": ({"chosen": [said("user", "a")], "rejected": [said("user", "a")]}, "chosen equals rejected"),
    "duplicate": (GOOD, "duplicate row: the same as line 1"),
    "HH without prefix": (
        {"chosen": HH + " a", "rejected": "\n\nHuman: ho\n\nAssistant: b"}, "no shared prompt: the dialogues differ"
    ),
    "HH with another turn": (
        {"chosen": HH + " a\n\nHuman: b\n\nAssistant: c", "rejected": HH + " d"}, "no shared prompt"
    ),
    "HH empty side": ({"chosen": HH + " a", "rejected": HH}, "empty completion: rejected"),
    "chat without prefix": (
        {"chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "c"), said("tool", "d")]},
        "no shared prompt",
    ),
    "chat with another turn": (
        {"prompt": [said("user", "a")], "chosen": [said("user", "b")], "rejected": [said("assistant", "c")]},
        "no shared prompt: chosen holds a 'user' message",
    ),
    "chat empty prompt": (
        {"prompt": [], "chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]}, "empty prompt"
    ),
    "chat empty completion": (
        {"prompt": [said("user", "a")], "chosen": [said("assistant", " ")], "rejected": [said("assistant", "c")]},
        "empty completion: chosen",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD.keys())
def test_an_error_names_file_line_and_reason(tmp_path, row, reason):
    path = write_rows(tmp_path / "pairs.jsonl", GOOD, b"", row)
    with pytest.raises(DataError, match=rf"pairs\.jsonl:3: {reason}") as raised:
        read_pairs(path)
    assert "cannot use 1 of 2 rows" in str(raised.value)
    assert "--on-bad skip" in str(raised.value)


def test_max_length_counts_tokens(tmp_path, tokenizer):
    path = write_rows(tmp_path / "pairs.jsonl", GOOD, OTHER)  # 6 + 12 + EOS = 19 and 7 + 16 + EOS = 24 tokens
    assert len(read_pairs(path, tokenizer=tokenizer, max_length=24).pairs) == 2
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: too long: 24 tokens, at most 23 allowed"):
        read_pairs(path, tokenizer=tokenizer, max_length=23)
    with pytest.raises(UsageError, match="max_length counts tokens"):
        read_pairs(path, max_length=24)


def test_two_sides_with_the_same_tokens_are_an_error(tmp_path, tokenizer):
    path = write_rows(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "§", "rejected": "±"})
    assert len(read_pairs(path).pairs) == 1
    with pytest.raises(DataError, match="chosen equals rejected: they are the same tokens"):
        read_pairs(path, tokenizer=tokenizer)


def test_the_error_shows_five_rows_and_counts_the_rest(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", *([b"nonsense"] * 7), GOOD, {**GOOD, "chosen": None})
    with pytest.raises(DataError) as raised:
        read_pairs(path)
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("cannot use 8 of 9 rows (not JSON: 7, null field: 1)")
    assert [line.split(":")[1] for line in lines[1:6]] == ["1", "2", "3", "4", "5"]
    assert lines[6] == "  and 3 more"


def test_skip_writes_rejects_and_keeps_the_rest(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", GOOD, b'{"prompt": \xff', {**OTHER, "chosen": None}, OTHER, GOOD)
    rejects = tmp_path / "new" / "rejects.jsonl"
    with pytest.warns(UserWarning, match=r"left out 3 of \d+ rows .*; they are in .*rejects.jsonl"):
        read = read_pairs(path, on_bad="skip", rejects=rejects)
    assert read.pairs == [PreferencePair(**GOOD), PreferencePair(**OTHER)]
    assert read.summary.rejects_by_reason == {"bad UTF-8": 1, "null field": 1, "duplicate row": 1}
    assert (read.summary.rows, read.summary.kept) == (5, 2)
    written = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in written] == [(str(path), 2), (str(path), 3), (str(path), 5)]
    assert written[0]["raw"] == '{"prompt": \\xff'
    assert written[1]["reason"] == "null field: chosen"
    assert json.loads(written[2]["raw"]) == GOOD
    assert list(rejects.parent.iterdir()) == [rejects]


def test_skip_without_rejects_warns(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", GOOD, b"nonsense")
    with pytest.warns(UserWarning, match=r"left out 1 of 2 rows \(not JSON: 1\)"):
        read_pairs(path, on_bad="skip")


def test_an_unusable_or_broken_source_leaves_no_partial_rejects(tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    path = write_rows(tmp_path / "pairs.jsonl", b"nonsense")
    with pytest.raises(DataError, match="Nothing is left to use"):
        read_pairs(path, on_bad="skip", rejects=rejects)
    assert len(rejects.read_text().splitlines()) == 1  # so that one can look at why
    rejects.unlink()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"nonsense\n" * 1000)[:-12])
    with pytest.raises(DataError, match="truncated"):
        read_pairs(cut, on_bad="skip", rejects=rejects)
    assert not rejects.exists()
    assert not list(tmp_path.glob(".rejects*"))


def test_unwritable_rejects_are_an_error(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", GOOD)
    with pytest.raises(OutputError, match=r"cannot write .*rejects.jsonl: .*; choose another file with --rejects"):
        read_pairs(path, on_bad="skip", rejects=path / "rejects.jsonl")
    with pytest.raises(UsageError, match="would overwrite the data"):
        read_pairs(path, on_bad="skip", rejects=path)
    with pytest.raises(UsageError, match="on_bad"):
        read_pairs(path, on_bad="ignore")


# --- formats -----------------------------------------------------------------------------------------------------


def test_extra_fields_blank_lines_bom_and_windows_line_ends_are_ignored(tmp_path):
    rows = b"\xef\xbb\xbf" + json.dumps({**GOOD, "source": "x", "score": None}).encode() + b"\r\n\r\n  \n"
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(rows + json.dumps(OTHER).encode())
    assert read_pairs(path).pairs == [PreferencePair(**GOOD), PreferencePair(**OTHER)]


def test_hh_dialogues_split_after_the_last_assistant_turn(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    path = write_rows(tmp_path / "pairs.jsonl", {"chosen": start + " well", "rejected": start + " what"}, GOOD)
    first = read_pairs(path).pairs[0]
    assert (first.prompt, first.chosen, first.rejected) == (start, " well", " what")
    assert not first.prompt_templated


def test_every_form_of_chat_row_gives_the_same_pair(tmp_path, chat_tokenizer):
    ask, good, bad = said("user", "hi"), said("assistant", "hello"), said("assistant", "no")
    forms = [
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"prompt": [ask], "chosen": [ask, good], "rejected": [ask, bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": "hi", "chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": [{**ask, "name": None}], "chosen": [good], "rejected": [bad]},
    ]
    expected = PreferencePair(
        prompt="user: hi</s>\nassistant: ", chosen="hello</s>\n", rejected="no</s>\n", prompt_templated=True
    )
    for i, form in enumerate(forms):
        path = write_rows(tmp_path / f"{i}.jsonl", form, GOOD)
        assert read_pairs(path, tokenizer=chat_tokenizer).pairs == [expected, PreferencePair(**GOOD)]


def test_pairs_of_text_parts_are_read_as_text(tmp_path, chat_tokenizer):
    def parts(role, *texts):
        return [{"role": role, "content": [{"type": "text", "text": text} for text in texts]}]

    given = {"prompt": parts("user", "Two and ", "two?"), "chosen": parts("assistant", "Four."),
             "rejected": parts("assistant", "Five.")}  # fmt: skip
    plain = {name: [said(rows[0]["role"], "".join(part["text"] for part in rows[0]["content"]))]
             for name, rows in given.items()}  # fmt: skip
    one, other = (read_pairs(write_rows(tmp_path / "pairs.jsonl", row), tokenizer=chat_tokenizer)
                  for row in (given, plain))  # fmt: skip
    assert (one.pairs, one.fingerprint) == (other.pairs, other.fingerprint)
    image = {"type": "image", "image": "x.png"}
    for row, reason in (
        (given | {"chosen": [{"role": "assistant", "content": [image]}]}, "message 1 of chosen holds 'image'"),
        (plain | {"tools": [{}]}, "unsupported field: tools"),
    ):
        with pytest.raises(DataError, match=reason):
            read_pairs(write_rows(tmp_path / "pairs.jsonl", row), tokenizer=chat_tokenizer)


def test_variables_of_the_chat_template_belong_to_a_run_or_to_a_row(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("assistant: {%", "assistant: {{ 'no' if brief }}{%").replace(
        "{{ m.role }}:", "{{ m.role }}:{{ ' no' if brief and m.role == 'assistant' }}"
    )
    row = {"prompt": [said("user", "a")], "chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]}
    path = write_rows(tmp_path / "pairs.jsonl", row, row | {"chat_template_kwargs": {"brief": False}})
    brief, own = read_pairs(path, tokenizer=tokenizer, chat_template_kwargs={"brief": True}).pairs
    assert (brief.prompt, brief.chosen) == ("user: a</s>\nassistant: no", " b</s>\n")
    assert (own.prompt, own.chosen) == ("user: a</s>\nassistant: ", "b</s>\n")
    with pytest.raises(UsageError, match="does not read long; it reads brief"):
        read_pairs(path, tokenizer=tokenizer, chat_template_kwargs={"long": True})
    with pytest.raises(DataError, match=r"other\.jsonl:1: bad value: the chat template does not read long"):
        read_pairs(
            write_rows(tmp_path / "other.jsonl", row | {"chat_template_kwargs": {"long": 1}}), tokenizer=tokenizer
        )
    with pytest.raises(UsageError, match=r"applies to chats, and .* holds none"):
        read_pairs(write_rows(tmp_path / "p.jsonl", GOOD), tokenizer=tokenizer, chat_template_kwargs={"brief": True})
    with pytest.raises(UsageError, match="give its tokenizer"):
        read_pairs(path, chat_template_kwargs={"brief": True})


def test_chats_as_people_read_them_need_no_tokenizer(tmp_path):
    system = [said("system", "Be brief."), said("user", "Hi")]
    replies = {"chosen": [said("assistant", "Ho")], "rejected": [said("assistant", "Hm")]}
    path = write_rows(tmp_path / "pairs.jsonl", {"prompt": system[1:]} | replies, {"prompt": system} | replies, GOOD)
    read = read_pairs(path, readable=True).pairs
    assert [pair.prompt for pair in read] == ["Hi", "System: Be brief.\n\nUser: Hi", GOOD["prompt"]]
    assert (read[0].chosen, read[1].rejected, read[0].prompt_templated) == ("Ho", "Hm", False)


def test_a_text_prompt_must_be_the_last_shared_message(tmp_path, chat_tokenizer):
    ask, good, bad = said("user", "hi"), said("assistant", "hello"), said("assistant", "no")
    path = write_rows(tmp_path / "pairs.jsonl", {"prompt": "ho", "chosen": [ask, good], "rejected": [ask, bad]})
    with pytest.raises(DataError, match="prompt is not the last message"):
        read_pairs(path, tokenizer=chat_tokenizer)


def test_chat_rows_need_a_template(tmp_path, tokenizer):
    row = {"prompt": [said("user", "a")], "chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]}
    path = write_rows(tmp_path / "pairs.jsonl", GOOD, row)
    for given_tokenizer, advice in ((None, "--tokenizer DIR"), (tokenizer, "has no chat template")):
        with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{advice}"):
            read_pairs(path, tokenizer=given_tokenizer, on_bad="skip")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: .*roles must alternate"),
        ("{{ messages|length }}{{ messages[-1].content }}", "chat template: .*writes the prompt differ"),
        ("{{ messages[0].content }}", "chat template: .*leaves the reply out"),
    ],
)
def test_a_template_that_rewrites_the_prompt_is_an_error(tmp_path, tokenizer, template, reason):
    tokenizer.chat_template = template
    row = {"prompt": [said("user", "a")], "chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]}
    path = write_rows(tmp_path / "pairs.jsonl", row)
    with pytest.raises(DataError, match=rf"pairs\.jsonl:1: {reason}"):
        read_pairs(path, tokenizer=tokenizer)


def test_the_fingerprint_depends_on_contents_and_order(tmp_path):
    def fingerprint(*rows):
        return read_pairs(write_rows(tmp_path / "pairs.jsonl", *rows)).fingerprint

    one = fingerprint(GOOD, OTHER)
    assert len(one) == 16
    assert fingerprint({**GOOD, "extra": 1}, OTHER) == one
    assert fingerprint(OTHER, GOOD) != one
    assert fingerprint(GOOD, {**OTHER, "chosen": " goodbye!"}) != one


def test_the_summary_matches_a_hand_computation(tmp_path, tokenizer):
    path = write_rows(tmp_path / "pairs.jsonl", GOOD, OTHER, {"prompt": "abc", "chosen": "xy", "rejected": "yx"})
    summary = read_pairs(path).summary
    assert summary.unit == "characters"
    assert summary.prompt.mean == pytest.approx((6 + 7 + 3) / 3)
    assert summary.chosen.median == 8
    assert (summary.chosen_longer, summary.chosen_equal, summary.chosen_shorter) == pytest.approx((1 / 3,) * 3)
    in_tokens = read_pairs(path, tokenizer=tokenizer).summary
    assert in_tokens.unit == "tokens"
    assert in_tokens.chosen.median == 9  # one token a character, and EOS


# --- split, tokenise, prompts ------------------------------------------------------------------------------------


def many_pairs(prompts=50, each=3):
    return [
        PreferencePair(prompt=f"prompt {i}", chosen=f"good {j}", rejected=f"bad {j}")
        for i in range(prompts) for j in range(each)
    ]  # fmt: skip


def test_split_puts_no_prompt_on_both_sides():
    pairs = many_pairs(200)
    train, held_out = split_pairs(pairs, 0.2, seed=3)
    assert len(train) + len(held_out) == len(pairs)
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert 0.1 < len(held_out) / len(pairs) < 0.3
    assert split_pairs(pairs, 0.2, seed=3) == (train, held_out)
    assert split_pairs(pairs, 0.2, seed=4) != (train, held_out)


def test_split_does_not_depend_on_row_order_or_other_rows():
    pairs = many_pairs(200)
    side = {p.prompt for p in split_pairs(pairs, 0.2, seed=0)[1]}
    assert {p.prompt for p in split_pairs(pairs[::-1], 0.2, seed=0)[1]} == side
    assert {p.prompt for p in split_pairs(pairs[:300], 0.2, seed=0)[1]} == side & {p.prompt for p in pairs[:300]}


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("prompts", [2, 3])
def test_split_leaves_no_side_empty(fraction, prompts):
    for seed in range(20):
        train, held_out = split_pairs(many_pairs(prompts), fraction, seed)
        assert train
        assert held_out


def test_split_of_edge_cases():
    one = many_pairs(prompts=1)
    assert split_pairs(one, 0.9, seed=0) == (one, [])
    assert split_pairs([], 0.5, seed=0) == ([], [])
    pairs = many_pairs()
    assert split_pairs(pairs, 0, seed=0) == (pairs, [])
    for fraction in (1, -0.1, float("nan")):
        with pytest.raises(UsageError, match="eval_fraction"):
            split_pairs(pairs, fraction, seed=0)


def test_plain_completions_end_with_eos(tokenizer):
    (ids,) = tokenize_pairs([PreferencePair(prompt="ab", chosen=" c", rejected="d")], tokenizer)
    space, a, b, c, d = tokenizer(" abcd").input_ids
    assert (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids) == ([a, b], [space, c, 2], [d, 2])
    (bare,) = tokenize_pairs([PreferencePair(prompt="ab", chosen=" c", rejected="d")], tokenizer, append_eos=False)
    assert bare.rejected_ids == [d]


@pytest.mark.parametrize(
    ("ending", "closing"),
    [("</s>\n", "</s>"), ("</s>", "</s>"), ("", "</s>"), ("<end>\n", None), ("<unk>\n", "<unk>")],
    ids=["eos and newline", "eos", "no ending", "an ending in ordinary text", "another special token"],
)
def test_templated_completions_end_once(tmp_path, tokenizer, ending, closing):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + ending + "{% endfor %}"
    row = {"prompt": [said("user", "a")], "chosen": [said("assistant", "bc")], "rejected": [said("assistant", "d")]}
    pairs = read_pairs(write_rows(tmp_path / "pairs.jsonl", row), tokenizer=tokenizer).pairs
    (ids,) = tokenize_pairs(pairs, tokenizer)
    expected = "bc" + (ending if closing is None else closing)
    assert ids.chosen_ids == tokenizer(expected, add_special_tokens=False).input_ids


def test_prompts_are_read_from_every_kind_of_row(tmp_path):
    hh = {"chosen": HH + " a", "rejected": HH + " a"}
    path = write_rows(tmp_path / "prompts.jsonl", {"prompt": "one", "id": 7}, b"", GOOD, hh, {"prompt": "one"})
    assert read_prompts(path) == ["one", "Say hi", HH, "one"]
    packed = tmp_path / "prompts.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_prompts(str(packed)) == read_prompts(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"nonsense", "not JSON"),
        (b'{"prompt": "\xff"}', "bad UTF-8"),
        ({"text": "a"}, "missing field: prompt"),
        ({"prompt": None}, "null field: prompt"),
        ({"prompt": ["a"]}, "wrong type: message 1 of prompt is not"),
        ({"prompt": [said("user", "a")], "tools": [{}]}, "unsupported field: tools"),
        ({"prompt": [said("user", "a")], "chat_template_kwargs": {"a": 1}}, "unsupported field: chat_template_kwargs"),
        ({"custom_id": "a", "url": "u", "body": {}}, "unsupported field: a line of an OpenAI batch"),
        ({"prompt": " "}, "empty prompt"),
        ("just text", "wrong type: the row is text"),
        ({"chosen": "a", "rejected": "b"}, "missing field: prompt"),
    ],
)
def test_an_error_names_file_and_line_of_a_bad_prompt(tmp_path, row, reason):
    path = write_rows(tmp_path / "prompts.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(DataError, match=rf"prompts\.jsonl:2: {reason}"):
        read_prompts(path)


# --- real and random input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "rows", "equal", "longer"),
    [("base", 2354, 2, 0.59), ("online", 1137, 2, 0.42), ("rejection-sampled", 2749, 32, 0.56)],
)
def test_real_human_pairs(shared_data, tmp_path, split, rows, equal, longer):
    path = shared_data / "hh" / f"helpful-{split}.test.jsonl.gz"
    with pytest.raises(DataError, match=f"of {rows} rows"):
        read_pairs(path)
    with pytest.warns(UserWarning, match=f"left out .* of {rows} rows"):
        summary = read_pairs(path, on_bad="skip", rejects=tmp_path / "rejects.jsonl").summary
    assert summary.rejects_by_reason["chosen equals rejected"] == equal
    assert summary.kept + sum(summary.rejects_by_reason.values()) == summary.rows == rows
    assert summary.kept > 0.99 * rows - equal
    assert summary.chosen_longer == pytest.approx(longer, abs=0.01)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.sampled_from([HH + " a", HH + " b", " ", "a"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "role", "content"]), inner, max_size=5)
    | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner}), max_size=3),
    max_leaves=12,
)  # fmt: skip
_row = st.fixed_dictionaries({"chosen": _json, "rejected": _json}, optional={"prompt": _json})
_line = st.binary(max_size=30) | (_row | _json).map(lambda value: json.dumps(value).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(_line, max_size=4), suffix=st.sampled_from(["jsonl", "jsonl", "gz", "xz", "zst", "parquet"]))
def test_random_input_gives_pairs_or_a_data_error(tmp_path, chat_tokenizer, lines, suffix):
    path = tmp_path / f"fuzz.{suffix}"
    path.write_bytes(b"\n".join(lines))
    for tokenizer in (None, chat_tokenizer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "left out ..." is what skip says here
            for on_bad in ("error", "skip"):
                with contextlib.suppress(DataError):
                    read_pairs(path, tokenizer=tokenizer, on_bad=on_bad)
    with contextlib.suppress(DataError):
        read_prompts(path)


def test_tokens_beyond_the_embeddings_are_bad_rows(tmp_path, tokenizer):
    rows = [{"prompt": "a", "chosen": chosen, "rejected": "d"} for chosen in ("bc", "b?", "bd")]
    path, last = write_rows(tmp_path / "pairs.jsonl", *rows), tokenizer.convert_tokens_to_ids("?")
    assert len(read_pairs(path, tokenizer=tokenizer, embeddings=last + 1).pairs) == 3
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: unknown token: the text has token {last}, and the model "):
        read_pairs(path, tokenizer=tokenizer, embeddings=last)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 rows \(unknown token: 1\)"):
        assert len(read_pairs(path, tokenizer=tokenizer, embeddings=last, on_bad="skip").pairs) == 2


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is it?", "A cat."), ("Say hi", "hello"), ("Assistant:", "Sure"), ("It costs 3", "4 euros"),
        ("Was ist das?", "Über"), ("Что это?", "Кошка"), ("안녕하세요?", "네"), ("ما هذا؟ a", "قطة"), ("Well…", "yes"),
        ("Wait,", "what"),
    ],
)  # fmt: skip
def test_words_that_run_together(prompt, completion):
    assert run_together(prompt, completion)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is it?", " A cat."), ("What is it? ", "A cat."), ("What is it?\n", "A cat."), ("A:\t", "x"),
        ("\n\nHuman: Hi\n\nAssistant:", " Hello"), ("\n\nAssistant:", "\nHello"), ('He said "', "Hello"),
        ("f(", "x)"), ("See [", "1]"), ("“", "Hello"), ("it", "'s"), ("end", "."), ("", "Hi"), ("Hi", ""),
        ("这是什么?", "猫"), ("这是什么?", "A cat"), ("これは何ですか。", "猫です"), ("カタカナ", "ひらがな"),
        ("นี่คืออะไร", "แมว"),
        ("http://", "example"), ("a-", "b"), ("What is it?", "🙂 yes"), ("ນີ້ແມ່ນຫຍັງ", "ແມວ"), ("ｶﾀｶﾅ", "ｶﾀｶﾅ"),
    ],
)  # fmt: skip
def test_words_that_do_not_run_together(prompt, completion):
    assert not run_together(prompt, completion)
