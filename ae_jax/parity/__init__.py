"""Ours beside PyTorch: both trainings in lockstep, and the report on them."""
