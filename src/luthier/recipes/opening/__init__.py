"""A run or a model by its name, opened to be asked, trained on or packed."""
