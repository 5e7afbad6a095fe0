"""What all benchmarks share: the name of a result's file."""

from __future__ import annotations

import importlib
import sys

import pytest

from benchmarks.common import RESULTS, plain_name
from dqn_fast.settings import UsageError

WRITERS = [path.stem for path in RESULTS.parent.glob("*.py") if " out: Annot" in path.read_text()]
WORDS = {"learning": ["default"]}
"""Arguments that a benchmark needs."""


def test_benchmarks_that_write_a_result_are_found():
    """Seven of them, at least."""
    assert len(WRITERS) >= 7


@pytest.mark.parametrize("name", WRITERS, ids=lambda name: f"benchmarks.{name}")
def test_a_name_with_a_folder_is_refused_before_anything_is_measured(name, monkeypatch, capsys):
    """By every benchmark: one line, exit status 2, no table and no file."""
    before = sorted(RESULTS.rglob("*"))
    monkeypatch.setattr(sys, "argv", [name, *WORDS.get(name, []), "--out", "gone/mine"])
    assert importlib.import_module(f"benchmarks.{name}").main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --out gone/mine: must be a file name without a folder: ")
    assert err.count("\n") == 1
    assert sorted(RESULTS.rglob("*")) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/tmp/x", "a/", "a\\b", "a\0", ".a", "x" * 201])
def test_only_plain_names_are_taken(name):
    """Names that some file system does not have, or hides, are refused too."""
    with pytest.raises(UsageError, match=r"--out .*: must be a file name"):
        plain_name("--out", name)


@pytest.mark.parametrize("name", [None, "throughput", "h100-2.13_new", "x" * 200])
def test_plain_names_are_taken(name):
    """None writes no file."""
    plain_name("--out", name)
