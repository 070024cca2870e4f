"""Published tables as protocols: what their numbers mean, the commands that reproduce them, and whether a run does."""
