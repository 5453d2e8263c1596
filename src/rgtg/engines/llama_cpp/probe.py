"""Try a GGUF file in a process of its own: llama.cpp ends the process on some files that it cannot read.

``python -m rgtg.engines.llama_cpp.probe FILE`` maps the file into memory and reads a few tokens. It prints what the
library says against the file, and ends with 1 in that case. With ``--repack``, weights are first repacked for the
processor.
"""

import functools
import subprocess
import sys
from pathlib import Path

from rgtg.engines.llama_cpp.library import first_error, library
from rgtg.errors import ModelNotFoundError

_SECONDS = 300


def require_readable(path: Path) -> None:
    """Check that llama.cpp can read a file.

    Raises:
        ModelNotFoundError: it cannot; with what it says.
    """
    _require_readable(*_version(path))


@functools.lru_cache(maxsize=16)
def _require_readable(path: Path, _size: int, _modified: int) -> None:
    tried = _try(path)
    if tried.returncode == 0:
        return
    said = [line for line in (tried.stdout or tried.stderr).splitlines() if line.strip()]
    why = said[-1].strip() if tried.returncode == 1 and said else f"it ended the process ({tried.returncode})"
    raise ModelNotFoundError(
        f"llama.cpp cannot read {path}: {why}. The file is damaged, or of a kind that this version does not know: "
        "download it again, or use --engine torch"
    )


def may_repack(path: Path) -> bool:
    """Whether llama.cpp may repack a file's weights for this processor when it loads them.

    Some compilers build its AMX instructions so that they end the process at the first prompt
    (https://github.com/ggml-org/llama.cpp/issues/20824); where it has them, a process of its own tries them.
    """
    if b"AMX_INT8 = 1" not in library().llama_print_system_info():
        return True
    return _survives_repacking(*_version(path))


@functools.lru_cache(maxsize=16)
def _survives_repacking(path: Path, _size: int, _modified: int) -> bool:
    try:
        return _try(path, "--repack").returncode == 0
    except subprocess.TimeoutExpired:  # a file too large to be repacked twice
        return False


def _version(path: Path) -> tuple[Path, int, int]:
    """What a file is known by: a changed one is tried again."""
    found = path.stat()
    return path.resolve(), found.st_size, found.st_mtime_ns


def _try(path: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", __name__, str(path), *options],
        capture_output=True, text=True, timeout=_SECONDS, errors="replace",
    )  # fmt: skip


def _probe(path: str, repack: bool) -> str | None:
    """What llama.cpp says against a file; None if it can read it."""
    lib = library()
    params = lib.llama_model_default_params()
    params.load_mode, params.use_extra_bufts, params.n_gpu_layers = lib.LLAMA_LOAD_MODE_MMAP, repack, 0
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        return first_error() or "no reason given"
    vocab = lib.llama_model_get_vocab(model)
    if lib.llama_vocab_n_tokens(vocab) < 1:
        return "it has no vocabulary"
    text = b"Once upon a time, 12345 <|im_start|>"
    tokens = (lib.llama_token * 64)()
    n = lib.llama_tokenize(vocab, text, len(text), tokens, 64, True, True)
    of_cache = lib.llama_context_default_params()
    of_cache.n_ctx = of_cache.n_batch = of_cache.n_ubatch = 64
    context = lib.llama_init_from_model(model, of_cache)
    if not context:
        return first_error() or "no cache can be made for it"
    tokens[0] = tokens[0] if n > 0 else 0
    code = lib.llama_decode(context, lib.llama_batch_get_one(tokens, max(n, 1)))
    return None if code == 0 else f"it cannot be run (code {code}): {first_error()}"


if __name__ == "__main__":
    problem = _probe(sys.argv[1], "--repack" in sys.argv[2:])
    if problem is not None:
        sys.stdout.write(problem + "\n")
        sys.exit(1)
