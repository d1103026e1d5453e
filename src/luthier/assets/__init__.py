"""Files that ship with the package: the seedling, the little world it grew up in, and the demo."""
