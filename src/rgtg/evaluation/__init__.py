"""Evidence: metrics, audit of scorers, comparison of methods."""
