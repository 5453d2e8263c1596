"""Whether one head steers alike in every engine: rewards and KL of the same prompts, with intervals.

    OMP_NUM_THREADS=1 python benchmarks/engines_agree.py --policy MODEL.gguf --folder CONVERTED --pairs PAIRS.jsonl
        --work FOLDER [--vllm-python PYTHON] [--engines ENGINE …] [--other-head] [--output FILE]

The policy is a GGUF file, quantised as it is in llama.cpp, and its weights dequantised in a folder. The pairs are chats
(``prompt``, ``chosen`` and ``rejected`` as messages). The first ones train a vocabulary head on the final states of the
folder's weights; the next ones train the judge, a head that scores whole texts and that no engine steers by; prompts of
the rest are completed in every engine: unguided (β = 0), sampled and greedy. vLLM runs in an environment of its own.

torch then reads all completions in fp32. Their rewards are the steering head's and the judge's at the last token, and
VADER's compound score of the text. Three estimates of the KL of each completion, in nats:

- reported: Σ log π̃(y) − log π(y) over the drawn tokens, by the engine's own figures;
- of the draw: Σ log π̃(y) of the engine − log π(y) in fp32, so that an engine's own error counts;
- expected: Σ over the steps of KL(π̃ ‖ π) in fp32 with the same head, for the prefixes that the engine drew.

Paired differences are those to torch in fp32 with the same prompts. Engines that share a seed draw alike until their
numbers differ; vLLM draws otherwise. With ``--other-head``, the same pairs train a second head on the states that
llama.cpp gives, and both steer llama.cpp at several β; ``--engines llama.cpp`` measures nothing else. Heads and
completions are kept in ``--work``, so that a stopped run goes on.
"""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

TOP_K = 10
REFERENCE, LLAMA = "torch fp32", "llama.cpp"
ENGINES = (REFERENCE, "torch bf16", LLAMA, "vLLM bf16")
GUIDED = {"unguided": (0.0, 1.0), "sampled": (None, 1.0), "greedy": (None, 0.0)}  # β (None: --beta), temperature
HEAD, OTHER, JUDGE = "head", "head-llama-cpp", "judge"
FIGURES = ("reward", "judge", "vader", "kl_reported", "kl_of_draw", "kl_expected", "tokens")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, type=Path, help="GGUF file")
    parser.add_argument("--folder", required=True, type=Path, help="the same weights dequantised to bf16")
    parser.add_argument("--pairs", required=True, type=Path, help="JSONL of chats: prompt, chosen, rejected")
    parser.add_argument("--work", required=True, type=Path, help="heads and completions are kept here")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vLLM and rgtg")
    parser.add_argument("--train", type=int, default=1000, help="pairs that train the head")
    parser.add_argument("--judge", type=int, default=500, help="pairs that train the judge")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--longest", type=int, default=96, help="tokens of a prompt, at most")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--beta", type=float, default=2.0)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all that are there")
    parser.add_argument("--other-head", action="store_true", help="compare a head trained on llama.cpp's states")
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="of that comparison")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--decode", help=argparse.SUPPRESS)  # an engine, in a process of its own
    return parser.parse_args()


# -- data and heads ------------------------------------------------------------------------------------------------


def prepare(args):
    """Split the pairs, and choose prompts that no head has read."""
    args.work.mkdir(parents=True, exist_ok=True)
    lines = args.pairs.read_text(encoding="utf-8").splitlines()
    cut = args.train + args.judge
    for name, part in ((HEAD, lines[: args.train]), (JUDGE, lines[args.train : cut])):
        (args.work / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    known = {json.dumps(json.loads(line)["prompt"]) for line in lines[:cut]}
    prompts = []
    for line in lines[cut:]:
        chat = json.loads(line)["prompt"]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) <= args.longest and json.dumps(chat) not in known:
            known.add(json.dumps(chat))
            prompts.append(chat)
    if len(prompts) < args.prompts:
        raise SystemExit(f"{args.pairs}: {len(prompts)} unseen prompts of at most {args.longest} tokens are left")
    (args.work / "prompts.json").write_text(json.dumps(prompts[: args.prompts]), encoding="utf-8")


def train(args, name, pairs, base, **settings):
    """A head in the work folder, trained once; returns its figures on held-out pairs."""
    from rgtg.config import TrainSettings
    from rgtg.training.train import train_scorer

    output = args.work / name
    if not (output / "rgtg.json").exists():
        train_scorer(
            TrainSettings(
                pairs=str(args.work / f"{pairs}.jsonl"), base=str(base), output=output, trunk="own", layer="final",
                max_length=384, on_bad="skip", **settings,
            )
        )  # fmt: skip
    return json.loads((output / "train-report.json").read_text(encoding="utf-8"))


