"""Looking into a model: where its visual tokens' diversity collapses, and what its attention does."""
