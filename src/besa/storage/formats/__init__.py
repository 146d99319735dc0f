"""Layouts of weights on the disk, other than dense."""
