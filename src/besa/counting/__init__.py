"""Integers: budgets that add up exactly, and masks from ranks."""
