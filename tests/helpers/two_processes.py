"""What tests run in two processes that talk through gloo: started once by a launcher, since starting costs most.

Each part leaves files in the working folder, which tests compare with what one process gives.
"""

import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers.tiny_models import tiny_reward_model
from rgtg.cli.common import hush_libraries
from rgtg.config import TrainSettings
from rgtg.errors import StoppedError
from rgtg.losses import mean_of_counted
from rgtg.training.data.dataset import PrefixCollator
from rgtg.training.objectives import align_pairs, pair_losses
from rgtg.training.report import TrainLog
from rgtg.training.train import train_scorer
from rgtg.training.trainers.resumable import ResumableTrainer
from rgtg.training.trainers.reward import score_every_position

TRAIN = {"max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True}
SHARDED = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
ROWS = [
    {"chosen_ids": [5, 6, 20, 21, 2], "rejected_ids": [5, 6, 22, 2], "prompt_length": 2},
    {"chosen_ids": [5, 30, 2], "rejected_ids": [5, 31, 2], "prompt_length": 1},
    {"chosen_ids": [7, 8, 9, 2], "rejected_ids": [7, 8, 2], "prompt_length": 1},
    {"chosen_ids": [7, 40, 41, 2], "rejected_ids": [7, 42, 2], "prompt_length": 1},
]


def settings(output, size, **changes):
    """The run of ``output``; ``size`` pairs for each process make eight in all."""
    train = TRAIN | {"per_device_train_batch_size": size} | changes.pop("train", {})
    values = {"pairs": "pairs.jsonl", "base": "policy", "output": output, "eval_fraction": 0.3, "train": train}
    return TrainSettings(**(values | changes))


STOPPED = {"resume": True, "train": {"max_steps": 4, "logging_steps": 4}}  # the last batch of an epoch is half full


def replicated():
    """DDP: two objectives; and a run that one of the processes is asked to stop, against one that is not."""
    for objective in ("prefix-bt", "farma"):
        train_scorer(settings(f"two-{objective}", 4, objective=objective))
    train_scorer(settings("two-whole", 4, **STOPPED))
    stop_at_second_step(settings("two-stopped", 4, **STOPPED))


def stop_at_second_step(run):
    real = ResumableTrainer.training_step

    def ask(self, *args, **named):
        self.request.asked = self.state.global_step == 1 and self.args.process_index == 1
        return real(self, *args, **named)

    ResumableTrainer.training_step = ask
    with suppress(StoppedError):
        train_scorer(run)
        raise AssertionError("not stopped")
    ResumableTrainer.training_step = real
    assert train_scorer(run).resumed_from.endswith("checkpoint-2")


def sharded():
    """FSDP2, as ``accelerate launch --use_fsdp`` asks for it; on CPUs accelerate has to be told that it can."""
    import os

    real = PartialState.__init__

    def believe(self, *args, **named):
        real(self, *args, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    seen = set()
    begin = TrainLog.on_train_begin

    def look(self, args, state, control, model=None, **named):
        seen.update(type(parameter) for parameter in model.parameters())
        begin(self, args, state, control, **named)

    os.environ |= SHARDED
    PartialState.__init__, TrainLog.on_train_begin = believe, look
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train_scorer(settings("sharded", 4))
    assert seen == {DTensor}
    train_scorer(settings("sharded-lora", 4, lora={"r": 4}))
    stop_at_second_step(settings("sharded-stopped", 4, resume=True))


def reward_loss(model, rows):
    """The prefix loss of rows, as the trainer computes it."""
    batch = PrefixCollator(1)(rows)
    every, _ = score_every_position(model, model, batch["input_ids"], batch["attention_mask"])
    scores = align_pairs(every, batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"])
    return mean_of_counted(*pair_losses("prefix-bt", scores, TrainSettings(base="b", output="o").options, 0))


def sharded_by_hand():
    """``fully_shard`` of torch on every layer and the whole: loss and gradients, gathered, for comparison."""
    model = tiny_reward_model().requires_grad_(True)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    rank = torch.distributed.get_rank()
    loss = reward_loss(model, ROWS[2 * rank : 2 * rank + 2])
    loss.backward()
    torch.distributed.all_reduce(loss := loss.detach(), torch.distributed.ReduceOp.SUM)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=full)
    if rank == 0:
        torch.save({"loss": loss / 2, "gradients": gradients}, "by-hand.pt")
        model.save_pretrained("by-hand", state_dict=weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    hush_libraries()
    warnings.simplefilter("error", UserWarning)
    for part in sys.argv[1:]:
        globals()[part]()
        if torch.distributed.get_rank() == 0:
            Path(f"{part}.done").touch()
