"""What all commands share: options from settings, errors as exit codes, results as tables or JSON."""

import functools
import inspect
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, ParamSpec, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel

from rgtg.config import Settings
from rgtg.errors import RgtgError, StoppedError
from rgtg.utils.files import write_text

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Settings)

_COMMON = "Common"
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings", rich_help_panel=_COMMON)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="any setting, dotted; repeatable", rich_help_panel=_COMMON),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout", rich_help_panel=_COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print errors only", rich_help_panel=_COMMON)]
Seed = Annotated[int | None, typer.Option("--seed", help="seed of everything random", rich_help_panel=_COMMON)]
_METAVARS = {int: "<int>", float: "<float>", Path: "<path>"}


@dataclass(frozen=True)
class Invocation:
    """The common options of a command that is running."""

    config: Path | None
    as_json: bool
    quiet: bool

    @property
    def silent(self) -> bool:
        """Whether progress is not shown."""
        return self.quiet or self.as_json

    def emit(self, result: Any, show: Callable[[], None]) -> None:
        """Print a result: as JSON with ``--json``, else by ``show``, and not at all with ``--quiet``."""
        if self.as_json:
            sys.stdout.write(to_json(result) + "\n")
        elif not self.quiet:
            show()

    def tell(self, line: str) -> None:
        """Print a line about progress on stderr."""
        if not self.silent:
            print(line, file=sys.stderr)  # noqa: T201


def command(
    settings: type[S],
    options: str,
    *,
    panels: Mapping[str, str] | None = None,
    lists: Mapping[str, str] | None = None,
    convert: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Callable[[Callable[[S, Invocation], None]], Callable[..., None]]:
    """Make a command of a function of settings. Its options are fields of the settings, helped by their descriptions.

    The settings check all values, whether they come from the command line, a file or ``--set``.

    Args:
        settings: the model; its ``positional`` fields become arguments.
        options: names of fields, separated by spaces.
        panels: title → names of further fields, which the help shows under that title.
        lists: name → help of further options that can be repeated and are not fields; ``convert`` replaces them.
        convert: turns the given options into settings.
    """
    parameters = [_parameter(settings, name, None) for name in options.split()]
    for title, names in (panels or {}).items():
        parameters += [_parameter(settings, name, title) for name in names.split()]
    for name, text in (lists or {}).items():
        parameters.append(_keyword(name, Annotated[list[str] | None, typer.Option(help=text)], None))
    common = {"config": Config, "overrides": Overrides, "as_json": AsJson, "quiet": Quiet, "seed": Seed}
    parameters += [
        _keyword(name, kind, False if name in ("as_json", "quiet") else None) for name, kind in common.items()
    ]

    def decorate(function: Callable[[S, Invocation], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(config: Path | None, overrides: list[str] | None, as_json: bool, quiet: bool, **given: Any) -> None:
            # None, an empty list and False are options that were not given
            flags = {
                k: _parse(settings, k, v) for k, v in given.items() if v is not None and v != [] and v is not False
            }
            function(settings.resolve(config, overrides, convert(flags)), Invocation(config, as_json, quiet))

        run.__annotations__ = {}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return verb(run)

    return decorate


def _parameter(settings: type[Settings], name: str, panel: str | None) -> inspect.Parameter:
    """An option, or an argument if it is positional, for a field of settings."""
    field = settings.model_fields[name]
    types = _types(field.annotation)
    text = field.description or ""
    if "default" not in text and isinstance(field.default, str | int | float | Path) and field.default is not False:
        text += f"; default: {field.default}"
    if name in settings.positional:
        return _keyword(name, Annotated[str | None, typer.Argument(help=text, show_default=False)], None)
    flag = f"--{name.replace('_', '-')}"
    if bool in types:
        return _keyword(name, Annotated[bool, typer.Option(flag, help=text, rich_help_panel=panel)], False)
    literals = [str(one) for kind in types if get_origin(kind) is Literal for one in get_args(kind)]
    many = any(get_origin(kind) is list for kind in types)
    numbers = [_METAVARS[kind] for kind in types if kind in (int, float)] if literals else []
    if get_origin(types[0]) is dict:
        metavar = "<json>"
    else:
        metavar = "|".join([*numbers, *literals]) if literals else _METAVARS.get(_item_type(types[0]), "<str>")
    option = typer.Option(flag, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)
    return _keyword(name, Annotated[list[str] | None if many else str | None, option], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _types(annotation: Any) -> list[Any]:
    """The types of a union without None, or the single type."""
    members = [annotation] if get_origin(annotation) in (None, list, dict, Literal) else list(get_args(annotation))
    return [kind for kind in members if kind is not type(None)]


def _item_type(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _parse(settings: type[Settings], name: str, value: Any) -> Any:
    """Turn text into numbers, so that an error shows a number; and a list of one into its item, if the field takes it.

    What is not a number stays text, for the settings to reject.
    """
    types = _types(settings.model_fields[name].annotation) if name in settings.model_fields else [list]
    if isinstance(value, list):
        items = [_parse(settings, name, item) for item in value]
        return items[0] if len(items) == 1 and len(types) > 1 else items
    number = _item_type(types[0])
    try:
        return number(value) if number in (int, float) else value
    except ValueError:
        return value


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Turn rgtg's errors, and outputs that cannot be written, into one readable message and an exit code.

    Any other error keeps its traceback.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # A warning is one line, without the source location.
        warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)  # noqa: T201
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()  # a failure when the interpreter exits would go unnoticed
        except RgtgError as error:
            fail(str(error), error.exit_code)
        except BrokenPipeError as error:  # the reader has closed the pipe (rgtg … | head)
            _discard_stdout()
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            fail("stopped", 75)
        except Exception as error:
            if (reason := _unwritable(error)) is None:
                raise
            _discard_stdout()
            fail(reason, 1)
        return result

    return run


@contextmanager
def resumable(advice: str) -> Iterator[None]:
    """During the block, Ctrl-C and SIGTERM end the command with exit code 75 and say how to resume.

    Raises:
        StoppedError: on either signal.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # no library's "except Exception" catches it

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError(f"stopped; {advice}") from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _unwritable(error: Exception) -> str | None:
    """Why an output cannot be written, if that is what the error says. Libraries raise errors of their own for it."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{reason}: {error.filename}" if error.filename else f"cannot write: {reason}"
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error" in text:
        return f"cannot write the weights: {text.rpartition('I/O error: ')[2]}"
    if isinstance(error, RuntimeError) and ("unexpected pos" in text or "PytorchStreamWriter failed" in text):
        return "cannot write a checkpoint: is the disk full?"
    return None


def _discard_stdout() -> None:
    """Discard what stdout cannot take; the interpreter would try again when it exits, and print an error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int) -> NoReturn:
    """Print one message on stderr and exit."""
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(code)


def hush_libraries(*, forks: bool = True) -> None:
    """Turn off the progress bars and advice of the libraries.

    If nothing ``forks`` the process (to load data), tokenizers may use all cores.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if forks else "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write_json(path: Path, content: "BaseModel | dict[str, Any]") -> None:
    """Write one JSON document atomically."""
    write_text(path, to_json(content) + "\n")


def to_json(content: Any) -> str:
    """A record or plain values as indented JSON."""
    if isinstance(content, BaseModel):
        return content.model_dump_json(indent=2)
    return json.dumps(content, indent=2, default=str)


def save_settings(output: Path, settings: BaseModel) -> None:
    """Write the resolved settings: as FILE.settings.json for a file, as settings.json in a folder."""
    path = output / "settings.json" if output.is_dir() else output.with_name(output.name + ".settings.json")
    write_json(path, settings)
