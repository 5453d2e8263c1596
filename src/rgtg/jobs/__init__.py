"""Batch generation: a file of prompts completed row by row, killed at any moment, and gone on with."""
