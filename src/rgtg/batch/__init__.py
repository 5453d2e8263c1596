"""Resumable jobs over files of prompts."""
