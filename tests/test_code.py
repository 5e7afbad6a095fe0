"""Digests of loaded code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dqn_fast import bellman
from dqn_fast.code import digest_of

MODULES = ["dqn_fast.dqn", "dqn_fast.heads", "dqn_fast.envs.core"]


def test_processes_agree():
    """Whatever their seed of hashes, which orders sets."""
    code = f"import dqn_fast.dqn; from dqn_fast.code import digest_of; print(digest_of({MODULES}))"
    found = {digest_of(MODULES)}
    for seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        found.add(subprocess.check_output(command, env=environ, text=True).strip())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TabularMDP", type("TabularMDP", (bellman.TabularMDP,), {})),
        ("TabularMDP.from_transition_table", classmethod(lambda cls, *_: None)),
        ("A_NEW_CONSTANT", 3),
        ("a_new_function", lambda x, y=1: x + y),
    ],
)
def test_every_part_counts(name, value, monkeypatch):
    """A class, a method, a constant, a function."""
    before = digest_of(["dqn_fast.bellman"])
    with monkeypatch.context() as patch:
        patch.setattr(f"dqn_fast.bellman.{name}", value, raising=False)
        assert digest_of(["dqn_fast.bellman"]) != before
    assert digest_of(["dqn_fast.bellman"]) == before


def test_defaults_and_constants_of_functions_count(monkeypatch):
    """Functions that differ in a number, in a default or in the function inside."""
    found = set()
    for function in (
        lambda x: x + 1, lambda x: x + 2, lambda x=1: x + 1, lambda x: [y + 3 for y in x],
        lambda x: [y + 4 for y in x], lambda x: x in {1, 2}, lambda x: x in {1, 3},
    ):  # fmt: skip
        monkeypatch.setattr(bellman, "a_function", function, raising=False)
        found.add(digest_of(["dqn_fast.bellman"]))
    assert len(found) == 7
