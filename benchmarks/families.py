"""Every causal family of transformers under guidance, against a naive loop of stock forward passes.

    OMP_NUM_THREADS=1 python benchmarks/families.py [--only FAMILY …] [--output docs/results/families.md]

Each family that transformers lists for causal language models gets a tiny model with random weights. Three ways of
decoding have to give the tokens of a naive loop, in which a stock model reads one whole text at a time:

- ``pargs-greedy`` with a reward model of the family. It is trained for two steps first, and the folder has to load in
  stock transformers with the same rewards.
- Where transformers has no sequence-classification class (or one whose head does not read every position), a state head
  on the policy instead.
- ``policy``, greedy, for all.

A family that rgtg refuses gets the reason in the table. The last column tells whether the policy reads token trees, or
whole texts for every candidate, which is slower. Exit status 1 if a family fails.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rgtg import GuidedPolicy, load_scorer
from rgtg.config import TrainSettings
from rgtg.decoding.runners.model_runner import supports_token_tree
from rgtg.errors import RgtgError, UsageError
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.models.ops.lm_head import policy_logits, trunk
from rgtg.models.scorers.heads import StateHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.training.train import train_scorer

VOCABULARY, EOS, BETA, TOP_K, NEW_TOKENS = 64, 2, 2.0, 4, 8
PROMPTS = ([10, 21, 32, 13, 24], [40, 51, 12, 33, 14, 25, 16, 37, 18])
LARGEST = 20_000_000  # parameters; a config that the sizes below do not make tiny has more

# Wherever a config has a field of this name, it gets this value.
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "n_mamba_heads", "mamba_expand"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "state_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("dff", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    "moe_shared_expert_intermediate_size": 24,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "index_n_heads"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("mamba_ngroups", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 6),
    "mamba_d_ssm": 64, "index_topk": 4, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": EOS, "is_decoder": True,
}  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_SHARED_KV = {"num_hidden_layers": 4, "num_kv_shared_layers": 2} | {
    "layer_types": ["sliding_attention", "full_attention"] * 2
}
_HYBRID = {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64}
# What single families need beyond that.
OVERRIDES = {
    "bailing_hybrid": _LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "gemma3n": _SHARED_KV,
    "gemma3n_text": _SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": _CONVOLUTION,
    "lfm3": _CONVOLUTION,
    "llama4": {"attention_chunk_size": 8, "num_hidden_layers": 4, "num_experts_per_tok": 1},
    "llama4_text": {"attention_chunk_size": 8, "num_hidden_layers": 4, "num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


@dataclass
class Row:
    """One family's line of the table."""

    family: str
    scorer: str = ""
    guided: str = ""
    rewards: str = ""
    policy: str = ""
    reads: str = ""
    note: str = ""

    @property
    def fails(self):
        """Whether rgtg gives other tokens or rewards than the stock models, or ends in an error that is not its own."""
        return "FAILS" in (self.guided, self.rewards, self.policy)

    @property
    def is_built(self):
        return bool(self.policy)


def families():
    """Names of the model types that transformers lists for causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family, **more):
    """A config of a few thousand parameters; of a multimodal family, that of its language model if it can stand alone.

    Raises:
        Exception: of whatever kind transformers raises, if these sizes do not fit the family.
    """
    default = CONFIG_MAPPING[family]()
    text = default.get_text_config(decoder=True)
    if type(text) not in AutoModelForCausalLM._model_mapping:
        text = default
    aliases = getattr(type(text), "attribute_map", {})
    names = set(vars(text)) | set(aliases)
    given = {name: size for name, size in SIZES.items() if name in names}
    if "qk_rope_head_dim" in names:  # latent attention: one key and value per head
        given["num_key_value_heads"] = given["num_attention_heads"]
        given.pop("head_dim", None)
    for alias, name in aliases.items():
        if name in given:
            given.pop(alias, None)
    if isinstance(vars(text).get("layer_types"), list):
        given["layer_types"] = None
    return type(text)(**(given | OVERRIDES.get(family, {}) | more))


def build(auto_class, family, seed, **more):
    """A tiny random model, in evaluation mode; its distributions are far from flat.

    Raises:
        Exception: as `tiny_config`, or the stock model cannot read a text.
    """
    config = tiny_config(family, **more)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters at these sizes")
    torch.manual_seed(seed)
    model = auto_class.from_config(config).eval().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__ in ("Linear", "Conv1D", "Embedding"):
            module.weight.normal_(0, 0.25)
    logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits
    if not logits.isfinite().all():
        raise ValueError("random weights give no finite logits")
    return model


def tokenizer():
    """Characters: <s> 0, <pad> 1, </s> 2, <unk> 3, then 60 printable ones."""
    characters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:'\n"[: VOCABULARY - 4]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *characters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


# -- the naive loop ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def naive_greedy(policy, prompt, reward=None):
    """Tokens of argmax log π(y_i) + β·r, each candidate's whole text in a stock forward pass of its own."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        log_probs = policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        if reward is None:
            token = int(log_probs.argmax())
        else:
            candidates = log_probs.topk(TOP_K).indices.tolist()
            token = max(candidates, key=lambda one: float(log_probs[one]) + BETA * reward([*ids, one]))
        ids.append(token)
        if token == EOS:
            break
    return ids[len(prompt) :]


