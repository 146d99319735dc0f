"""What a run takes in: arguments, seeds, texts, questions, and fetched files."""
