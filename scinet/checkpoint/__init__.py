"""What a run keeps on disk: the selected weights, and all that going on after any step needs."""
