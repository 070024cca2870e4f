"""What is known about a model, by its fingerprint: documents in the user's cache folder, checked when they are read."""
