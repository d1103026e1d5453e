"""Model folders as files: names to folders, tensors by rows, configs, adapters in PEFT's format."""
