"""Pure tensor functions with their equation and source; nothing here knows a model."""
