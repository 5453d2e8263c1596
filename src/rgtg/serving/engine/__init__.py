"""Scheduling: requests join and leave the running batch at any step."""
