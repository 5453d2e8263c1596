"""Loading policies and scorers from folders and the hub, onto devices."""
