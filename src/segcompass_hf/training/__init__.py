"""Training: the recipe that makes the bundled checkpoint."""