# -- decoding: one process for each engine -------------------------------------------------------------------------


def runs_of(args, engine):
    """(head, name of the run, β, temperature) of everything that an engine decodes."""
    runs = []
    if REFERENCE in args.engines:
        runs = [
            (HEAD, name, args.beta if beta is None else beta, temperature)
            for name, (beta, temperature) in GUIDED.items()
        ]
    if args.other_head and engine == LLAMA:
        runs += [(head, f"β={b:g}", b, 1.0) for head in (HEAD, OTHER) for b in args.betas]
        if REFERENCE not in args.engines:  # else the unguided run
            runs.append((HEAD, "β=0", 0.0, 1.0))
    return runs


def completions_file(args, engine, head, name):
    return args.work / f"{engine} {head} {name}.jsonl".replace(" ", "_")


def make_guided(args, engine, head):
    """The head on the policy in one engine, and how many prompts it decodes at once."""
    head = str(args.work / head)
    if engine == "vLLM bf16":
        from rgtg.engines.vllm.guided_policy import VllmGuidedPolicy

        return VllmGuidedPolicy(str(args.folder), head, top_k=TOP_K, dtype="bfloat16", max_model_len=1024), 200
    from rgtg import GuidedPolicy

    if engine == LLAMA:
        return GuidedPolicy.from_pretrained(str(args.policy), head, top_k=TOP_K, engine="llama-cpp"), 16
    dtype = "float32" if engine == REFERENCE else "bfloat16"
    return GuidedPolicy.from_pretrained(str(args.folder), head, top_k=TOP_K, dtype=dtype), 16


def decode(args):
    """Everything that one engine decodes and that is not there yet."""
    warnings.simplefilter("ignore")
    prompts = json.loads((args.work / "prompts.json").read_text(encoding="utf-8"))
    guided, loaded = None, None
    for head, name, beta, temperature in runs_of(args, args.decode):
        file = completions_file(args, args.decode, head, name)
        if file.exists():
            continue
        if loaded != head:
            (guided, at_once), loaded = make_guided(args, args.decode, head), head
        done = guided.generate(
            prompts, seed=0, beta=beta, temperature=temperature, max_new_tokens=args.tokens, batch_size=at_once
        )
        file.write_text("".join(one.model_dump_json() + "\n" for one in done), encoding="utf-8")
        print(f"{args.decode} {head} {name}: {len(done)} completions", file=sys.stderr, flush=True)


def decode_everywhere(args, engines):
    for engine in engines:
        python = str(args.vllm_python) if engine.startswith("vLLM") else sys.executable
        subprocess.run([python, *sys.argv, "--decode", engine], check=True)


# -- judging, by torch in fp32 -------------------------------------------------------------------------------------


class Reader:
    """The policy in fp32, and heads on its final states."""

    def __init__(self, args, heads):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        from rgtg.models.loading.policy import load_policy
        from rgtg.models.scorers.head_file import read_info
        from rgtg.models.scorers.heads import load_head

        self.policy = load_policy(str(args.folder), dtype="float32")
        self.heads = {name: load_head(args.work / name, read_info(str(args.work / name))) for name in heads}
        self.vader = SentimentIntensityAnalyzer()

    @torch.inference_mode()
    def read(self, prompt_ids, rows):
        """Figures of completions of one prompt, which is read once.

        Args:
            prompt_ids: of the prompt.
            rows: (tokens, head, β) of each completion.

        Returns:
            For each: rewards of the steering head and of the judge, log π of its tokens, expected KL, and whether
            each token is among the k candidates.
        """
        from rgtg.decoding.sampling import guided_log_probs, propose, step_kl

        model = self.policy.model
        # 1. final states: at the prompt's last token, and at all tokens of the completions
        first = model.model(torch.tensor([prompt_ids]), use_cache=True)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(rows))
        longest = max(len(tokens) for tokens, _, _ in rows)
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens, _, _ in rows])
        after = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state  # (N, T, H)
        states = torch.cat([first.last_hidden_state[:, -1:].expand(len(rows), -1, -1), after], 1)
        # 2. figures of each completion
        found = []
        for row, (tokens, name, beta) in enumerate(rows):
            drawn, before = torch.tensor(tokens), states[row, : len(tokens)]  # (T,), (T, H)
            log_probs = torch.log_softmax(model.lm_head(before), -1)
            candidates, own = propose(log_probs, top_k=TOP_K, vocabulary=self.policy.vocabulary)
            scores = self.heads[name](before, candidates)
            found.append({
                "reward": float(self.heads[name](before[-1:], drawn[-1:, None])),
                "judge": float(self.heads[JUDGE](states[row, len(tokens)])),
                "log_prob": float(log_probs.gather(1, drawn[:, None]).double().sum()),
                "kl_expected": float(step_kl(guided_log_probs(own, scores, beta), own).sum()),
                "outside": float((candidates != drawn[:, None]).all(1).double().mean()),
            })  # fmt: skip
        return found


