"""The base of all settings: merging YAML, flags and overrides, and readable error messages."""

import difflib
import json
import reprlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from rgtg.errors import UsageError


class Settings(BaseModel):
    """Base of every command's settings. An unknown key is an error that suggests the nearest known one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    positional: ClassVar[tuple[str, ...]] = ()  # settings that are positional arguments, in order

    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random in this run")

    @classmethod
    def resolve(
        cls, config: Path | None = None, overrides: list[str] | None = None, flags: dict[str, Any] | None = None
    ) -> Self:
        """Merge a YAML file, the flags that the user gave, and ``a.b=c`` overrides; later ones win.

        Raises:
            UsageError: an unreadable file, an unknown key, a value that is not allowed.
        """
        merged = read_yaml(config) if config else {}
        merged |= {key: value for key, value in (flags or {}).items() if value is not None}
        for item in overrides or []:
            _set_dotted(merged, item)
        return validate(cls, merged)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 200, 200
SettingsT = TypeVar("SettingsT", bound=BaseModel)
OnBad = Annotated[Literal["error", "skip"], Field(description="stop at bad rows, or leave them out")]


def all_tokens(top_k: Any) -> Any:
    """``all`` as the command line gives it: None, the whole vocabulary; other values as they are."""
    return None if top_k == "all" else top_k


def _json_object(value: Any) -> Any:
    """Read JSON text, as the command line gives it; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError('must be a JSON object, such as {"enable_thinking": false}') from error


TemplateKwargs = Annotated[
    dict[str, JsonValue] | None,
    BeforeValidator(_json_object),
    Field(
        description='variables of the chat template, as JSON: {"enable_thinking": false}',
        exclude_if=lambda given: given is None,
    ),
]


def validate(cls: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    """Build settings from values.

    Raises:
        UsageError: names every flag that is wrong, what is allowed, and the nearest known key.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = next(iter(error.errors()[0]["loc"]), None)
        text = "; ".join(_explain(cls, detail) for detail in error.errors())
        raise UsageError(text, setting=first if isinstance(first, str) else None) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        UsageError: it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        loaded = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read the config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"the config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        found = "is empty" if loaded is None else f"is a {type(loaded).__name__}"
        raise UsageError(f"the config {path} {found}; it must hold settings as 'name: value'")
    return loaded


def _yaml(text: str) -> Any:
    """Parse YAML. Deep nesting, long numbers and impossible dates raise ``YAMLError`` too."""
    try:
        return yaml.safe_load(text)
    except (RecursionError, ValueError, TypeError, AttributeError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def _set_dotted(target: dict[str, Any], item: str) -> None:
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise UsageError(f"--set {item!r} is not of the form name=value (for example train.num_train_epochs=3)")
    *parents, last = dotted.split(".")
    for parent in parents:
        if target.get(parent) is None:  # a settings file writes null for a group that was not given
            target[parent] = {}
        child = target[parent]
        if not isinstance(child, dict):
            raise UsageError(f"--set {item!r}: {parent} is a single value and has no {last}")
        target = child
    try:
        target[last] = _yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {item!r}: {text!r} is not a YAML value") from error


def _explain(cls: type[BaseModel], detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(detail["loc"][-1]), list(cls.model_fields), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(cls.model_fields))}"
        return f"unknown setting {name}{hint}"
    if detail["type"] == "missing":
        places: tuple[str, ...] = getattr(cls, "positional", ())
        given_as = f"argument {places.index(name) + 1}" if name in places else f"--{name.replace('_', '-')}"
        return f"{name} is required ({given_as})"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not name:  # several settings contradict each other
        return message
    # Shortened: a few lines of YAML anchors can expand to gigabytes.
    return f"{name} = {_BRIEF.repr(detail['input'])}: {message}"
