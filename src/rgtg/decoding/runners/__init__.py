"""Models over their caches: prefill, step, fork, score."""
