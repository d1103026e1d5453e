"""The server: an API that programs already speak, before one engine."""
