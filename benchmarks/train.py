"""Pairs per second of prefix training in one forward pass per pair, compared with one row per prefix.

The published method makes a row of every prefix of every completion. Both methods take a whole optimizer step on the
same pairs with the same loss. The rows of the second are sorted by length, so that they need little padding, in batches
of the size that is fastest for it, with accumulated gradients. Repeats alternate between the two; medians are compared.

    python benchmarks/train.py [--layers 4] [--width 256] [--prompt 128] [--completion 64] [--pairs 1] [--repeats 3]

The states of heads on human pairs are another part: ``python benchmarks/train.py --states``, see benchmarks/states.py.

The last line of stdout is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rgtg.losses import prefix_bradley_terry_loss
from rgtg.tokenization.padding import pad_right
from rgtg.training.objectives import align_pairs
from rgtg.training.trainers.reward import score_every_position

VOCABULARY, PAD = 1024, 0


def make_model(layers: int, width: int) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width, max_position_embeddings=1024, pad_token_id=PAD, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).train()


def make_pairs(count: int, prompt: int, completion: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Pairs whose completions differ from the first token."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    half = VOCABULARY // 2
    return [
        (draw(1, VOCABULARY, prompt), draw(1, half, completion), draw(half, VOCABULARY, completion))
        for _ in range(count)
    ]


def one_pass(model, pairs) -> torch.Tensor:
    """Loss of a step; its gradient is in the model."""
    rows = [p + chosen for p, chosen, _ in pairs] + [p + rejected for p, _, rejected in pairs]
    ids, mask = pad_right(rows, PAD, model.device)
    scores, _ = score_every_position(model, model, ids, mask)
    aligned = align_pairs(scores, ids, mask, torch.tensor([len(p) for p, _, _ in pairs], device=model.device))
    loss = prefix_bradley_terry_loss(
        aligned.chosen, aligned.rejected, aligned.chosen_mask, aligned.rejected_mask, aligned.differs
    )
    loss.backward()
    return loss.detach()


def row_per_prefix(model, pairs, batch: int) -> torch.Tensor:
    """The same loss with each prefix of each completion as a row of its own, ``batch`` prefix pairs at a time."""
    work = [
        (prompt + chosen[:i], prompt + rejected[:i])
        for prompt, chosen, rejected in pairs
        for i in range(1, max(len(chosen), len(rejected)) + 1)
    ]
    work.sort(key=lambda rows: len(rows[0]))
    total = torch.zeros((), device=model.device)
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        ids, mask = pad_right([row for rows in zip(*part, strict=True) for row in rows], PAD, model.device)
        better, worse = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].chunk(2)
        loss = torch.nn.functional.softplus(worse - better).sum() / len(work)
        loss.backward()
        total += loss.detach()
    return total


def timed(model, optimizer, step) -> tuple[float, float]:
    """Seconds of one optimizer step, and its loss."""
    optimizer.zero_grad(set_to_none=True)
    _synchronise(model)
    start = time.perf_counter()
    loss = step()
    optimizer.step()
    _synchronise(model)
    return time.perf_counter() - start, float(loss)


def _synchronise(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 4),
        ("width", 256),
        ("prompt", 128),
        ("completion", 64),
        ("pairs", 1),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--states", nargs=argparse.REMAINDER, help="instead: the options of benchmarks/states.py")
    args = parser.parse_args()
    if args.states is not None:
        import states

        states.main(args.states)
        return

    model = make_model(args.layers, args.width).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # a learning rate of 0 keeps the same weights for both
    pairs = make_pairs(args.pairs, args.prompt, args.completion)

    loss = one_pass(model, pairs)
    ours = gradients(model)
    trials = {}
    for size in (8, 32):
        trials[size], slow_loss = timed(model, optimizer, lambda size=size: row_per_prefix(model, pairs, size))
    theirs = gradients(model)
    gap = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert abs(float(loss) - slow_loss) < 1e-5, (float(loss), slow_loss)
    best = min(trials, key=trials.__getitem__)

    fast, slow = [], []
    for _ in range(args.repeats):
        slow.append(timed(model, optimizer, lambda: row_per_prefix(model, pairs, best))[0])
        fast.append(timed(model, optimizer, lambda: one_pass(model, pairs))[0])
    rates = {
        name: args.pairs / statistics.median(times) for name, times in (("one_pass", fast), ("row_per_prefix", slow))
    }
    ratio = statistics.median(s / f for s, f in zip(slow, fast, strict=True))

    print(
        f"{args.layers} layers x {args.width}, prompt {args.prompt}, completion {args.completion}, {args.device}, fp32"
    )
    print(f"{'':<28}{'pairs/s':>12}{'s per step':>14}")
    for name, times in (("one pass", fast), (f"row per prefix (batch {best})", slow)):
        print(f"{name:<28}{args.pairs / statistics.median(times):>12.2f}{statistics.median(times):>14.3f}")
    print(f"one pass is {ratio:.1f} times as fast; largest difference of a gradient entry {gap:.1e}")
    del args.states
    result = vars(args) | {
        "pairs_per_second": rates, "speedup": ratio, "speedups": [s / f for s, f in zip(slow, fast, strict=True)],
        "twin_batch": best, "loss_difference": abs(float(loss) - slow_loss), "gradient_difference": gap,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
