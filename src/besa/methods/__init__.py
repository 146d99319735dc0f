"""What a pruning method is made of: a recipe and its choices, one file each."""
