"""Rendering: conversations become tokens with roles, spans and weights, through templates that run apart."""
