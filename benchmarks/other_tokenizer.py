"""What it costs that a scorer has another tokenizer: guidance with one, beside guidance with the policy's own.

    python benchmarks/other_tokenizer.py [--dtypes bf16 fp32] [--rounds 7] [--output FILE]

Policy and scorers are Llama-shaped (12 layers × 768, 32k vocabulary) with random weights, all of one size. There are
three byte-level BPEs: the policy's is trained on posts, with GPT-2's rules for words, the scorers' on old novels, with
those of cl100k, one of as many tokens and one of a quarter. Candidates are of two kinds: ``likely``, words that might
be said (the policy makes its pass, and its logits are then replaced by those of a bigram model of the posts), and
``random``, the policy's own: ten tokens of a random model, whose pieces of words are seldom tokens of the other kind,
the worst case. All ways decode in turn, round after round; figures are medians, ratios are medians of paired ratios.
The last line is one JSON object.
"""

import argparse
import json
import lzma
import statistics
import sys
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from decode import batch_of
from rgtg.decoding.runners.base import PolicyState
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.policy_runner import TorchPolicyRunner
from rgtg.decoding.runners.scorer_runner import SeparateScorerRunner
from rgtg.decoding.runners.text_scorer_runner import CachedTextScorerRunner
from rgtg.evaluation.benchmark import seconds_per_token
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.lm_head import policy_logits, scorer_scores
from rgtg.models.ops.packed_linear import pack_linears
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer

DATA = Path(__file__).parents[2] / "shared" / "data"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNGUIDED, SAME, OTHER = "unguided", "scorer with the policy's tokenizer", "scorer with another tokenizer"
SMALLER = "scorer with another tokenizer, of a quarter of the tokens"
SAME_AS_TEXT = "scorer with the policy's tokenizer, read as text"


def byte_level(texts, splitter, size):
    """A byte-level BPE trained on texts."""
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(splitter), "isolated") if splitter else None
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter is None)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, plain]) if split else plain
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", clean_up_tokenization_spaces=False)


class Bigrams:
    """Next-token log-probabilities of a bigram model, mixed with the unigram's, on rows of the newest tokens."""

    def __init__(self, ids, size, device):
        counts, pairs = Counter(), defaultdict(Counter)
        for mine in ids:
            counts.update(mine)
            for a, b in pairwise(mine):
                pairs[a][b] += 1
        self.device = device
        alone = torch.full((size,), 1e-3)
        alone[list(counts)] = torch.tensor([float(n) for n in counts.values()])
        self.alone = alone / alone.sum()
        self.pairs = {
            a: (torch.tensor(list(b)), torch.tensor([float(n) for n in b.values()])) for a, b in pairs.items()
        }

    def __call__(self, newest):
        rows = 0.1 * self.alone.repeat(len(newest), 1)
        for row, token in zip(rows, newest, strict=True):
            if token in self.pairs:
                ids, counts = self.pairs[token]
                row[ids] += 0.9 * counts / counts.sum()
        return rows.log().to(self.device)


class BigramPolicy(TorchPolicyRunner):
    """A policy that makes its pass over each token, and then says what a bigram model says."""

    def __init__(self, runner, bigrams):
        super().__init__(runner)
        self.bigrams = bigrams

    def prefill(self, prompts):
        super().prefill(prompts)
        return PolicyState(self.bigrams([prompt[-1] for prompt in prompts]), None)

    def step(self, tokens):
        super().step(tokens)
        return PolicyState(self.bigrams(tokens[:, 0].tolist()), None)


class TimedScorer(CachedTextScorerRunner):
    """Counts the nodes that the scorer reads and the time that the text takes."""

    seconds = nodes = steps = 0

    def _set_candidates(self, candidate_ids):
        start = time.perf_counter()
        super()._set_candidates(candidate_ids)
        self.seconds += time.perf_counter() - start
        self.steps += 1

    def _pass(self, read):
        self.nodes += sum(len(branches.tokens) for branches, _ in read)
        return super()._pass(read)


