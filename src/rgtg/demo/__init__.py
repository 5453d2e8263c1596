"""The embedded demo: a small world that trains in about a minute."""
