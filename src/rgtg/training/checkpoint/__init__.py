"""Saving, resuming and stopping a training run."""
