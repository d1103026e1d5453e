"""Two models that ought to be one, or a tuned one beside its base."""