def stock_reward(model):
    """The reward of one text by a stock model. Without a padding id it reads the last token, whatever that is."""

    @torch.inference_mode()
    def reward(ids):
        model.config.get_text_config().pad_token_id = None
        return float(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0])

    return reward


def head_reward(policy, head):
    """The score of a head on the stock policy's final state at the last token."""

    @torch.inference_mode()
    def reward(ids):
        return float(head(trunk(policy)(input_ids=torch.tensor([ids]), use_cache=False)[0][0, -1]))

    return reward


# -- one family --------------------------------------------------------------------------------------------------------


def check(family, work):
    """The line of one family; models are saved in the folder ``work``."""
    row = Row(family)
    try:
        policy = build(AutoModelForCausalLM, family, seed=0)
    except Exception as error:
        row.note = f"not built: {shortened(error)}"
        return row
    folder = str(work / "policy")
    try:
        policy.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        check_policy(row, policy, folder)
        if row.policy == "equal":
            check_guided(row, policy, folder, work)
    except Exception as error:
        traceback.print_exc()
        row.guided, row.policy, row.note = "FAILS", row.policy or "FAILS", shortened(error)
    return row


def check_policy(row, policy, folder):
    """Unguided greedy decoding, by name as users do it."""
    try:
        guided = GuidedPolicy.from_pretrained(folder, method="policy")
        found = decode(guided)
    except RgtgError as error:
        row.policy, row.note = "refused", shortened(error).replace(folder, "FOLDER")
        return
    expected = [naive_greedy(policy, prompt) for prompt in PROMPTS]
    row.policy = "equal" if found == expected else "FAILS"
    row.reads = "trees" if supports_token_tree(guided.policy.model, policy_logits) else "whole texts"


def check_guided(row, policy, folder, work):
    """Guided greedy decoding with the best kind of scorer that the family can have."""
    if type(policy.config) in AutoModelForSequenceClassification._model_mapping:
        try:
            rewards = train(row, folder, work)
        except UsageError as error:
            row.note = shortened(error).replace(folder, "FOLDER")
        else:
            row.scorer = "reward model"
            scorer = load_scorer(str(work / "scorer"))
            guided = GuidedPolicy.from_pretrained(folder, scorer, method="pargs-greedy", beta=BETA, top_k=TOP_K)
            return compare(row, policy, guided, rewards)
    else:
        row.note = refusal(folder, work)
    row.scorer = "state head"
    hidden = trunk(policy)(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)[0].shape[-1]
    head = StateHead(hidden, 8)
    for seed, parameter in enumerate(head.parameters()):
        parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    loaded = load_policy(folder)
    about = ScorerInfo(
        rgtg_version="0", objective="prefix-bt", base_model=folder, base_fingerprint="", tokenizer_hash="",
        data_fingerprint="", trunk="own", head="state", layer=loaded.model.config.get_text_config().num_hidden_layers,
    )  # fmt: skip
    try:
        scorer = OwnStateScorer(loaded, head, about)
    except UsageError as error:
        row.scorer, row.note = "none", shortened(error)
        return None
    guided = GuidedPolicy.from_pretrained(loaded, scorer, method="pargs-greedy", beta=BETA, top_k=TOP_K)
    return compare(row, policy, guided, head_reward(policy, head))


