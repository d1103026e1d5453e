"""The command line: thin surfaces over recipes. No heavy import happens before a command runs."""
