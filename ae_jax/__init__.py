"""Autoencoders in JAX and Flax, measured against the PyTorch tutorial."""

__version__ = "0.1.0"
