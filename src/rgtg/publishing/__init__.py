"""Publish a trained scorer: which files go, what its card says, one commit to a hub repository."""
