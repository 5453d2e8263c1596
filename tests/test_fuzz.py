"""Every reader on randomly damaged files: it reads them or raises an error of rgtg."""

import contextlib
import gzip
import json
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.made_report import audit, judged, rollout_audit, steered
from helpers.naive import info
from helpers.served import chat_tokenizer
from rgtg.batch.journal import Journal, JournalEntry
from rgtg.config import (
    CompareSettings,
    GenerateSettings,
    JudgeSettings,
    SweepSettings,
    TrainSettings,
)
from rgtg.data.completions import read_completions
from rgtg.data.pairs import read_pairs
from rgtg.data.prompts import read_prompt_rows, read_prompts
from rgtg.data.rollouts import read_rollouts
from rgtg.errors import RgtgError
from rgtg.models.loading.scorer_info import INFO_FILE, read_info, write_info
from rgtg.models.scorers.heads import StateHead, VocabularyHead, load_head, save_head
from rgtg.report.read import read_audits, read_comparison, read_judged
from rgtg.training.checkpoint.manager import MARKER, Marker, newest_valid, seal, verify

FEW, MANY = 200, 10_000
# Inputs that have broken parsers: deep nesting, long numbers, half characters, other encodings, no value.
NASTY = [
    b"", b"\n\n", b"\0", b"\xff\xfe{\0", b"\xef\xbb\xbf", b"null", b"[]", b"{}", b"NaN", b"-Infinity", b"1e99999",
    b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b'"\\ud800"', b'{"prompt": "a", "prompt": 1}', b"\xed\xa0\x80", b"\r",
    b"- &a [*a]", b"!!python/object/apply:os.system [exit]", b"&a [x]\n", b"? ", b"\t", b"<<: *x", b"%YAML 9.9\n---\n",
]  # fmt: skip

_scalar = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8)
_value = st.recursive(
    _scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def damaged(draw, whole):
    """A valid file with a few bytes cut, changed, inserted or repeated; or with one value of its JSON replaced."""
    if draw(st.booleans()) and (changed := _with_another_value(draw, whole)) is not None:
        return changed
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "drop", "insert", "change", "repeat"])):
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 40))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=12) | st.sampled_from(NASTY))
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "repeat":
                data[at:at] = data[max(0, at - 30) : at]
    return bytes(data)


def _with_another_value(draw, whole):
    lines = whole.split(b"\n")
    number = draw(st.integers(0, len(lines) - 1))
    try:
        row = json.loads(whole if len(lines) > 30 else lines[number])
    except ValueError:
        return None
    node = row
    while isinstance(node, dict | list) and node:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if draw(st.booleans()) or not isinstance(node[key], dict | list) or not node[key]:
            node[key] = draw(_value)
            break
        node = node[key]
    changed = json.dumps(row).encode("utf-8", "surrogatepass")
    return changed if len(lines) > 30 else b"\n".join([*lines[:number], changed, *lines[number + 1 :]])


def rows(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


TALK = [{"role": "user", "content": "Hi"}]
PAIRS = rows(
    {"prompt": "Q: a", "chosen": " yes", "rejected": " no"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
)
CHATS = rows({"prompt": TALK, **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}})
PROMPTS = rows(
    {"id": "a", "prompt": "Once"}, {"prompt": TALK, "id": 2},
    {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "m", "messages": TALK, "max_tokens": 5, "temperature": 0.5}},
)  # fmt: skip
DONE = rows(
    {"prompt": "Once", "text": " upon", "finish_reason": "stop", "reward": 0.5, "label": "x"},
    {"prompt": "a", "text": "b", "reward": 1},
)


def _settings(kind, **values):
    def read(path):
        kind.resolve(path, ["seed=1"])

    return yaml.safe_dump(values).encode(), "yaml", read


def _report(read, value):
    return value.model_dump_json(indent=1).encode(), "json", read


def _read_journal(path):
    with Journal.open(path, {"settings": {"a": 1}}, rows=4, counts=1) as journal:
        journal.append([JournalEntry(3, json.dumps({"id": "d"}), (1,))])


def _journal_of(folder):
    path = folder / "made.log"
    with Journal.open(path, {"settings": {"a": 1}}, rows=4, counts=1) as journal:
        journal.append([JournalEntry(i, json.dumps({"id": str(i), "text": "é"}), (7,)) for i in (2, 0)])
    return path.read_bytes(), "log", _read_journal


