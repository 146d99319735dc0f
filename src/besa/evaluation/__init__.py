"""Evaluation of models: perplexity on texts and accuracy on zero-shot tasks."""
