"""What recipes may say: the keys of each kind, and the files they are read from."""
