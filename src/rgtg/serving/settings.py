"""Settings of ``rgtg serve``: flags, a YAML file, and the environment (RGTG_PORT, RGTG_API_KEY …), in this order."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rgtg.config import EngineSettings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Lists in the environment are written with commas.
Texts = Annotated[list[str], NoDecode]


class ServeSettings(EngineSettings, BaseSettings):
    """``rgtg serve``; ``seed`` is that of requests which bring none (left out: each gets a random one)."""

    model_config = SettingsConfigDict(
        env_prefix="RGTG_", extra="forbid", allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )

    policy: str = Field(description="frozen language model: folder or hub id")
    scorer: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict, description="NAME=FOLDER of each scorer")
    served_model_name: str | None = Field(None, description="the policy's name; default: the folder's last part")
    host: str = Field("127.0.0.1", description="address to listen on; other than loopback needs api_key")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    api_key: SecretStr | None = Field(None, exclude=True, description="what clients must send; never written anywhere")
    allow_public: bool = Field(False, description="listen beyond loopback without a key")
    allowed_host: Texts = Field(default_factory=list, description="Host headers taken, beside the address itself")
    cors_origin: Texts = Field(default_factory=list, description="web origins whose pages may call the server")
    dtype: str | None = Field(None, description="float32, bfloat16, float16; default: the checkpoint's own")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 …; default: the first GPU, else the CPU")
    scorer_device: str | None = Field(None, description="of scorers that are models of their own; default: device")
    default_max_tokens: int = Field(256, ge=1, description="of chats that ask for no number")
    max_prompts: int = Field(32, ge=1, description="prompts or completions in one request")
    max_body_kib: int = Field(1024, ge=1, description="largest request body")
    request_seconds: float = Field(600.0, gt=0, description="time that a request may take, the queue included")
    drain_seconds: float = Field(30.0, ge=0, description="time that accepted requests get after SIGTERM")
    log: Literal["requests", "errors"] = Field("requests", description="what is written on stderr")

    @field_validator("scorer", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A mapping, or NAME=FOLDER once or more."""
        if isinstance(given, dict):
            return given
        items = _parts(given)
        pairs = [item.partition("=") for item in items]
        if bad := [item for item, (name, equals, folder) in zip(items, pairs, strict=True) if not (equals and folder)]:
            raise ValueError(f"{bad[0]!r} is not NAME=FOLDER (for example helpful=scorers/helpful)")
        names = [name for name, _, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two scorers are called {twice[0]!r}")
        return {name: folder for name, _, folder in pairs}

    @field_validator("scorer")
    @classmethod
    def _plain_names(cls, scorers: dict[str, str]) -> dict[str, str]:
        if bad := [name for name in scorers if not _NAME.fullmatch(name)]:
            raise ValueError(f"a scorer cannot be called {bad[0]!r}: letters, digits, '.', '_' and '-' only")
        return scorers

    @field_validator("allowed_host", "cors_origin", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return _parts(given)

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key.get_secret_value()):
            raise ValueError("api_key must be printable ASCII without spaces, and not empty")
        if not (self.is_local or self.api_key or self.allow_public):
            raise ValueError(
                f"listening on {self.host} lets others in: set a key (--api-key, RGTG_API_KEY), or say --allow-public"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether the address can be reached from this machine only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def name(self) -> str:
        """The policy's name to clients."""
        return self.served_model_name or Path(self.policy).name or self.policy

    @property
    def hosts(self) -> set[str] | None:
        """Host headers that are taken; None: all.

        Without a key, a page whose name was made to resolve to this machine could talk to the server otherwise.
        """
        if self.allowed_host or (self.is_local and not self.api_key):
            return {"localhost", "127.0.0.1", "[::1]", self.host, *self.allowed_host}
        return None


def _parts(given: Any) -> Any:
    return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given
