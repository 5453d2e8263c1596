"""Frozen policies and scorers: loading, encoding, reading every position."""
