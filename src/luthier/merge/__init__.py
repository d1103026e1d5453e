"""The merge machine: models as streams of tensors, merged row by row into a new folder."""
