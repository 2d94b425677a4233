"""One question, one file: each is run as ``python -m experiments.NAME``."""