def _info_of(folder):
    write_info(folder, info())
    return (
        (folder / INFO_FILE).read_bytes(),
        "",
        lambda path: (path.replace(path.parent / INFO_FILE), read_info(path.parent)),
    )


def _head_of(kind):
    def make(folder):
        head = StateHead(8, 4) if kind == "state" else VocabularyHead(8, 4, 2, 12)
        save_head(folder, head)
        about = info().model_copy(update={"trunk": "own", "head": kind})

        def read(path):
            load_head(path.replace(path.parent / "head.safetensors").parent, about)

        return (folder / "head.safetensors").read_bytes(), "", read

    return make


def _marker_of(folder):
    saved = folder / "checkpoint-3"
    saved.mkdir()
    (saved / "weights").write_bytes(b"abc")
    seal(saved, step=3, processes=1, run={"seed": 0})
    whole = (saved / MARKER).read_bytes()

    def read(path):
        path.replace(saved / MARKER)
        assert isinstance(found := verify(saved), Marker | str)
        assert (newest_valid(folder) is None) == isinstance(found, str)

    return whole, "", read


READERS = {
    "pairs": lambda folder: (PAIRS, "jsonl", read_pairs),
    "pairs, gzip": lambda folder: (gzip.compress(PAIRS), "jsonl.gz", read_pairs),
    "pairs of chats": lambda folder: (
        CHATS + PAIRS, "jsonl", lambda path: read_pairs(path, tokenizer=chat_tokenizer(), on_bad="skip"),
    ),
    "prompts": lambda folder: (PROMPTS, "jsonl", read_prompt_rows),
    "prompts alone": lambda folder: (PAIRS, "jsonl", read_prompts),
    "completions": lambda folder: (DONE, "jsonl", read_completions),
    "rollouts": lambda folder: (
        DONE, "jsonl", lambda path: read_rollouts(path, tokenizer=chat_tokenizer(), labels=True),
    ),
    "settings of generate": lambda folder: _settings(
        GenerateSettings, policy="p", scorer="s", beta=2.0, top_k=10, prompts="p.jsonl", seed=3
    ),
    "settings of train": lambda folder: _settings(
        TrainSettings, pairs="p.jsonl", base="b", output="o", lora={"r": 4}, train={"num_train_epochs": 1}
    ),
    "settings of compare": lambda folder: _settings(
        CompareSettings, policy="p", prompts="p.jsonl", reward="r", output="o",
        methods=[{"method": "pargs", "beta": [1, 2]}],
    ),
    "settings of sweep": lambda folder: _settings(
        SweepSettings, policy="p", scorer="s", prompts="p", target_kl=2.0, output="o"
    ),
    "settings of judge": lambda folder: _settings(JudgeSettings, a="a.jsonl", b="b.jsonl", model="m", output="o"),
    "comparison": lambda folder: _report(read_comparison, steered()),
    "audit": lambda folder: _report(lambda path: read_audits([str(path)]), audit()),
    "audit by roll-outs": lambda folder: _report(lambda path: read_audits([f"x={path}"]), rollout_audit()),
    "judge": lambda folder: _report(read_judged, judged()),
    "journal": _journal_of,
    "rgtg.json": _info_of,
    "state head": _head_of("state"),
    "vocabulary head": _head_of("vocab"),
    "checkpoint": _marker_of,
}  # fmt: skip


def fuzz(folder: Path, reader: str, examples: int) -> None:
    (folder / "made").mkdir()
    whole, suffix, read = READERS[reader](folder / "made")
    path = folder / f"fuzz.{suffix}"

    def attempt(data):
        path.write_bytes(data)
        with warnings.catch_warnings(), contextlib.suppress(RgtgError):
            warnings.simplefilter("ignore")
            read(path)

    path.write_bytes(whole)
    read(path)  # the undamaged file
    for data in NASTY:
        attempt(data)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged(whole))
    def run(data):
        attempt(data)

    run()


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_is_an_error(reader, tmp_path):
    fuzz(tmp_path, reader, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("reader", READERS)
def test_many_damaged_files_are_read_or_are_errors(reader, tmp_path):
    fuzz(tmp_path, reader, MANY)


def test_an_exponential_yaml_file_gives_a_short_error(tmp_path):
    """A few lines of YAML anchors that expand to 10⁹ values."""
    bomb = tmp_path / "bomb.yaml"
    lines = ["seed:", "- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    bomb.write_text("\n".join([*lines, "policy: *a8"]))
    with pytest.raises(RgtgError) as caught:
        GenerateSettings.resolve(bomb)
    assert len(str(caught.value)) < 5000
