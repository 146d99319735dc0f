"""Exact numbers of zeros: budgets, and masks from ranks."""
