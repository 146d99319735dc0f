"""The only part of besa that writes models, and the part that counts what is in their files."""
