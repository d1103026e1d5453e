"""Reading: files become rows, each with its address; what cannot be read is named and counted."""
