"""Tiny policies and a scorer of every kind, saved as people have them: folders of safetensors, with rgtg.json."""

import json
import math
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from goldens.command import rgtg

CHARACTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:'\n"[:60]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% endif %}"
)
MERGES = (
    "t h", "th e", "Ġ a", "Ġ t", "i n", "e r", "a n", "o n", "Ġt he", "r e", "Ġ s", "Ġ w", "e n", "Ġ i", "a t", "o u",
    "i s", "in g", "Ġa n", "Ġan d", "l l", "h e", "T h", "Th e", "O n", "On ce", "c e", "Ġ u", "p o", "k e", "a s",
    "Ġw as", "n o", "Ġ no", "H i", *(f"{a} {b}" for a in "qTAMW" for b in "lqTSnf"),
)  # fmt: skip
WORDS = ("the", "an", "and", "it", "is", "no", "hi", "on", "once", "what", "cat", "who", "why", "me", "tell", "sat")

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IDS = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROOM = {"max_position_embeddings": 256}
_GROUPED = {**_SIZES, **_IDS, **_ROOM, "num_key_value_heads": 2}
# More than 8 MB of weights, in half precision too: rgtg lays such models out for a processor.
_WIDE = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1536}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "wide": lambda: LlamaConfig(**_GROUPED | _WIDE),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=6),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, **_IDS, **_ROOM),
    "opt": lambda: OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, **_IDS, **_ROOM
    ),
}
FAMILIES = ("gpt2", "gpt_neox", "mistral", "opt", "qwen2", "qwen3")


def spread(model, seed):
    """Random weights far from flat, from draws that every processor makes alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                width = 0.6 if "embed" in name or "wte" in name else 0.43
                width *= (32 / max(32, parameter.shape[-1])) ** 0.5
                parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5) * (2 * width))
    return model.eval()


def nudged(model, seed):
    """A model that mostly agrees with another: its weights a little off."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(noise(*parameter.shape, seed=seed + i, width=0.08))
    return model


def noise(*shape, seed, width):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5) * (2 * width)


def policy(kind="llama", seed=0):
    return spread(AutoModelForCausalLM.from_config(CONFIGS[kind]()), seed)


def reward_model(kind="llama", seed=1):
    config = CONFIGS[kind]()
    config.num_labels = 1
    return spread(AutoModelForSequenceClassification.from_config(config), seed)


def broken(model):
    """A model that knows no capital letter behind S: it returns NaN."""
    with torch.no_grad():
        model.get_input_embeddings().weight[by_characters().convert_tokens_to_ids("S") : 57] = math.nan
    return model


