"""A page to play with: one picture, one question, whole and pruned beside each other."""
