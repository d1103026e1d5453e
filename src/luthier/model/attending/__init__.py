"""Attention over a forest: by segment, by block mask, with keys that stay."""
