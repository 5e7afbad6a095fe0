"""Importing the package makes its environments known to Gymnasium, without importing Gymnasium."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dqn_fast
from dqn_fast.envs import TENSOR_ENVS

CHECKOUT = Path(__file__).parent.parent


def run(code: str, cwd: Path) -> None:
    """Run `code` in a process that has the checkout on its path, with warnings as errors."""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "error"},
        check=True,
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import dqn_fast, gymnasium",
        "import gymnasium, dqn_fast",
        # Asking whether it could be imported is not importing it.
        "import dqn_fast, importlib.util; importlib.util.find_spec('gymnasium'); import gymnasium",
        "import importlib, dqn_fast; importlib.reload(dqn_fast); import gymnasium",
        "import gymnasium, importlib, dqn_fast; importlib.reload(dqn_fast)",
        "import gymnasium; gymnasium.spec('CartPole-v1'); import dqn_fast.noise",
    ],
)
def test_both_import_orders_register(imports, tmp_path):
    """Whichever is imported first, each environment is there once, and without a warning."""
    run(
        f"{imports}\n"
        "ids = {i for i in gymnasium.registry if i.startswith('dqn_fast/')}\n"
        f"assert ids == { ({f'dqn_fast/{env_id}' for env_id in TENSOR_ENVS})!r}, ids\n"
        "import sys\n"
        "assert not [f for f in sys.meta_path if type(f).__module__ == 'dqn_fast'], sys.meta_path\n"
        "assert 'dqn_fast.envs' not in sys.modules and gymnasium.__spec__.loader is not None\n",
        tmp_path,
    )


def test_training_does_not_import_gymnasium(tmp_path):
    """The import costs a fifth of a second that a run on tensors does not need."""
    run("import sys, dqn_fast.train; assert 'gymnasium' not in sys.modules", tmp_path)


def test_every_tensor_environment_is_registered():
    """The names that the package registers are those of its table."""
    assert set(dqn_fast._REGISTERED) == set(TENSOR_ENVS)