def by_characters():
    """<s> 0, <pad> 1, </s> 2, <unk> 3, then 60 characters."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *CHARACTERS])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def by_pieces():
    """Byte-level pieces of several characters, as GPT-2 has them; not trained, since training depends on chance."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split()) for merge in MERGES]
    tokens = ["<s>", "</s>", *letters, *("".join(merge) for merge in merges)]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def by_words():
    """Lower-cased word pieces, as BERT has them; every character is one."""
    starts = [*"abcdefghijklmnopqrstuvwxyz.,!?:'", *WORDS]
    insides = [*"abcdefghijklmnopqrstuvwxyz", "ing", "er", "he", "at"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *starts, *(f"##{piece}" for piece in insides)]
    raw = Tokenizer(models.WordPiece(vocab={token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def reads_pieces(tokenizer, positions, seed):
    """A causal reward model of a tokenizer of its own."""
    config = LlamaConfig(
        **_SIZES, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=positions, bos_token_id=0,
        eos_token_id=1, num_labels=1,
    )  # fmt: skip
    return spread(AutoModelForSequenceClassification.from_config(config), seed)


def encoder(tokenizer, seed):
    config = BertConfig(vocab_size=len(tokenizer), **_SIZES, **_ROOM, num_labels=1, pad_token_id=0)
    return spread(BertForSequenceClassification(config), seed)


def build(folder, real=None):
    """All models and data, below a folder that is the working directory: models name each other by relative paths.

    Args:
        folder: of all.
        real: a pretrained model's folder, if there is one.
    """
    characters, pieces, words = by_characters(), by_pieces(), by_words()

    def save(name, model, tokenizer=characters, **about):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if about:
            describe(folder / name, **about)

    save("policy", policy())
    save("draft", nudged(policy(), seed=8))
    save("reward", reward_model(), objective="prefix-bt")
    save("stock", reward_model(seed=2))
    save("whole", reward_model(seed=3), objective="full-bt", append_eos=False)
    save("broken", broken(reward_model()), objective="prefix-bt")
    save("farma", policy(seed=9), objective="farma", head="vocab")
    save("autoregressive", policy(seed=10), objective="autoregressive", head="vocab")
    save("pieces", reads_pieces(pieces, 256, seed=4), pieces)
    save("pieces-trained", reads_pieces(pieces, 256, seed=4), pieces, objective="prefix-bt")
    save("short", reads_pieces(pieces, 20, seed=4), pieces)
    save("encoder", encoder(words, seed=5), words)
    save("wide", policy("wide", seed=11))
    save("wide-reward", reward_model("wide", seed=12), objective="prefix-bt")
    for i, family in enumerate(FAMILIES):
        save(family, policy(family, seed=20 + i))
        save(f"{family}-reward", reward_model(family, seed=40 + i), objective="prefix-bt")
    for name, of in (("state", "policy"), ("vocab", "policy"), ("vocab", "wide"), ("state", "gpt2"), ("vocab", "gpt2")):
        head(folder, of, name)
    for of in ("policy", "wide"):
        adapter(folder, of, AutoModelForSequenceClassification, "adapter", trunk="shared", objective="prefix-bt")
    adapter(folder, "policy", AutoModelForSequenceClassification, "lora-reward", objective="prefix-bt")
    adapter(folder, "policy", AutoModelForCausalLM, "lora-farma", objective="farma", head="vocab")
    if real is not None:
        stories(folder, real)
    write_rows(folder / "pairs.jsonl", pairs())


def pairs():
    """Preferences that a tiny model can learn: chosen completions are made of other letters."""
    return [
        {"prompt": f"{('Who', 'What', 'Why')[i % 3]} {'abcdefghij'[i % 10]}? ",
         "chosen": f"so {'abcdef'[i % 6] * (1 + i % 4)} yes", "rejected": f"it {'ghijkl'[i % 5] * (2 + i % 3)}"}
        for i in range(32)
    ]  # fmt: skip


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def stories(folder, real):
    """A copy of a real model, and a reward model on its weights."""
    shutil.copytree(real, folder / "stories")
    model = AutoModelForSequenceClassification.from_pretrained(real, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(noise(*model.score.weight.shape, seed=6, width=0.8))
    model.save_pretrained(folder / "stories-reward")
    AutoTokenizer.from_pretrained(real).save_pretrained(folder / "stories-reward")
    describe(folder / "stories-reward", objective="prefix-bt")


def describe(folder, **about):
    """rgtg.json."""
    said = {
        "version": 1, "rgtg_version": "0", "objective": "prefix-bt", "base_model": "policy", "base_fingerprint": "",
        "tokenizer_hash": "", "data_fingerprint": "", "append_eos": True,
    }  # fmt: skip
    (folder / "rgtg.json").write_text(json.dumps(said | about) + "\n")


def of_policy(folder, name):
    """What a scorer on a policy's states says of that policy; a job's record has the fingerprints."""
    write_rows(folder / "one.jsonl", [{"prompt": "One"}])
    found = {}
    for dtype in ("float32", "bfloat16"):
        output = folder / f"about-{name}-{dtype}.jsonl"
        if not output.exists():
            rgtg("generate", "--policy", name, "--method", "policy", "--max-new-tokens", 1, "--prompts", "one.jsonl",
                 "--output", output, "--dtype", dtype, "--quiet")  # fmt: skip
        found[dtype] = json.loads(Path(f"{output}.job.json").read_text())["made_with"]
    return {
        "base_model": name, "base_fingerprint": found["float32"]["policy"],
        "base_casts": {"bfloat16": found["bfloat16"]["policy"]}, "tokenizer_hash": found["float32"]["tokenizer"],
    }  # fmt: skip


def head(folder, of, kind, width=8, rank=5):
    """A head on a policy's own states, half precision as ``rgtg train`` writes it."""
    hidden = json.loads((folder / of / "config.json").read_text())
    hidden = hidden.get("hidden_size") or hidden["n_embd"]
    out = 1 if kind == "state" else rank
    weights = {
        "mlp.first.weight": noise(width, hidden, seed=1, width=0.8 * (32 / hidden) ** 0.5),
        "mlp.first.bias": noise(width, seed=2, width=0.5),
        "mlp.second.weight": noise(out, width, seed=3, width=0.9), "mlp.second.bias": noise(out, seed=4, width=0.5),
    }  # fmt: skip
    if kind == "vocab":
        weights |= {"table.weight": noise(64, rank, seed=5, width=0.9), "bias": noise(64, seed=6, width=0.5)}
    tensors = {name: value.half() for name, value in weights.items()}
    tensors |= {"mlp.mean": torch.zeros(hidden), "mlp.std": torch.ones(hidden)}
    place = folder / (kind if of == "policy" else f"{of}-{kind}")
    place.mkdir()
    save_file(tensors, place / "head.safetensors")
    layer = 1 if kind == "state" else 2
    about = of_policy(folder, of) | ({"rank": rank} if kind == "vocab" else {})
    describe(place, trunk="own", head=kind, layer=layer, width=width, **about)


def adapter(folder, of, auto_class, name, **about):
    """A LoRA of a policy, with a scalar head where it is a reward model."""
    labels = {"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}
    model = auto_class.from_pretrained(folder / of, **labels)
    task = "SEQ_CLS" if labels else "CAUSAL_LM"
    made = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type=task))
    with torch.no_grad():
        for i, (key, parameter) in enumerate(sorted(made.named_parameters())):
            if "lora_" in key:
                parameter.copy_(noise(*parameter.shape, seed=100 + i, width=0.15))
            elif "score" in key:
                parameter.copy_(noise(*parameter.shape, seed=7, width=1.5))
    made.peft_config["default"].base_model_name_or_path = of
    place = folder / (name if of == "policy" else f"{of}-{name}")
    made.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder / of).save_pretrained(place)
    describe(place, **of_policy(folder, of), **about)
