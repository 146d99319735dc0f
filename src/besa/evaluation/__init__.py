"""Measuring what a model still knows."""
