"""Scorer training: thin subclasses of library trainers."""
