"""Vectorised, device-resident deep Q-learning in PyTorch."""

__version__ = "0.1.0"
