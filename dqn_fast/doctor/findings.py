"""Results of checks."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["ok", "note", "fault"]


class Finding(NamedTuple):
    """Result of one check.

    Attributes:
        level: "ok"; "note", which a run survives; "fault", with which no run can be right.
        what: the thing that was checked, at most 20 characters.
        words: what was found and, unless it is ok, what to do.
    """

    level: Level
    what: str
    words: str

    def __str__(self) -> str:
        return f"{self.level:<5}  {self.what:<20}  {' '.join(self.words.split())}"


def ok(what: str, words: str) -> Finding:
    return Finding("ok", what, words)


def note(what: str, words: str) -> Finding:
    return Finding("note", what, words)


def fault(what: str, words: str) -> Finding:
    return Finding("fault", what, words)
