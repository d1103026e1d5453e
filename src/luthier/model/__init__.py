"""What a model is to luthier: sites with roles, edits as data, and a forest that goes through it."""
