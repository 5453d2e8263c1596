"""Comparing methods at equal budgets."""