class Bench:
    """Models of one dtype, and the ways to join them."""

    def __init__(self, args, dtype, tokenizers, prompts, bigrams):
        self.args, self.prompts, self.bigrams = args, prompts, bigrams
        self.tokenizers = dict(zip((SAME_AS_TEXT, OTHER, SMALLER), tokenizers, strict=True))
        self.policy = Policy(self._model(dtype, LlamaForCausalLM, 0), self.tokenizers[SAME_AS_TEXT])
        self.scorer = self._model(dtype, LlamaForSequenceClassification, 1)
        self.counts = defaultdict(list)

    def _model(self, dtype, head, seed):
        args = self.args
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
            num_key_value_heads=args.width // 64, intermediate_size=args.width * 8 // 3, vocab_size=args.vocab,
            max_position_embeddings=8192, num_labels=1, pad_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device(args.device):
            model = head(config).to(DTYPES[dtype]).eval().requires_grad_(False)
        return pack_linears(model) if args.pack else model

    def runners(self, way, kind):
        """The policy's runner and the scorer's (None without one), with caches of their own."""
        room = self.args.prompt + self.args.tokens + 8
        runner = TreeRunner(self.policy.model, policy_logits, room)
        policy = BigramPolicy(runner, self.bigrams) if kind == "likely" else TorchPolicyRunner(runner)
        if way == UNGUIDED:
            return policy, None
        scorer = TreeRunner(self.scorer, scorer_scores, 2 * room)
        if way == SAME:
            return policy, SeparateScorerRunner(scorer)
        text_scorer = CrossTokenizerScorer(PrefixScorer(self.scorer, self.tokenizers[way]))
        return policy, TimedScorer(text_scorer, self.policy, set(), runner=scorer)

    def run(self, way, kind, batch):
        """Seconds per step."""
        args = self.args
        policy, scorer = self.runners(way, kind)
        scorers = {} if scorer is None else {"scorer": scorer}
        running = batch_of(policy, scorers, self.prompts[:batch], k=args.top_k, tokens=args.tokens)
        took = seconds_per_token(running, args.tokens)
        if isinstance(scorer, TimedScorer):
            candidates = sum(request.candidates for request in running.requests)
            self.counts[way, kind, batch].append(
                {
                    "nodes_per_candidate": scorer.nodes / candidates,
                    "retokenised": sum(request.retokenised for request in running.requests) / candidates,
                    "text_ms_per_step": 1e3 * scorer.seconds / scorer.steps,
                }
            )
        return took


def measure(args, bench, kind, batch):
    """Every way in turn, round after round; the first round warms up."""
    ways = [UNGUIDED, SAME, OTHER, SMALLER, SAME_AS_TEXT]
    seconds = {way: [] for way in ways}
    for turn in range(args.rounds + 1):
        for way in ways[turn % 5 :] + ways[: turn % 5]:
            took = bench.run(way, kind, batch)
            if turn:
                seconds[way].append(took)
        print(f"  {kind}, batch {batch}: round {turn} done", file=sys.stderr, flush=True)
    rows = {}
    for way, took in seconds.items():
        ratios = sorted(t / s for t, s in zip(took, seconds[SAME], strict=True))
        rows[way] = {
            "ms_per_step": round(1e3 * statistics.median(took), 2),
            "times_same_tokenizer": round(statistics.median(ratios), 3),
            "worst_round": round(ratios[-1], 3),
        }
        counted = bench.counts[way, kind, batch]
        for name in counted[0] if counted else ():
            rows[way][name] = round(statistics.median(each[name] for each in counted), 3)
    return rows


def show(title, rows):
    table = Table(title=title)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in ("way", *names):
        table.add_column(name.replace("_", " "), justify="left" if name == "way" else "right")
    for way, row in rows.items():
        table.add_row(way, *(str(row.get(name, "")) for name in names))
    Console(stderr=True).print(table)


def texts_of(name, field, limit):
    """Texts of a file of real ones, in its order."""
    path = DATA / name
    if not path.is_file():
        sys.exit(f"no {path}: this benchmark needs real text to train tokenizers on")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)[field] for line, _ in zip(file, range(limit), strict=False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--candidates", nargs="+", choices=["likely", "random"], default=["likely", "random"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--pack", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    for name, value in {
        "layers": 12, "width": 768, "vocab": 32000, "prompt": 128, "top-k": 10, "tokens": 64, "rounds": 7,
        "posts": 8000, "novels": 20,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    posts = texts_of("tldr/reddit_tldr.jsonl.xz", "post", args.posts)
    novels = texts_of("text/litbank_novels.jsonl.xz", "text", args.novels)
    tokenizers = [
        byte_level(posts, None, args.vocab),
        byte_level(novels, CL100K, args.vocab),
        byte_level(novels, CL100K, args.vocab // 4),
    ]
    ids = tokenizers[0](posts, verbose=False).input_ids
    prompts = [mine[: args.prompt] for mine in ids if len(mine) >= args.prompt][: max(args.batches)]
    bigrams = Bigrams(ids, args.vocab, args.device)
    results = {}
    for dtype in args.dtypes:
        bench = Bench(args, dtype, tokenizers, prompts, bigrams)
        results[dtype] = {kind: {} for kind in args.candidates}
        for kind in args.candidates:
            for batch in args.batches:
                results[dtype][kind][f"batch {batch}"] = rows = measure(args, bench, kind, batch)
                title = f"{dtype}, {kind} candidates, batch {batch}: prompt {args.prompt}, {args.tokens} tokens"
                show(f"{title}, k = {args.top_k}", rows)
                if args.output:  # after every part: a run that is stopped keeps what it has
                    args.output.write_text(json.dumps(record_of(args, results), indent=1) + "\n")
    print(json.dumps(record_of(args, results)))


def record_of(args, results):
    settings = vars(args) | {"output": args.output and args.output.name}
    return {"benchmark": "other-tokenizer", "settings": settings, "torch": torch.__version__, "results": results}


if __name__ == "__main__":
    main()
