"""Cost of besa against its limits; see README.md."""
