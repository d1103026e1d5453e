"""`luthier probe`: what tuning did to a model, and what can be taken back."""
