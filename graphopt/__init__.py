"""An optimizing compiler for the cost of PyTorch models that already exist."""

__version__ = "0.1.0"
