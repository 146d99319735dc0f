"""Other programs on the same models and the same machine; each is one command, and nothing of theirs is kept here."""
