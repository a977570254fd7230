"""One training run: its directory, checkpoints, signals, tracking, and the order of its steps."""
