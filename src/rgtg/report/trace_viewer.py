"""The playground's trace viewer as one script and one style sheet, to embed in a page."""

import json
import re
from importlib import resources

_IMPORT = re.compile(r"^import\s[^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


def viewer_script() -> str:
    """The viewer's modules as one classic script, which draws every trace of its page."""
    plain = [_EXPORT.sub("", _IMPORT.sub("", _static(name))) for name in _parts()["scripts"]]
    return '(() => {\n"use strict";\n' + "\n".join(plain) + "\nshowEmbedded();\n})();\n"


def viewer_style() -> str:
    """The viewer's style sheet; the names of all classes begin with ``tv``."""
    return "\n".join(_static(name) for name in _parts()["styles"])


def _parts() -> dict[str, list[str]]:
    parts: dict[str, list[str]] = json.loads(_static("viewer.json"))
    return parts


def _static(name: str) -> str:
    return (resources.files("rgtg.serving") / "static" / name).read_text(encoding="utf-8")
