"""rgtg.json, which describes a trained scorer. Reading it needs no torch."""

from typing import Literal

from pydantic import Field

from rgtg.config.training import Objective
from rgtg.types.base import FORMAT_VERSION, Record

INFO_FILE = "rgtg.json"
HEAD_FILE = "head.safetensors"


class PolicyFiles(Record):
    """Which weight files a head's policy was loaded from (docs/head-format.md defines the fingerprints).

    Attributes:
        format: of the files.
        fingerprint: of the files as they are.
        casts: fingerprints of the same weights stored in a 16-bit dtype, by its name; none of a GGUF file.
    """

    format: Literal["safetensors", "gguf"]
    fingerprint: str
    casts: dict[str, str] = Field(default_factory=dict)


class ScorerInfo(Record):
    """Contents of rgtg.json.

    Attributes:
        append_eos: whether finished completions ended with EOS in training.
        max_length: in tokens, of the texts in training.
        trunk: whose hidden states are scored: those of a model of its own (``separate``), of the frozen policy
            (``own``), or of the policy with a LoRA adapter (``shared``).
        head: ``scalar``, one score per text; ``state``, a head on the candidate's state; ``vocab``, a score for each
            next token. A ``vocab`` head on a ``separate`` trunk is a causal language model's output layer.
        layer: whose states a head on the policy scores; ``policy_layers`` is the final state, after the last norm.
        policy_layers: decoder layers of that policy.
        hidden: size of its states.
        width: hidden size of that head.
        rank: size of its token table.
        vocabulary: rows of its token table.
        normalisation: ``standardize``: states minus the stored mean, divided by the stored deviation.
        activation: ``gelu``: the exact one, x·Φ(x).
        base_casts: fingerprints that the base model's weights have in other dtypes.
        policy_files: of the policy, for engines that do not load it as torch modules; any one of them identifies it.
        reference_fingerprint: of the scorer that weighted the training pairs, if one did.
    """

    version: int = FORMAT_VERSION
    rgtg_version: str
    objective: Objective
    base_model: str
    base_fingerprint: str
    tokenizer_hash: str
    data_fingerprint: str
    append_eos: bool = True
    max_length: int | None = None
    trunk: Literal["separate", "own", "shared"] = "separate"
    head: Literal["scalar", "state", "vocab"] = "scalar"
    layer: int | None = None
    policy_layers: int | None = None
    hidden: int | None = None
    width: int | None = None
    rank: int | None = None
    vocabulary: int | None = None
    normalisation: Literal["standardize"] | None = None
    activation: Literal["gelu"] | None = None
    base_casts: dict[str, str] = Field(default_factory=dict)
    policy_files: list[PolicyFiles] = Field(default_factory=list)
    reference_fingerprint: str | None = None

    @property
    def base_fingerprints(self) -> set[str]:
        """Fingerprints of the base model's weights in every dtype that they may be loaded in."""
        return {self.base_fingerprint, *self.base_casts.values()}

    @property
    def policy_file_fingerprints(self) -> set[str]:
        """Fingerprints of every set of weight files that holds the policy of a head."""
        return {one for files in self.policy_files for one in (files.fingerprint, *files.casts.values())}
