"""The record of a run: its directory, metrics, diagnostics, checkpoints and loggers."""
