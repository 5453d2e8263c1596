"""The llama.cpp library: imported when it is needed, quiet, and what it says when something fails."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

from rgtg.errors import MissingExtraError, first_line

PACKAGE = "llama_cpp"
EXTRA = "pip install 'rgtg[llama-cpp]'"
_ERROR, _CONTINUED = 4, 5  # of ggml's log levels

_errors: list[str] = []
_MOST = 20
_loaded: list[Any] = []  # the module, and the callback that must outlive it


def is_installed() -> bool:
    """Whether llama-cpp-python is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def library() -> Any:
    """The functions of llama.h. The library prints nothing from now on; `first_error` gives its errors.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or does not work.
    """
    if _loaded:
        return _loaded[0]
    if not is_installed():
        raise MissingExtraError(
            f"the engine llama-cpp needs llama-cpp-python (a C++ compiler and cmake build it): {EXTRA}"
        )
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # it would start a debugger before it ends the process
    try:
        found = importlib.import_module(f"{PACKAGE}.llama_cpp")
    except Exception as error:  # a shared library that this machine cannot load raises anything
        raise MissingExtraError(
            f"llama-cpp-python is installed and cannot be loaded ({first_line(error)}): install it again, {EXTRA}"
        ) from error
    callback = found.llama_log_callback(_remember)
    found.llama_log_set(callback, ctypes.c_void_p(0))
    found.llama_backend_init()
    _loaded.extend([found, callback])
    return found


def describe() -> str:
    """One line: the library's version and what it was built for, or why it cannot be used."""
    try:
        lib = library()
    except MissingExtraError as error:
        return str(error)
    built = "GPU and CPU" if lib.llama_supports_gpu_offload() else "CPU"
    return f"llama-cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')}, built for {built})"


def first_error() -> str:
    """The first error that the library has reported since `forget_errors`, on one line; empty if there is none."""
    line = " ".join("".join(_errors[:1]).split())
    return line.partition(": ")[2] or line  # without the name of the function


def forget_errors() -> None:
    """Forget what the library has reported so far."""
    _errors.clear()


def _remember(level: int, text: bytes, _data: Any) -> None:
    if level == _ERROR and len(_errors) < _MOST:
        _errors.append(text.decode(errors="replace"))
    elif level == _CONTINUED and _errors:
        _errors[-1] += text.decode(errors="replace")
