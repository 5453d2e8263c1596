"""The folders and files that the documentation's examples use: tiny models with random weights, and a few rows."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import rgtg
from helpers import made_report
from helpers.gguf_files import write_gguf
from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import VOCAB, tiny_tokenizer
from rgtg.models.loading.scorer_info import ScorerInfo, cast_fingerprints, fingerprint_weights
from rgtg.models.scorers.heads import VocabularyHead, round_to_half
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.training.checkpoint.save import save_scorer
from rgtg.training.report import model_card

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = ["Once upon a time", "The dog", "One day"]
OBJECTIVES = {
    "scorer": "prefix-bt", "full-scorer": "full-bt", "reward": "full-bt", "held-out-reward": "full-bt",
    "proxy": "full-bt", "value-scorer": "value", "helpful": "prefix-bt", "short": "prefix-bt", "a": "prefix-bt",
    "b": "prefix-bt",
}  # fmt: skip
COUNTS = {"pairs": 24, "rollouts": 0, "eval_pairs": 8}


def build(folder):
    """Write everything into an empty folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.model_max_length = 1024
    for seed, name in enumerate(("policy", "dpo-policy")):
        _model(AutoModelForCausalLM, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for seed, (name, objective) in enumerate(OBJECTIVES.items(), 10):
        info = _info(tokenizer, objective=objective)
        card = model_card(folder / name, info, {}, {}, COUNTS)
        model = _model(AutoModelForSequenceClassification, 10 if name == "reward" else seed)
        if name == "reward":  # the scorer's model with a rescaled head, so that guidance raises this reward
            model.score.weight *= 4
        save_scorer(folder / name, model, tokenizer, info, card)
    _head(folder, tokenizer)
    write_gguf(folder / "model.gguf")
    _rows(folder)


def results(folder):
    """Write results of a comparison, of a judge and of audits, as the other commands write them."""
    written = {
        "comparison/results.json": made_report.steered(),
        "judged/judge.json": made_report.judged(("policy", "pargs β=2", 0.2)),
        "audit/audit.json": made_report.audit(),
        "audit/rollout-audit.json": made_report.rollout_audit(),
        "full-audit/audit.json": made_report.audit(),
    }
    for name, record in written.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(record.model_dump_json())


def _model(kind, seed):
    torch.manual_seed(seed)
    model = kind.from_config(
        LlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB,
            max_position_embeddings=1024, num_labels=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
            initializer_range=0.3,
        )
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def _info(tokenizer, **about):
    values = {"base_fingerprint": "0" * 16, "data_fingerprint": "0" * 16, "base_model": "policy"} | about
    return ScorerInfo(rgtg_version=rgtg.__version__, tokenizer_hash=tokenizer_hash(tokenizer), **values)


def _head(folder, tokenizer):
    policy = _model(AutoModelForCausalLM, 0)
    head = VocabularyHead(16, 8, 4, VOCAB)
    round_to_half(head)
    info = _info(
        tokenizer, objective="prefix-bt", trunk="own", head="vocab", layer=1, width=8, rank=4,
        base_fingerprint=fingerprint_weights(policy), base_casts=cast_fingerprints(policy),
    )  # fmt: skip
    save_scorer(folder / "head", head, tokenizer, info, model_card(folder, info, {}, {}, COUNTS), settings={})


def _rows(folder):
    write_rows(folder / "pairs.jsonl", synthetic_rows(24))
    write_rows(folder / "held-out.jsonl", synthetic_rows(24, seed=1))
    for name in ("prompts.jsonl", "tuning.jsonl"):
        write_rows(folder / name, [{"prompt": prompt} for prompt in PROMPTS])
    for name, text in (("guided", " well"), ("unguided", " ill"), ("ours", " well"), ("theirs", " ill")):
        write_rows(folder / f"{name}.jsonl", [{"prompt": p, "text": text, "finish_reason": "stop"} for p in PROMPTS])
    labelled = [{"prompt": p, "text": text, "good": text != " it"} for p in PROMPTS for text in (" it is", " a", " it")]
    write_rows(folder / "labelled.jsonl", labelled * (40 // len(labelled) + 1))
    write_rows(folder / "completions.jsonl", [{"prompt": p, "text": " it is", "reward": 1.0} for p in PROMPTS])
    (folder / "my-prompt.txt").write_text("{prompt}\n{first}\n{second}\n")
    (folder / "compare.yaml").write_text(
        "policy: policy\nprompts: prompts.jsonl\nreward: reward\noutput: compared\nmax_new_tokens: 8\n"
        "methods:\n  - {method: policy}\n  - {method: pargs, scorer: scorer, beta: 2}\n"
    )
