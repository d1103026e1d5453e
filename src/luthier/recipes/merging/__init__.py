"""`luthier merge`: several models or adapters made into one, and judged before anyone relies on it."""
