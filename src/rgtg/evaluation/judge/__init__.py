"""Pairwise judging by a large language model."""
