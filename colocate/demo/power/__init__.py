"""The demonstration of power caps and budgets."""
