"""Versions of Python and of packages, against the ranges that this package declares.

Imports nothing but the standard library, so that it works where packages are missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dqn_fast.doctor.findings import Finding, Level, fault, note, ok

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
NOT_SHOWN = ("test", "dev")
"""Extras that only developers need."""


class Declared(NamedTuple):
    """What a package declares in its metadata.

    Attributes:
        python: range of Python versions, such as ">=3.11".
        required: requirements, such as "torch>=2.11,<2.14".
        extras: requirements of each extra.
    """

    python: str
    required: list[str]
    extras: dict[str, list[str]]


def declared(project: Path = PROJECT) -> Declared | None:
    """Requirements of this package: of the checkout that it runs from, else as installed; None: it
    is neither."""
    try:
        table = tomllib.loads(project.read_text())["project"]
        if table["name"] == "dqn_fast":
            extras = table.get("optional-dependencies", {})
            return Declared(table["requires-python"], table["dependencies"], extras)
    except (OSError, KeyError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        pass
    try:
        metadata: Any = importlib.metadata.metadata("dqn_fast")
    except importlib.metadata.PackageNotFoundError:
        return None
    required: list[str] = []
    extras = {}
    for line in metadata.get_all("Requires-Dist") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra *== *['\"]([^'\"]+)", marker)
        place = extras.setdefault(extra[1], []) if extra else required
        place.append(requirement.strip())
    return Declared(metadata.get("Requires-Python") or "", required, extras)


def check_packages(wanted: Declared | None) -> Iterator[Finding]:
    """Compare the installed versions with `wanted`."""
    if wanted is None:
        yield note(
            "packages",
            "dqn_fast is not installed, so the ranges of its packages are not known: run "
            "pip install -e . in its checkout",
        )
        return
    words = f"{platform.python_version()}, needs {wanted.python}"
    level = _level(platform.python_version(), wanted.python)
    yield Finding(level, "python", words)
    fine: list[str] = []
    for requirement in wanted.required:
        yield from _check_package(requirement, fine)
    if fine:
        yield ok("packages", ", ".join(fine))
    found: list[str] = []
    missing: list[str] = []
    for extra, requirements in wanted.extras.items():
        if extra in NOT_SHOWN:
            continue
        for requirement in requirements:
            name, version, allowed = _installed(requirement)
            if name in map(_name, wanted.required):
                continue
            if version is None:
                missing.append(f'{name} (pip install -e ".[{extra}]")')
            elif _level(version, allowed) != "ok":
                yield note(name, f"{version} is outside of {allowed}, which extra {extra} needs")
            else:
                found.append(f"{name} {version}")
    words = ", ".join(found) or "none"
    yield ok("extras", words + (f"; not installed: {', '.join(missing)}" if missing else ""))


def _check_package(requirement: str, fine: list[str]) -> Iterator[Finding]:
    """A finding if a required package is missing or out of range, else a word in `fine`."""
    name, version, allowed = _installed(requirement)
    if version is None or importlib.util.find_spec(name) is None:
        yield fault(name, f"is not installed: pip install '{requirement}'")
        return
    match _level(version, allowed):
        case "ok":
            fine.append(f"{name} {version}")
        case "note":
            words = f"{version} is newer than tested ({allowed}): if it fails, "
            yield note(name, f"{words}pip install '{requirement}'")
        case "fault":
            words = f"{version} is too old, {allowed} is needed: "
            yield fault(name, f"{words}pip install '{requirement}'")


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _installed(requirement: str) -> tuple[str, str | None, str]:
    """Name, installed version or None, and allowed range of a requirement."""
    name = _name(requirement)
    allowed = re.sub(r"^\[[^]]*\]", "", requirement[len(name) :]).strip()
    try:
        return name, importlib.metadata.version(name), allowed
    except importlib.metadata.PackageNotFoundError:
        return name, None, allowed


def _level(version: str, allowed: str) -> Level:
    """ "ok" inside the range, "note" above it or if that cannot be told, "fault" below it."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return "note"
    outside = [s for s in SpecifierSet(allowed) if not s.contains(version, prereleases=True)]
    if not outside:
        return "ok"
    return "note" if all(s.operator in ("<", "<=") for s in outside) else "fault"
