"""Pruning methods: a recipe and its choices, one file each."""
