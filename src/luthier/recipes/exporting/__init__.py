"""`luthier export` and hand-over: a tuned model leaves in other forms and to other engines."""
