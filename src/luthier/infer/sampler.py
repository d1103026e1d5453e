"""Choosing the next token of each continuation from its logits."""
