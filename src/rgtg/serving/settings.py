"""Settings of ``rgtg serve``: flags win over a YAML file, which wins over the environment (RGTG_PORT …)."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rgtg.config import EngineSettings
from rgtg.config.engines import EngineName

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# A list; in the environment, its items are separated by commas.
Texts = Annotated[list[str], NoDecode]


class ServeSettings(EngineSettings, BaseSettings):
    """``rgtg serve``; ``seed`` makes requests without a seed reproducible (without it, each gets a random seed)."""

    model_config = SettingsConfigDict(
        env_prefix="RGTG_", extra="forbid", allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )

    policy: str = Field(description="frozen language model: folder, GGUF file or hub id")
    scorer: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict, description="NAME=FOLDER of each scorer")
    served_model_name: str | None = Field(None, description="the policy's name in requests; default: its folder's name")
    host: str = Field("127.0.0.1", description="address to listen on; any but loopback needs api_key")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free port")
    api_key: SecretStr | None = Field(None, exclude=True, description="key that clients must send; never logged")
    allow_public: bool = Field(False, description="allow an address other than loopback without a key")
    allowed_host: Texts = Field(default_factory=list, description="accepted Host headers, besides the address itself")
    cors_origin: Texts = Field(default_factory=list, description="web origins whose pages may call the server")
    dtype: str | None = Field(None, description="float32, bfloat16, float16; default: that of the checkpoint")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 …; default: the first GPU, else the CPU")
    scorer_device: str | None = Field(None, description="device of scorers that are separate models; default: device")
    cache_gguf: bool = Field(False, description="policy is a GGUF file: keep its conversion to bf16 beside it")
    engine: EngineName = Field("auto", description="auto: llama.cpp for a GGUF file where it is installed, else torch")
    threads: int | None = Field(
        None, ge=1, description="threads that compute; default: OMP_NUM_THREADS, else the cores"
    )
    default_max_tokens: int = Field(256, ge=1, description="max_tokens of chats that do not give it")
    max_prompts: int = Field(32, ge=1, description="prompts, or completions to score, in one request")
    max_body_kib: int = Field(1024, ge=1, description="largest request body in KiB")
    request_seconds: float = Field(600.0, gt=0, description="time limit of a request, including its wait in the queue")
    drain_seconds: float = Field(30.0, ge=0, description="time limit of accepted requests after SIGTERM")
    log: Literal["requests", "errors"] = Field("requests", description="what is logged to stderr")

    @field_validator("scorer", mode="before")
    @classmethod
    def _parse_scorers(cls, given: Any) -> Any:
        """Accept a mapping, or NAME=FOLDER items."""
        if isinstance(given, dict):
            return given
        items = _split(given)
        pairs = [item.partition("=") for item in items]
        if bad := [item for item, (name, equals, folder) in zip(items, pairs, strict=True) if not (equals and folder)]:
            raise ValueError(f"{bad[0]!r} is not NAME=FOLDER (for example helpful=scorers/helpful)")
        names = [name for name, _, _ in pairs]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two scorers are called {repeated[0]!r}")
        return {name: folder for name, _, folder in pairs}

    @field_validator("scorer")
    @classmethod
    def _check_names(cls, scorers: dict[str, str]) -> dict[str, str]:
        if bad := [name for name in scorers if not _NAME.fullmatch(name)]:
            raise ValueError(f"a scorer cannot be called {bad[0]!r}: letters, digits, '.', '_' and '-' only")
        return scorers

    @field_validator("allowed_host", "cors_origin", mode="before")
    @classmethod
    def _parse_list(cls, given: Any) -> Any:
        return _split(given)

    @model_validator(mode="after")
    def _require_key(self) -> Self:
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key.get_secret_value()):
            raise ValueError("api_key must be printable ASCII without spaces, and not empty")
        if not (self.is_local or self.api_key or self.allow_public):
            raise ValueError(
                f"other machines can reach {self.host}: set a key (--api-key or RGTG_API_KEY), or give --allow-public"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def name(self) -> str:
        """The policy's name in requests."""
        return self.served_model_name or Path(self.policy).name or self.policy

    @property
    def hosts(self) -> set[str] | None:
        """Accepted Host headers; None: all.

        Without this check, a web page could reach a server without a key by DNS rebinding.
        """
        if self.allowed_host or (self.is_local and not self.api_key):
            return {"localhost", "127.0.0.1", "[::1]", self.host, *self.allowed_host}
        return None


def _split(given: Any) -> Any:
    return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given
