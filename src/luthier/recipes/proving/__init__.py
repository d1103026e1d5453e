"""A finished run proved by a fresh process."""
