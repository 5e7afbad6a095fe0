"""The page that shows what a run did: figures, health checks and settings in one HTML file.

Reads the files of run directories and nothing else of the program.
"""

from dqn_fast.report.document import run_figures, write_report

__all__ = ["run_figures", "write_report"]
