"""The life of a run: its folder, its checkpoints, its training, and what opens it."""
