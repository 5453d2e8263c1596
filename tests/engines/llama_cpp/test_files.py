"""GGUF files from the command line to the completion: loading, heads trained on either engine, jobs, refusals."""

import contextlib
import json
import random
import shutil

import pytest
import torch
from typer.testing import CliRunner

from helpers.gguf_files import write_gguf
from helpers.llama_models import require_llama_cpp
from helpers.synthetic import synthetic_rows, write_rows
from rgtg.cli.main import app
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import RgtgError, TokenizerMismatchError, UsageError
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.head_file import read_head

require_llama_cpp()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPTS = ["Once upon a time", "the cat", "he said that", "tell me", "what", "a b c", "to", "end."]


def rgtg(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A quantised file, the same in F32, pairs, and a head trained on the states of each engine."""
    folder = tmp_path_factory.mktemp("gguf-world")
    write_gguf(folder / "model.gguf", quantised=True)
    write_gguf(folder / "exact.gguf")
    write_rows(folder / "pairs.jsonl", synthetic_rows(24))
    for engine in ("torch", "llama-cpp"):
        rgtg(
            "train", "--pairs", folder / "pairs.jsonl", "--base", folder / "model.gguf", "--trunk", "own",
            "--head", "vocab", "--layer", "final", "--engine", engine, "--output", folder / f"head-{engine}",
            "--set", "width=8", "--set", "train.num_train_epochs=1", "--quiet",
        )  # fmt: skip
    return folder


def test_auto_takes_llama_cpp_and_both_engines_agree(world):
    guided = GuidedPolicy.from_pretrained(str(world / "exact.gguf"), method="policy", top_k=None)
    assert guided.policy.engine == "llama-cpp"
    assert guided.policy.model.stored_dtype == "F32"
    plain = GuidedPolicy.from_pretrained(str(world / "exact.gguf"), method="policy", top_k=None, dtype="float32")
    assert plain.policy.engine == "torch", "dtype asks for torch"
    assert guided.end_tokens == plain.end_tokens
    assert guided.policy.max_length == plain.policy.max_length == 128
    mine, theirs = (one.generate(PROMPTS, max_new_tokens=4, seed=1) for one in (guided, plain))
    same = sum(a.token_ids == b.token_ids for a, b in zip(mine, theirs, strict=True))
    assert same >= len(PROMPTS) - 1, "a draw near a tie may differ"
    chats = [[{"role": "user", "content": "hello"}]]
    assert guided.generate(chats, max_new_tokens=2)[0].prompt == plain.generate(chats, max_new_tokens=2)[0].prompt


@pytest.mark.parametrize("trained_on", ["torch", "llama-cpp"])
@pytest.mark.parametrize("engine", ["torch", "llama-cpp"])
def test_a_head_steers_the_file_that_it_was_trained_on_in_both_engines(world, trained_on, engine):
    folder = str(world / f"head-{trained_on}")
    head = read_head(folder)
    assert head.reads_final_state
    guided = GuidedPolicy.from_pretrained(str(world / "model.gguf"), folder, beta=4.0, engine=engine)
    assert guided.policy.engine == engine
    (done,) = guided.generate(["Once"], max_new_tokens=4)
    assert done.scorer_calls == len(done.token_ids)
    with pytest.raises(UsageError, match="whose states mean nothing to it"):
        GuidedPolicy.from_pretrained(str(world / "exact.gguf"), folder, engine=engine)


@pytest.mark.parametrize("trained_on", ["torch", "llama-cpp"])
def test_one_head_scores_texts_alike_on_both_engines(world, trained_on):
    scores = []
    for engine in ("torch", "llama-cpp"):
        policy = load_policy(str(world / "model.gguf"), engine=engine)
        scorer = load_scorer(str(world / f"head-{trained_on}"), policy=policy)
        scores.append(scorer.score(PROMPTS[:4], [" and then"] * 4))
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_a_file_of_prompts_resumes_to_the_same_bytes(world, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    arguments = [
        "generate", "--policy", world / "model.gguf", "--scorer", world / "head-llama-cpp", "--prompts", prompts,
        "--engine", "llama-cpp", "--batch-size", 3, "--max-new-tokens", 6, "--trace", "--quiet",
    ]  # fmt: skip
    rgtg(*arguments, "--output", whole)
    rgtg(*arguments, "--output", cut)
    assert cut.read_bytes() == whole.read_bytes()
    row = json.loads(whole.read_text().splitlines()[0])
    assert len(row["trace"]) == len(row["token_ids"])


def test_methods_are_compared_on_llama_cpp(world, tmp_path):
    from rgtg.config import CompareSettings
    from rgtg.evaluation.compare.comparison import compare

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[:4]))
    settings = CompareSettings(
        policy=str(world / "model.gguf"), prompts=prompts, output=tmp_path / "out", max_new_tokens=6, bootstrap=100,
        permutations=100, engine="llama-cpp", traces=1,
        methods=[
            {"method": "policy"},
            {"method": "pargs", "scorer": str(world / "head-torch"), "beta": [1.0, 4.0]},
            {"method": "best-of-n", "scorer": str(world / "head-torch"), "n": 3},
            {"method": "policy", "label": "the file in F32", "policy": str(world / "exact.gguf")},
        ],
    )  # fmt: skip

    def vowels(completions):
        return [float(sum(letter in "aeiou" for letter in c.text)) for c in completions]

    result = compare(settings, reward=vowels)
    assert [row.label for row in result.methods][-1] == "the file in F32"
    assert all(row.metrics["kl_nats"].mean >= -1e-6 for row in result.methods[:4])
    assert result.provenance.dtype == "Q8_0"


def test_damaged_heads_and_prompts_are_errors_of_rgtg_and_harm_no_policy(world, tmp_path):
    draw, policy = random.Random(1), load_policy(str(world / "model.gguf"), engine="llama-cpp")
    whole = world / "head-llama-cpp"
    for i in range(60):
        folder = tmp_path / f"head-{i}"
        shutil.copytree(whole, folder)
        damaged = folder / draw.choice(["rgtg.json", "head.safetensors"])
        data = bytearray(damaged.read_bytes())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(data), 2000))
            data[at : at + draw.choice((0, 1, 30))] = draw.randbytes(draw.choice((0, 1, 4)))
        damaged.write_bytes(bytes(data))
        with contextlib.suppress(RgtgError):
            guided = GuidedPolicy(policy, load_scorer(str(folder), policy=policy), method="pargs")
            guided.generate(["Once"], max_new_tokens=2)
    guided = GuidedPolicy(policy, load_scorer(str(whole), policy=policy), method="pargs")
    for ids in ([], [10**9], [-1], [5] * 500, [2**63]):
        with pytest.raises(RgtgError):
            guided.generate_ids([ids], max_new_tokens=2)
    assert guided.generate(["Once"], max_new_tokens=2)[0].finish_reason


def test_threads_are_those_of_all_engines(world):
    before = torch.get_num_threads()
    try:
        guided = GuidedPolicy.from_pretrained(str(world / "model.gguf"), method="policy", threads=2)
        assert torch.get_num_threads() == guided.policy.model.context._threads == 2
    finally:
        torch.set_num_threads(before)


def test_arguments_of_torch_are_refused(world):
    model = str(world / "model.gguf")
    with pytest.raises(UsageError, match="dtype applies to the engine torch"):
        load_policy(model, engine="llama-cpp", dtype="float32")
    with pytest.raises(UsageError, match="cache_gguf applies to the engine torch"):
        load_policy(model, engine="llama-cpp", cache_gguf=True)
    with pytest.raises(UsageError, match="built for the CPU"):
        load_policy(model, engine="llama-cpp", device="cuda")
    with pytest.raises(UsageError, match="unknown engine 'llama'; choose auto or one of torch, llama-cpp"):
        load_policy(model, engine="llama")
    with pytest.raises(UsageError, match="threads = 0"):
        GuidedPolicy.from_pretrained(model, method="policy", threads=0)


def test_other_models_are_no_gguf_files(policy_folder):
    with pytest.raises(UsageError, match="the engine llama-cpp runs GGUF files"):
        load_policy(str(policy_folder), engine="llama-cpp")
    assert load_policy(str(policy_folder), engine="auto").engine == "torch"


def test_a_tokenizer_that_reads_text_otherwise_is_refused(world, monkeypatch):
    from rgtg.engines.llama_cpp.model import LlamaModel

    tokenize = LlamaModel.tokenize
    monkeypatch.setattr(LlamaModel, "tokenize", lambda self, text, special: tokenize(self, text, special=special)[1:])
    with pytest.raises(TokenizerMismatchError, match=r"differs at token 0.*--engine torch"):
        load_policy(str(world / "model.gguf"), engine="llama-cpp")


def test_without_the_library_the_file_runs_on_torch_and_says_how_to_be_faster(world, monkeypatch):
    from rgtg.config.engines import Engine

    monkeypatch.setattr(Engine, "installed", property(lambda self: self.name == "torch"))
    with pytest.warns(UserWarning, match=r"one prompt faster on a CPU \(pip install 'rgtg\[llama-cpp\]'\)"):
        policy = load_policy(str(world / "model.gguf"), engine="auto")
    assert policy.engine == "torch"
    with pytest.raises(ImportError, match=r"pip install 'rgtg\[llama-cpp\]'"):
        load_policy(str(world / "model.gguf"), engine="llama-cpp")


def test_doctor_says_which_engine_and_times_it(world):
    shown = json.loads(rgtg("doctor", "--json").stdout)
    assert shown["gguf"].startswith("llama-cpp (llama-cpp-python 0.3")
    timed = json.loads(
        rgtg(
            "doctor", "--speed", "--policy", world / "model.gguf", "--scorer", world / "head-torch", "--json", "--set",
            "tokens=2", "--set", "repeats=1", "--set", "prompt_length=8",
        ).stdout
    )  # fmt: skip
    assert [row["name"] for row in timed["speed"]] == ["unguided", "guided"]