def train(row, folder, work):
    """Train a scorer for two steps, load it with stock transformers, and compare rewards; returns the stock reward."""
    pairs = work / "pairs.jsonl"
    draw = random.Random(0)
    rows = [
        {"prompt": "".join(draw.choices("mnop", k=4)) + "? ", "chosen": f"so {a}", "rejected": f"it {b}"}
        for a, b in (("".join(draw.choices(letters, k=5)) for letters in ("abc", "ghi")) for _ in range(8))
    ]
    pairs.write_text("".join(json.dumps(one) + "\n" for one in rows))
    train_scorer(
        TrainSettings(
            pairs=str(pairs), base=folder, output=work / "scorer",
            train={"max_steps": 2, "learning_rate": 1e-2},
        )
    )  # fmt: skip
    stock = AutoModelForSequenceClassification.from_pretrained(work / "scorer", dtype=torch.float32).eval()
    reward = stock_reward(stock)
    texts = [[*prompt, *completion, EOS] for prompt, completion in zip(PROMPTS, ([5, 6, 7], [9, 8]), strict=True)]
    ours = load_scorer(str(work / "scorer")).score_prefixes(
        [text[:3] for text in texts], [text[3:] for text in texts], batch_size=2
    )
    same = all(abs(float(one[-1]) - reward(text)) < 1e-4 for one, text in zip(ours, texts, strict=True))
    row.rewards = "equal" if same else "FAILS"
    return reward


def refusal(folder, work):
    """A note that training a reward model of a family without a class for it is refused with the ways that work."""
    try:
        train(Row(""), folder, work)
    except UsageError as error:
        if "--trunk own" not in str(error):
            raise
        return "no reward model class in transformers"
    raise AssertionError("a reward model was trained without a class for it")


def compare(row, policy, guided, reward):
    found = decode(guided)
    row.guided = "equal" if found == [naive_greedy(policy, prompt, reward) for prompt in PROMPTS] else "FAILS"


def decode(guided):
    """Greedy tokens of the prompts, in one batch."""
    done = guided.generate_ids(list(map(list, PROMPTS)), temperature=0, max_new_tokens=NEW_TOKENS)
    return [one.token_ids for one in done]


def shortened(error, limit=160):
    """An error message on one line of a table."""
    text = " ".join(str(error).split()).replace("|", "/") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 2] + " …"


def table(rows, seconds):
    built = [row for row in rows if row.is_built]
    policies, scorers = Counter(row.policy for row in built), Counter(row.scorer for row in built)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    lines = [
        "# Families",
        "",
        "Greedy tokens of every causal family of transformers compared with a naive loop of stock forward passes, by",
        "`OMP_NUM_THREADS=1 python benchmarks/families.py --output docs/results/families.md`",
        f"({versions}).",
        "",
        f"{len(rows)} names, of which {len(built)} can be built with a tiny config: {policies['equal']} decode the",
        f"same tokens, {policies['refused']} are refused, {sum(row.fails for row in built)} fail. Of these,",
        f"{scorers['reward model']} were steered by a reward model of their own, trained for two steps and loaded in",
        f"stock transformers, and {scorers['state head']} by a state head. The run took {seconds / 60:.0f} minutes.",
        "",
        "| family | policy, greedy | scorer | guided, greedy | rewards in stock transformers | reads | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in built:
        lines.append(
            f"| {row.family} | {row.policy} | {row.scorer} | {row.guided} | {row.rewards} | {row.reads} | {row.note} |"
        )
    lines += ["", "Not built at these sizes:", ""]
    lines += [f"- {row.family}: {row.note.removeprefix('not built: ')}" for row in rows if not row.is_built]
    return "\n".join(lines) + "\n"


def measure(names):
    """Lines of families, in order, each with a folder of its own."""
    for family in names:
        with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield check(family, Path(work))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=families(), metavar="FAMILY")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    began, rows = time.perf_counter(), []
    for row in measure(options.only):
        rows.append(row)
        sys.stderr.write(f"{time.perf_counter() - began:6.1f} {row}\n")
    if options.output:
        options.output.write_text(table(rows, time.perf_counter() - began), encoding="utf-8")
    if failed := [row.family for row in rows if row.fails]:
        sys.exit(f"these families fail: {', '.join(failed)}")


if __name__ == "__main__":
    main()
