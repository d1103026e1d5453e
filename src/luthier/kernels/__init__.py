"""Fused operations with their own backward. Each has a plain-torch twin here that is also the CPU path."""
