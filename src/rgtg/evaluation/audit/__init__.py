"""How well a scorer ranks partial sequences."""
