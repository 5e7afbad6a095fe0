"""Report of a run in one HTML file: figures, health checks and settings.

The report reads only the files of run directories.
"""

from dqn_fast.report.document import run_figures, write_report

__all__ = ["run_figures", "write_report"]
