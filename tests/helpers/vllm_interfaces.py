"""Runs in vLLM's own environment: both interfaces of `Guidance` on made-up batches, and the errors of a start.

python vllm_interfaces.py WORLD RESULT.json — the world has policy/, other/ (another policy), heads kind/ and state/,
and scorers.json.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import torch
from vllm import EngineArgs, SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from rgtg.engines.vllm import Guidance, guided_params
from rgtg.engines.vllm.scorer_file import VARIABLE
from rgtg.engines.vllm.states import LATEST, register, registered

CPU = torch.device("cpu")


def config(policy, **given):
    return EngineArgs(model=str(policy), dtype="float32", enforce_eager=True, **given).create_engine_config()


def step(rows):
    """Logits (B, V) and states (B, H) of a step."""
    generator = torch.Generator().manual_seed(rows)
    LATEST.put(torch.randn(rows, 128, generator=generator))
    return torch.randn(rows, 64, generator=generator)


def context(slots, **given):
    return SimpleNamespace(expanded_idx_mapping=torch.tensor(slots), idx_mapping_np=np.array(slots), **given)


def both_interfaces(world):
    """The same rows, by place in the batch and by slot."""
    made = config(world / "policy")
    first = Guidance(made, CPU, False)
    second = Guidance(made, SimpleNamespace(device=CPU))
    guided = [guided_params("kind", 2.0, top_k=4), SamplingParams(), guided_params("kind", -1.0, method="genarm")]
    added = [(row, params, [0], []) for row, params in enumerate(guided)]
    first.update_state(BatchUpdate(3, [], added, []))
    for slot, params in zip((7, 0, 3), guided, strict=True):
        assert second.add_request(slot, params) == (params.extra_args is not None)
    results = {}

    def compare(name, slots, rows=3):
        logits = step(rows)
        by_place = first.apply(logits.clone())
        step(rows)
        by_slot = second.apply(logits.clone(), context(slots))
        results[name] = bool(torch.equal(by_place, by_slot)) and not torch.equal(by_place, logits)

    compare("entered", [7, 0, 3])
    first.update_state(None)
    compare("nothing changed", [7, 0, 3])
    first.update_state(BatchUpdate(3, [], [], [(0, 1, MoveDirectionality.SWAP)]))
    compare("swapped", [0, 7, 3])
    first.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    compare("left, and the last took its place", [3, 7], rows=2)
    # a slot is used again by an unguided request
    second.add_request(7, SamplingParams())
    logits = step(2)
    changed = second.apply(logits.clone(), context([3, 7]))
    results["a slot that an unguided request takes over"] = bool(
        torch.equal(changed[1], logits[1]) and not torch.equal(changed[0], logits[0])
    )
    first.update_state(BatchUpdate(1, [], [(0, SamplingParams(), [0], [])], []))
    first.update_state(BatchUpdate(1, [1], [], []))
    logits = step(1)
    results["only unguided"] = bool(torch.equal(first.apply(logits.clone()), logits))
    return results


def texts_of_both(world):
    """A scorer that is a model of its own reads the same tokens by either interface, also after a move."""
    made = config(world / "policy")
    tokens = {7: [0, 5, 6, 9], 2: [0, 8]}
    requests = SimpleNamespace(
        device=CPU, all_token_ids=SimpleNamespace(gpu=torch.zeros(9, 32, dtype=torch.long)),
        prefill_len=SimpleNamespace(np=[0] * 9),
    )  # fmt: skip
    first, second = Guidance(made, CPU, False), Guidance(made, requests)
    params = {7: guided_params("reward", 2.0, top_k=4), 2: guided_params(["values", "kind"], [1.0, 1.0])}
    outputs = {slot: [] for slot in tokens}
    first.update_state(BatchUpdate(2, [], [(i, params[s], tokens[s], outputs[s]) for i, s in enumerate(tokens)], []))
    for slot in tokens:
        second.add_request(slot, params[slot])
    order, equal = [7, 2], []
    for token in (11, 12, 13, 14):
        for slot in order:
            text = [*tokens[slot], *outputs[slot]]
            requests.all_token_ids.gpu[slot, : len(text)] = torch.tensor(text)
        positions = torch.tensor([len(tokens[slot]) + len(outputs[slot]) - 1 for slot in order])
        logits = step(2)
        by_place = first.apply(logits.clone())
        step(2)
        by_slot = second.apply(logits.clone(), context(order, pos=positions))
        equal.append(bool(torch.allclose(by_place, by_slot, atol=1e-5)) and not torch.equal(by_place, logits))
        for slot in order:
            outputs[slot].append(token + slot)
        first.update_state(BatchUpdate(2, [], [], [(0, 1, MoveDirectionality.SWAP)]))
        order.reverse()
    # a prompt that is being read in chunks draws nothing
    requests.prefill_len.np[7] = 30
    logits = step(1)
    still = second.apply(logits.clone(), context([7], pos=torch.tensor([5])))
    return [*equal, bool(torch.equal(still, logits))]


def drafts(world):
    """With drafts a request has several rows, and rows are verified a few at a time."""
    made = config(world / "policy")
    made.speculative_config = object()
    os.environ[VARIABLE] = str(world / "heads.json")
    guidance = Guidance(made, SimpleNamespace(device=CPU))
    assert guidance.add_request(2, guided_params("kind", 2.0, top_k=4))
    assert guidance.add_request(5, SamplingParams())  # it must be counted
    slots = [5, 5, 2, 2, 2, 5]
    logits = step(6)
    whole = guidance.apply(logits.clone(), context(slots))
    step(6)
    parts = [
        guidance.apply(logits[part].clone(), context(slots[part])) for part in (slice(0, 2), slice(2, 5), slice(5, 6))
    ]
    unguided = [0, 1, 5]
    return bool(torch.equal(torch.cat(parts), whole) and torch.equal(whole[unguided], logits[unguided]))


def refused(world):
    """What a start says about scorers and engines that do not fit."""
    cases = {
        "a short context": ({"reward": "brief"}, lambda: config(world / "policy")),
        "another tokenizer": ({"reward": "foreign"}, lambda: config(world / "policy")),
        "another policy": ({"kind": "kind"}, lambda: config(world / "other")),
        "a state head": ({"state": "state"}, lambda: config(world / "policy")),
        "adapters": ({"kind": "kind"}, lambda: config(world / "policy", enable_lora=True)),
    }
    messages = {}
    for name, (scorers, made) in cases.items():
        path = world / f"{name.replace(' ', '-')}.json"
        path.write_text(json.dumps({key: str(world / folder) for key, folder in scorers.items()}))
        os.environ[VARIABLE] = str(path)
        try:
            Guidance(made(), CPU, False)
        except ValueError as error:
            messages[name] = str(error)
    del os.environ[VARIABLE]
    try:
        Guidance(config(world / "policy"), CPU, False)
    except ValueError as error:
        messages["no file"] = str(error)
    return messages


def main(world, result_path):
    before = registered()
    register()
    register()  # vLLM may call it twice
    result = {
        "registered": [before, registered()],
        "rows": both_interfaces(world),
        "texts": texts_of_both(world),
        "drafts": drafts(world),
        "refused": refused(world),
    }
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
