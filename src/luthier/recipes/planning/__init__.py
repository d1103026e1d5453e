"""`luthier plan`: what a recipe, or a shape alone, would take, and what fits."""
