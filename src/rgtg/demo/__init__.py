"""The demo: a synthetic support desk, small enough to train everything in about a minute."""
