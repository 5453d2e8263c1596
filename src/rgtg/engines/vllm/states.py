"""The policy's final states, from vLLM's layer that turns them into logits.

vLLM calls `register` in each of its processes (entry point ``vllm.general_plugins``), also where nobody asks for
guidance: it adds one assignment to a step.
"""

from typing import Any


class LatestStates:
    """States of the rows whose logits were computed last, in the order of the logits.

    Attributes:
        states: (B, H); None before the first step.
        used: rows that `take` has handed out.
    """

    def __init__(self) -> None:
        self.states: Any = None
        self.used = 0

    def put(self, states: Any) -> None:
        """Replace the states by those of a new step."""
        self.states, self.used = states, 0

    def take(self, rows: int) -> Any:
        """The states (rows, H) of the next rows; drafted tokens are verified a few rows at a time.

        Raises:
            RuntimeError: fewer rows are left: the model computes its logits in a way of its own.
        """
        if self.states is None or self.used + rows > len(self.states):
            known = 0 if self.states is None else len(self.states) - self.used
            raise RuntimeError(
                f"rgtg needs the final states of {rows} rows and has {known}: this model computes its logits without "
                "vLLM's LogitsProcessor layer and cannot be guided"
            )
        start, self.used = self.used, self.used + rows
        return self.states[start : self.used]


LATEST = LatestStates()


def register() -> None:
    """Let every model that vLLM loads keep its latest final states; calling it again changes nothing."""
    if registered():
        return
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    known: Any = op_registry_oot.pop("LogitsProcessor", LogitsProcessor)  # another plug-in's layer stays below ours

    class StatesLogitsProcessor(known):  # type: ignore[misc]
        keeps_states = True

        def forward(self, lm_head: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            LATEST.put(hidden_states)
            return known.forward(self, lm_head, hidden_states, *args, **kwargs)

    LogitsProcessor.register_oot(StatesLogitsProcessor)


def registered() -> bool:
    """Whether vLLM's layer keeps the states."""
    from vllm.model_executor.custom_op import op_registry_oot

    return getattr(op_registry_oot.get("LogitsProcessor"), "keeps_states", False)
