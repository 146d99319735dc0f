"""The only part of besa that knows Hugging Face: opening models and finding their decoder blocks."""
