"""`recipe: ai_feedback`: a judge's preferences, and a model trained on them."""
