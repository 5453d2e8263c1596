"""Guided decoding: propose, score, rule, commit."""
