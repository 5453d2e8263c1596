"""Resumable completion of files of prompts."""
