"""Other engines than torch that run a policy."""
