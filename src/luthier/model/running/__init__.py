"""Executors: a forest through a model, by our blocks or the zoo's, to its heads and back."""
