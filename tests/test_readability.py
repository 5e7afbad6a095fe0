"""One vector step can be followed: how many files and lines of code it runs through."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import dqn_fast
from dqn_fast.setup import setup
from dqn_fast.train import Args

PACKAGE = Path(dqn_fast.__file__).parent


def lines_of_code(path: Path) -> set[int]:
    """Lines that hold code: no comments, blank lines or docstrings."""
    module = ast.parse(path.read_text())
    docstrings = {
        line
        for node in ast.walk(module)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    text = path.read_text().splitlines()
    return {
        i
        for i, line in enumerate(text, 1)
        if i not in docstrings and line.strip() and not line.strip().startswith("#")
    }


def executed(function: Any, *args: Any) -> dict[str, set[int]]:
    """Lines of the package, by file, that a call executes."""
    seen: dict[str, set[int]] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE):
            return None
        seen.setdefault(str(path.relative_to(PACKAGE)), set()).add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return seen


def test_a_default_vector_step_runs_through_five_files_and_200_lines():
    """From `obs` to the target network, with act, step, store, sample, loss, Adam."""
    training = setup(Args(total_timesteps=3_000, train_freq=64, engine="eager"))
    for chunk, steps, updates in training.inputs():
        last = (steps, updates, chunk.update_counts)
        training.runner(*last)
    step = type(last[0])(*(t[0] for t in last[0]))
    update = type(last[1])(*(None if t is None else t[0] for t in last[1]))
    seen = executed(training.dqn.vector_step_, training.state, step, [update])
    lines = {name: found & lines_of_code(PACKAGE / name) for name, found in seen.items()}
    files = {name for name, found in lines.items() if found}
    assert files == {
        "dqn.py",
        "networks.py",
        "heads.py",
        "replay.py",
        "envs/core.py",
        "envs/line_world.py",
    }
    assert sum(map(len, lines.values())) <= 200
    assert len(updates.rows) > 0
