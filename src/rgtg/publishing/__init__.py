"""Publishes a trained scorer: selects its files, writes its model card, and makes one commit to a hub repository."""
