"""Check this machine and an environment: `python -m dqn_fast.doctor [--env-id ID]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from dqn_fast.doctor.findings import Finding
from dqn_fast.doctor.packages import check_packages, declared
from dqn_fast.process import command


@command()
def main() -> int:
    """Print one line per check; returns 0, or 1 if something is a fault, or 2 for bad input."""
    wanted = declared()
    packages = list(check_packages(wanted))
    if any(finding.words.startswith("is not installed") for finding in packages):
        for finding in packages:
            print(finding)
        return 1

    # Imported now: these need all packages.
    from dqn_fast.doctor.command import checks, read_arguments
    from dqn_fast.settings import UsageError

    findings: list[Finding] = []
    try:
        args = read_arguments()
        for finding in _with_packages(packages, checks(args)):
            findings.append(finding)
            print(finding, flush=True)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    faults, notes = (sum(f.level == level for f in findings) for level in ("fault", "note"))
    print(f"{faults} fault(s), {notes} note(s)")
    if args.json:
        rows = [finding._asdict() for finding in findings]
        print(json.dumps({"faults": faults, "notes": notes, "findings": rows}))
    return 1 if faults else 0


def _with_packages(packages: list[Finding], rest: Iterator[Finding]) -> Iterator[Finding]:
    """All findings; `rest` comes to its first one before anything is printed, so bad input prints
    nothing."""
    first = next(rest)
    yield from packages
    yield first
    yield from rest


if __name__ == "__main__":
    sys.exit(main())
