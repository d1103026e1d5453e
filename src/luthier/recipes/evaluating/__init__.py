"""`luthier eval`: what a run makes of rows it has not seen."""
