"""Trials that a run must survive: see `scripts.torture.__main__`."""
