"""What a run takes: its memory, its operations, its time, and what is free for it."""
