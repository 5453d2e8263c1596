"""Models that people try and that cannot work: every command says why, on one line, and never shows a traceback."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.command import verb
from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import CONFIGS, VOCAB, randomise, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg import GuidedPolicy, load_scorer
from rgtg.errors import UsageError
from rgtg.models.loading.pretrained import context_length

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **IDS,
}  # fmt: skip


def saved(auto_class, config, *, untrained=False):
    def save(folder):
        torch.manual_seed(0)
        model = auto_class.from_config(config)
        (model if untrained else randomise(model, 0)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    return save


def spoiled(spoil, make=tiny_policy):
    """A model that can be used, after ``spoil(folder)``."""

    def save(folder):
        make().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        spoil(folder)

    return save


def config_with(**values):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def rename_head(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, path, metadata={"format": "pt"})


def lose_a_shard(folder):
    model = tiny_policy()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()


def lose_the_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def cut_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickles(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_head(folder):
    for path in folder.iterdir():
        path.unlink()
    save_file({"mlp.first.weight": torch.zeros(2, 2)}, folder / "head.safetensors")


def two_labels():
    config = CONFIGS["llama"]()
    config.num_labels = 2
    return transformers.AutoModelForSequenceClassification.from_config(config)


AUTO = transformers.AutoModelForCausalLM
# What is in the folder, and what a policy's loading says; None for a folder that is a policy.
WRONG = {
    "an encoder": (
        saved(transformers.AutoModelForMaskedLM, transformers.BertConfig(**SIZES, **IDS)), "does not continue text"
    ),
    "an untrained encoder": (
        saved(transformers.AutoModelForMaskedLM, transformers.BertConfig(**SIZES, **IDS), untrained=True),
        "does not continue text",
    ),
    "an untrained XLNet": (
        saved(
            AUTO,
            transformers.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48),
            untrained=True,
        ),
        "does not continue text",
    ),
    "XLNet": (
        saved(AUTO, transformers.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48)),
        "does not continue text",
    ),
    "an encoder-decoder": (
        saved(transformers.AutoModelForSeq2SeqLM, transformers.BartConfig(**SEQ2SEQ)), r"encoder-decoder \(bart\)"
    ),
    "T5": (
        saved(
            transformers.AutoModelForSeq2SeqLM,
            transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=VOCAB),
        ),
        r"encoder-decoder \(t5\)",
    ),
    "a model of images": (
        saved(transformers.AutoModel, transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)),
        "is a vit model, which does not continue text",
    ),
    "a model of sound": (
        saved(
            transformers.AutoModelForAudioClassification,
            transformers.ASTConfig(**SIZES, max_length=32, num_mel_bins=16),
        ),
        "is a audio-spectrogram-transformer model, which does not continue text",
    ),
    "code of its own": (
        spoiled(config_with(model_type="evil", auto_map={"AutoConfig": "evil.C"})), "needs code of its own"
    ),
    "an unknown family": (spoiled(config_with(model_type="evil")), "does not know the family evil"),
    "no family": (spoiled(config_with(model_type=None, architectures=None)), "cannot load the policy"),
    "pickled weights": (spoiled(only_pickles), "pickled weights only"),
    "no weights": (spoiled(lambda folder: (folder / "model.safetensors").unlink()), "cannot load the policy"),
    "cut weights": (spoiled(cut_weights), "cannot load the policy"),
    "a missing shard": (spoiled(lose_a_shard), r"model-00001-of-0000\d\.safetensors.* is missing"),
    "other sizes": (spoiled(config_with(hidden_size=64)), "sizes of its weights"),
    "sizes that do not divide": (spoiled(config_with(num_attention_heads=5)), "cannot load the policy"),
    "an unknown dtype": (spoiled(config_with(dtype="float99")), "dtype"),
    "an unknown activation": (spoiled(config_with(hidden_act="swish-swash")), "cannot load the policy"),
    "no tokenizer": (spoiled(lose_the_tokenizer), "tokenizer of the policy"),
    "an empty tokenizer": (
        spoiled(lambda folder: (folder / "tokenizer.json").write_text("")), r"tokenizer\.json is damaged"
    ),
    "a cut tokenizer": (spoiled(cut_tokenizer), r"tokenizer\.json is damaged \(JSONDecodeError: "),
    "another file as tokenizer": (
        spoiled(lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}')), r"tokenizer\.json is damaged"
    ),
    "a cut tokenizer_config": (
        spoiled(lambda folder: (folder / "tokenizer_config.json").write_text("{")), r"tokenizer_config\.json is damaged"
    ),
    "a head alone": (spoiled(only_a_head), r"has no rgtg\.json"),
    "an empty folder": (lambda folder: folder.mkdir(), r"has no config\.json"),
    "an invalid config": (spoiled(lambda folder: (folder / "config.json").write_text("{")), "cannot load the policy"),
    "a reward model": (spoiled(lambda _folder: None, tiny_reward_model), "not a complete language model"),
}  # fmt: skip
# What is in the folder, and what a scorer's loading says.
WRONG_SCORERS = {
    "a language model": (spoiled(lambda _folder: None), "has no trained reward head"),
    "a head of another name": (
        spoiled(rename_head, tiny_reward_model), r"\(value_head\.weight\): rename it to score\.weight"
    ),
    "two labels": (spoiled(lambda _folder: None, two_labels), "has 2 labels"),
    "a family without a reward model": (
        saved(AUTO, transformers.CohereConfig(**SIZES, **IDS, num_key_value_heads=2)),
        "a family without a reward model",
    ),
}  # fmt: skip


def require_one_line(ran, message=None):
    assert ran.exit_code in (2, 3), (ran.output, ran.exception)
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.stderr.rstrip().endswith(line), ran.stderr
    assert "Traceback" not in ran.output
    if message:
        import re

        assert re.search(message, line), line


@pytest.fixture
def model(request, tmp_path):
    """The folder of one wrong model, and the message of its loading."""
    make, message = (WRONG | WRONG_SCORERS)[request.param]
    make(tmp_path / "wrong")
    return tmp_path / "wrong", message


@pytest.mark.parametrize("model", WRONG, indirect=True)
def test_as_a_policy(model):
    folder, message = model
    require_one_line(verb("generate")("--policy", folder, "--method", "policy", "--prompt", "Hi"), message)


@pytest.mark.parametrize("model", WRONG, indirect=True)
def test_as_a_served_policy(model):
    folder, message = model
    require_one_line(verb("serve")("--policy", folder, "--port", 0), message)


@pytest.mark.parametrize("model", [*WRONG, *WRONG_SCORERS], indirect=True)
def test_as_a_scorer(model, request, policy_folder, tmp_path):
    folder, message = model
    if request.node.callspec.params["model"] == "a reward model":
        pytest.skip("it is one")
    said = message if request.node.callspec.params["model"] in WRONG_SCORERS else None
    require_one_line(verb("generate")("--policy", policy_folder, "--scorer", folder, "--prompt", "Hi"), said)
    write_rows(tmp_path / "texts.jsonl", [{"prompt": "Hi", "text": " there"}])
    paths = ("--input", tmp_path / "texts.jsonl", "--output", tmp_path / "scored.jsonl")
    require_one_line(verb("score")("--scorer", folder, *paths), said)


@pytest.mark.parametrize(
    "arguments", [(), ("--trunk", "own", "--head", "vocab"), ("--objective", "farma")], ids=["reward", "own", "farma"]
)
@pytest.mark.parametrize("model", WRONG, indirect=True)
def test_as_a_base(model, arguments, request, tmp_path):
    folder, _message = model
    if request.node.callspec.params["model"] == "a reward model" and not arguments:
        pytest.skip("it can be trained further")
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(8))
    where = ("--pairs", pairs, "--output", tmp_path / "out", "--set", "train.max_steps=1")
    require_one_line(verb("train")("--base", folder, *where, *arguments))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_ways_of_a_family_without_a_reward_model_work(tmp_path):
    make, _ = WRONG_SCORERS["a family without a reward model"]
    make(tmp_path / "policy")
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(8))
    train = verb("train")
    where = ("--pairs", pairs, "--base", tmp_path / "policy", "--set", "train.max_steps=1")
    require_one_line(train(*where, "--output", tmp_path / "no"), "--trunk own --head vocab.*--objective farma, or auto")
    for name, more in {
        "head": ("--trunk", "own", "--head", "vocab", "--set", "layer=1", "--set", "width=8"),
        "farma": ("--objective", "farma"),
        "autoregressive": ("--objective", "autoregressive"),
    }.items():
        ran = train(*where, "--output", tmp_path / name, *more)
        assert ran.exit_code == 0, (ran.output, ran.exception)
        method = name if name == "farma" else "genarm" if name == "autoregressive" else "pargs"
        guided = GuidedPolicy.from_pretrained(str(tmp_path / "policy"), str(tmp_path / name), method=method)
        assert guided.generate("Hi", max_new_tokens=2)


def test_a_renamed_head_is_one_again(tmp_path):
    make, _ = WRONG_SCORERS["a head of another name"]
    make(tmp_path / "scorer")
    with pytest.raises(UsageError, match="rename"):
        load_scorer(str(tmp_path / "scorer"))
    path = tmp_path / "scorer" / "model.safetensors"
    weights = load_file(path)
    weights["score.weight"] = weights.pop("value_head.weight")
    save_file(weights, path, metadata={"format": "pt"})
    assert load_scorer(str(tmp_path / "scorer")).score(["Hi"], [" there"])


def test_a_limit_of_minus_one_is_none():
    assert context_length(transformers.XLNetConfig()) is None


def test_one_text_needs_no_padding(tmp_path):
    config = transformers.CTRLConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=128, num_labels=1
    )
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model = randomise(transformers.AutoModelForSequenceClassification.from_config(config), 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path))
    texts = [("Hi", " there"), ("Once upon", " a time")]
    found = scorer.score(*zip(*texts, strict=True))
    expected = [float(model(**tokenizer("".join(text), return_tensors="pt")).logits) for text in texts]
    assert found == pytest.approx(expected, abs=1e-5)
    shutil.rmtree(tmp_path)
