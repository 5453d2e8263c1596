"""Tiny models and tokenizers that every test shares; nothing here needs a network or a GPU."""

import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner

import hub_server
from rgtg.cli.main import app

SHARED = Path(__file__).parents[2] / "shared"
VOCAB = 64

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IDS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, **_IDS, num_key_value_heads=2, max_position_embeddings=128),
    "qwen2": lambda: Qwen2Config(**_SIZES, **_IDS, num_key_value_heads=2, max_position_embeddings=128),
    "qwen3": lambda: Qwen3Config(**_SIZES, **_IDS, num_key_value_heads=2, head_dim=8, max_position_embeddings=128),
    "mistral": lambda: MistralConfig(
        **_SIZES, **_IDS, num_key_value_heads=2, max_position_embeddings=128, sliding_window=6
    ),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, **_IDS, max_position_embeddings=128),
    "opt": lambda: OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=128,
        word_embed_proj_dim=32, do_layer_norm_before=True, **_IDS,
    ),
}  # fmt: skip


def tiny_policy(family: str = "llama", seed: int = 0):
    """A random causal LM; weights are scaled up so that its distributions are far from flat."""
    return _randomise(AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="sdpa"), seed)


def tiny_reward_model(family: str = "llama", seed: int = 1):
    """A random sequence-classification model with one label."""
    config = CONFIGS[family]()
    config.num_labels = 1
    return _randomise(AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa"), seed)


def _randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35 if "embed" in name or "wte" in name else 0.25, generator=generator)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Character-level: <s> 0, <pad> 1, </s> 2, <unk> 3, then 60 printable characters."""
    characters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:'\n"[: VOCAB - 4]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *characters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def policy_folder(tmp_path):
    """A saved tiny policy with its tokenizer."""
    folder = tmp_path / "policy"
    tiny_policy().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def scorer_folder(tmp_path):
    """A saved stock reward model with the policy's tokenizer."""
    folder = tmp_path / "scorer"
    tiny_reward_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the hub that huggingface_hub talks to, with a token that may write and a cache of its own."""
    from huggingface_hub import constants

    from rgtg.models.hub import forget_snapshots

    with hub_server.serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
        forget_snapshots()
        yield served
    forget_snapshots()


@pytest.fixture
def shared_data() -> Path:
    """Real preference data, where the checkout has it beside it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real data (shared/data beside the checkout) is absent")
    return SHARED / "data"


@pytest.fixture
def stories_model() -> Path:
    """A real pretrained story model, where the checkout has it beside it."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the pretrained story model (shared/models beside the checkout) is absent")
    return folder


@pytest.fixture
def unprivileged(tmp_path):
    """A block in which file permissions hold, for the superuser too."""

    @contextmanager
    def block():
        if not hasattr(os, "geteuid") or os.geteuid():
            yield
            return
        for folder in (tmp_path, *tmp_path.parents[:3]):  # pytest's own folders are the user's alone
            folder.chmod(folder.stat().st_mode | 0o055)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return block


def verb(*name):
    """A function that runs ``rgtg NAME ARGUMENTS…`` in this process; without a name, the arguments begin with it."""

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in (*name, *arguments)])

    return run
