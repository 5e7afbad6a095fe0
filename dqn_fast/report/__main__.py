"""Write a report: `python -m dqn_fast.report RUN_DIR [RUN_DIR ...]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dqn_fast.process import command
from dqn_fast.report import write_report
from dqn_fast.settings import one_line

WHOLE = 10_000
"""More characters than a path or a message has."""


@dataclass
class ReportArgs:
    """Write one HTML file about one run or several runs."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of training runs."""
    out: Path | None = None
    """File to write. None: report.html in the run directory, or in the working directory if there
    are several runs."""


@command()
def main() -> int:
    """Write the report, print its path and return the exit status."""
    args = tyro.cli(ReportArgs)
    folder = args.run_dirs[0] if len(args.run_dirs) == 1 else Path()
    out = args.out or folder / "report.html"
    try:
        if not args.run_dirs:
            raise ValueError("RUN_DIRS: name at least one run directory")
        if not out.name:
            raise ValueError(f"--out {out}: must be a file")
        write_report(args.run_dirs, out)
    except ValueError as error:
        print(f"error: {one_line(error, WHOLE)}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or error
        print(f"error: --out {one_line(out, WHOLE)}: cannot be written ({reason})", file=sys.stderr)
        return 2
    print(f"{one_line(out, WHOLE)} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
