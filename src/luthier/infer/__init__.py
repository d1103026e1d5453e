"""The one generation engine. It can share the trainer's live weights."""
