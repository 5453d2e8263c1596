"""Files: atomic writes, hashes and locks."""
