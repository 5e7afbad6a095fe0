"""Imports go one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dqn_fast"
# Each module may import those of earlier layers, and of its own.
LAYERS = (
    {
        "ambient",
        "code",
        "bellman",
        "device",
        "noise",
        "plan",
        "process",
        "settings",
        "sweep",
        "tree",
    },
    {"algorithm"},
    {"engines"},
    {"envs", "experiments"},
    {"heads", "networks", "replay"},
    {"dqn"},
    {"exact"},
    {"agent", "evaluate", "film", "memory", "record", "report"},
    {"resume", "setup"},
    {"train"},
    {"doctor"},
)


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere when it runs; imports for types alone are none."""
    modules = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    """No module imports a later layer, and nothing imports benchmarks, tests or scripts."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    modules = imported(path)
    assert not {m.split(".")[0] for m in modules} & {"benchmarks", "tests", "scripts"}
    inside = {m.split(".")[1] for m in modules if m.startswith("dqn_fast.")}
    if name == "__init__":
        assert inside <= {"process"}
        return
    (layer,) = (i for i, names in enumerate(LAYERS) if name in names)
    assert inside <= set().union(*LAYERS[: layer + 1])


def test_the_reference_shares_no_code():
    """The scalar loop that checks the fast one imports nothing of it."""
    path = PACKAGE.parent / "benchmarks" / "reference.py"
    assert not any(m.startswith("dqn_fast") for m in imported(path))


def test_engines_know_no_algorithm():
    """They import the protocol, and neither what learns nor what it learns in."""
    for path in (PACKAGE / "engines").rglob("*.py"):
        inside = {m.split(".")[1] for m in imported(path) if m.startswith("dqn_fast.")}
        assert not inside & {"dqn", "heads", "networks", "replay", "envs"}


def test_the_algorithm_knows_no_engine():
    """It may import them by its layer, and imports none of them."""
    assert not any(m.startswith("dqn_fast.engines") for m in imported(PACKAGE / "dqn.py"))
