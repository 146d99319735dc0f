"""What a run runs on, and what it takes of it."""
