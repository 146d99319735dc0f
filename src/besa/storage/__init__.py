"""Files: written whole, kept in a journal, and the formats of weights."""
