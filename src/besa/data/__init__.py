"""Inputs of a run: arguments, seeds, texts, questions and downloaded files."""
