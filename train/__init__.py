"""Training: tasks, data, the loop and its checkpoints (`python -m train`)."""
