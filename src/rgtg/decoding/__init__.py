"""Guided decoding: propose, score, draw, commit."""
