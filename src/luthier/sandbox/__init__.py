"""The sandbox: untrusted Python is run here or nowhere. What it covers and what it does not: docs/sandbox.md."""
