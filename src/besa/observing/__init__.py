"""What a block shows while it runs."""
