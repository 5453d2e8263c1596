"""The version, which importing nothing else can tell."""

__version__ = "0.1.0"
