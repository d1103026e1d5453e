"""`recipe: reinforce`: what is particular to learning from rewards."""