def judge(args, sets):
    """Figures (FIGURES and ``outside``, ``same``) of each completion of each set, by (engine, head, run)."""
    from rgtg.tokenization.conversation import encode_source

    read = {}
    for key in sets:
        file = completions_file(args, *key[:3])
        read[key] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reader = Reader(args, [HEAD, JUDGE, *([OTHER] if args.other_head else [])])
    figures = {key: [] for key in sets}
    for i in range(args.prompts):
        prompt = next(iter(read.values()))[i]["messages"]
        prompt_ids = encode_source(reader.policy.tokenizer, prompt)[1]
        rows = [(read[key][i]["token_ids"], key[1], key[3]) for key in sets]
        for key, found in zip(sets, reader.read(prompt_ids, rows), strict=True):
            made = read[key][i]
            log_prob = found.pop("log_prob")
            figures[key].append(found | {
                "vader": reader.vader.polarity_scores(made["text"])["compound"],
                "kl_reported": made["guided_log_prob"] - made["policy_log_prob"],
                "kl_of_draw": made["guided_log_prob"] - log_prob,
                "tokens": len(made["token_ids"]),
                "token_ids": made["token_ids"],
            })  # fmt: skip
    return figures


def summary(rows, reference=None):
    """Means with intervals, and those of the paired differences to a reference."""
    from rgtg.evaluation.metrics import bootstrap_interval, paired_difference

    def numbers(interval):
        return [round(value, 4) for value in (interval.mean, interval.low, interval.high)]

    made = {name: numbers(bootstrap_interval([row[name] for row in rows])) for name in FIGURES}
    made["outside_candidates"] = round(sum(row["outside"] for row in rows) / len(rows), 5)
    if reference is not None:
        made["difference"] = {
            name: numbers(paired_difference([row[name] for row in rows], [row[name] for row in reference]))
            for name in FIGURES
        }
        made["same_tokens"] = sum(a["token_ids"] == b["token_ids"] for a, b in zip(rows, reference, strict=True)) / len(
            rows
        )
        made["agrees"] = {name: low <= 0 <= high for name, (_, low, high) in made["difference"].items()}
    return made


def main():
    args = arguments()
    args.engines = args.engines or [name for name in ENGINES if args.vllm_python or not name.startswith("vLLM")]
    if args.decode:
        decode(args)
        return
    torch.set_num_threads(1)
    if not (args.work / "prompts.json").exists():
        prepare(args)
    trained = {
        HEAD: train(args, HEAD, HEAD, args.folder, head="vocab"),
        JUDGE: train(args, JUDGE, JUDGE, args.folder, head="state", objective="full-bt"),
    }
    if args.other_head:
        trained[OTHER] = train(args, OTHER, HEAD, args.policy, head="vocab", engine="llama-cpp")
    decode_everywhere(args, args.engines)
    sets = [(engine, head, name, beta) for engine in args.engines for head, name, beta, _ in runs_of(args, engine)]
    figures = judge(args, sets)
    agreement = {
        name: {
            engine: summary(figures[key], None if engine == REFERENCE else figures[(REFERENCE, *key[1:])])
            for engine in args.engines
            for key in sets
            if key[0] == engine and key[2] == name
        }
        for name in GUIDED
        if REFERENCE in args.engines
    }
    steering = {
        head: {name: summary(figures[key]) for key in sets if key[1] == head and (name := key[2]).startswith("β")}
        for head in ((HEAD, OTHER) if args.other_head else ())
    }
    from rgtg.evaluation.provenance import provenance
    from rgtg.models.loading.policy import load_policy
    from rgtg.utils.files import file_checksum

    origin = provenance(
        command="python benchmarks/engines_agree.py", seed=0,
        settings={name: value for name, value in vars(args).items() if name not in ("decode", "output", "work")},
        models={"policy": load_policy(str(args.folder)).model},
        data={"pairs": file_checksum(args.pairs).sha256[:16]},
    )  # fmt: skip
    kept = ("objective", "pairs", "eval_pairs", "width", "evaluation")
    heads = {name: {field: one["report"][field] for field in kept} for name, one in trained.items()}
    report = {"agreement": agreement, "steering_llama_cpp": steering, "heads": heads,
              "provenance": origin.model_dump(mode="json")}  # fmt: skip
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    for name, rows in agreement.items():
        for engine, row in rows.items():
            shown = {k: row[k] for k in ("reward", "judge", "vader", "kl_reported", "kl_of_draw", "kl_expected")}
            print(name, engine, json.dumps(shown), json.dumps(row.get("agrees", {})))
    print(json.dumps(steering))


if __name__ == "__main__":
    main()
