"""Sites and edits: where a model can be changed, what is added there, folded in and taken out again."""
