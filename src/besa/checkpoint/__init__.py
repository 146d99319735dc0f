"""Opening, writing, rewriting and counting checkpoints; the only part of besa that writes models."""
