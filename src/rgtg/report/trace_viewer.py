"""The playground's renderer of traces as text to put inside a page: one script, one style."""

import json
import re
from importlib import resources

_IMPORT = re.compile(r"^import\s[^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


def viewer_script() -> str:
    """The renderer's modules in order as one classic script, which draws every trace of the page it is in."""
    plain = [_EXPORT.sub("", _IMPORT.sub("", _static(name))) for name in _parts()["scripts"]]
    return '(() => {\n"use strict";\n' + "\n".join(plain) + "\nshowEmbedded();\n})();\n"


def viewer_style() -> str:
    """Its style sheet; every class in it begins with ``tv``."""
    return "\n".join(_static(name) for name in _parts()["styles"])


def _parts() -> dict[str, list[str]]:
    parts: dict[str, list[str]] = json.loads(_static("viewer.json"))
    return parts


def _static(name: str) -> str:
    return (resources.files("rgtg.serving") / "static" / name).read_text(encoding="utf-8")
