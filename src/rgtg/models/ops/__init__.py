"""Faster layers for decoding, each equal to the model's own."""
