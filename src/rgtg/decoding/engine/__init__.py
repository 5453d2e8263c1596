"""The loop that decodes a batch, and what is built on it."""
