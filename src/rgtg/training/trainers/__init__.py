"""One trainer for each objective."""
