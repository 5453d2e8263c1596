"""Fine-tuned baselines through TRL on the pairs that the scorers see: SFT, DPO and RLOO (TRL 1.16 has no PPO).

    python benchmarks/baselines.py --kind dpo --policy FOLDER --pairs pairs.jsonl --output FOLDER [--set beta=0.3]
    python benchmarks/baselines.py --kind rloo --policy FOLDER --pairs pairs.jsonl --scorer FULL_BT --output FOLDER

Each writes a stock model folder and baseline.json: pairs, epochs, the policy's samples, seconds. RLOO's reward is a
full-sequence scorer trained on the same pairs, never the reward that judges. ``--set lora=16`` trains a LoRA adapter of
that rank in place of all weights, and saves the merged model. In TRL ``beta`` is the KL coefficient: the
inverse of guidance's. TRL closes every chosen and rejected text with EOS, as ``rgtg train`` does.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
import yaml
from datasets import Dataset

from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.reward_model import PrefixScorer

COMMON = {
    "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "logging_steps": 20,
    "bf16": False, "use_cpu": True, "warmup_steps": 0.05, "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}  # fmt: skip
DEFAULTS = {
    "sft": {"learning_rate": 3e-4, "num_train_epochs": 2, "per_device_train_batch_size": 32, "max_length": 256},
    "dpo": {"learning_rate": 3e-4, "num_train_epochs": 2, "per_device_train_batch_size": 32, "max_length": 256,
            "beta": 0.1, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 64},
    "rloo": {"learning_rate": 1e-3, "max_steps": 30, "per_device_train_batch_size": 64, "num_generations": 4,
             "max_completion_length": 64, "beta": 0.05},
}  # fmt: skip


def tune(kind, policy, pairs, output, *, seed, scorer=None, **settings):
    """Fine-tune a copy of the policy with one of TRL's trainers; returns and writes what it cost."""
    torch.manual_seed(seed)
    loaded = load_policy(str(policy), dtype="float32", device="cpu")
    model, tokenizer = loaded.model.requires_grad_(True), loaded.tokenizer
    values = DEFAULTS[kind] | settings
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = COMMON | values | {"output_dir": scratch, "seed": seed}
        rank = given.pop("lora", None)
        trainer = MAKERS[kind](model, tokenizer, pairs, given, scorer, lora(rank) if rank else None)
        done = trainer.train()
        trained = trainer.model.merge_and_unload() if rank else trainer.model
        trained.save_pretrained(output)
    tokenizer.save_pretrained(output)
    steps, batch = done.global_step, values["per_device_train_batch_size"]
    facts = {
        "kind": kind, "pairs": len(pairs), "settings": values, "seed": seed, "steps": steps,
        "epochs": round(trainer.state.epoch or 0.0, 3), "policy_samples": steps * batch if kind == "rloo" else 0,
        "loss": done.training_loss, "seconds": round(time.perf_counter() - start, 1),
        "reward": "full-bt scorer of the same pairs" if scorer else None,
    }  # fmt: skip
    (Path(output) / "baseline.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def lora(rank):
    """A LoRA adapter on every linear layer (arXiv 2106.09685), merged into the weights after training."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def sft(model, tokenizer, pairs, given, scorer, adapter):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs])
    trainer = SFTTrainer(
        model, args=SFTConfig(**given), train_dataset=rows, processing_class=tokenizer, peft_config=adapter
    )
    return trainer


def dpo(model, tokenizer, pairs, given, scorer, adapter):
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs])
    trainer = DPOTrainer(
        model, args=DPOConfig(**given), train_dataset=rows, processing_class=tokenizer, peft_config=adapter
    )
    return trainer


def rloo(model, tokenizer, pairs, given, scorer, adapter):
    from trl import RLOOConfig, RLOOTrainer

    judge = PrefixScorer.from_pretrained(str(scorer), dtype="float32", device="cpu")

    def reward(prompts, completions, completion_ids, **_):
        finished = [ids[-1:] == [tokenizer.eos_token_id] for ids in completion_ids]
        texts = [text if text.strip() else " ." for text in completions]  # an empty text has no score of its own
        return judge.score(prompts, texts, finished=finished, batch_size=64)

    rows = Dataset.from_list([{"prompt": p} for p in dict.fromkeys(p["prompt"] for p in pairs)])
    trainer = RLOOTrainer(
        model,
        reward_funcs=reward,
        args=RLOOConfig(**given),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    return trainer


MAKERS = {"sft": sft, "dpo": dpo, "rloo": rloo}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(MAKERS), required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--scorer", type=Path, help="the reward of rloo: a full-bt scorer of the same pairs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of TRL's config")
    args = parser.parse_args()
    if (args.kind == "rloo") != (args.scorer is not None):
        parser.error("--scorer belongs to --kind rloo, which needs it")
    pairs = [json.loads(line) for line in args.pairs.read_text().splitlines()]
    settings = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in args.set)}
    print(json.dumps(tune(args.kind, args.policy, pairs, args.output, seed=args.seed, scorer=args.scorer, **settings)))


if __name__ == "__main__":
    main()
