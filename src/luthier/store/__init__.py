"""The store: a run is a directory of plain files, written atomically and verified."""
