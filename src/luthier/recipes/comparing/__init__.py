"""`luthier compare`: methods on one file, each at its own best rate."""
