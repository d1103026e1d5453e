"""Recipes: each wires machines and methods into one story that a newcomer can read alone."""
