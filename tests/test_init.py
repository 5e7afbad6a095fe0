"""Importing the package makes its environments known to Gymnasium."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        "import importlib, dqn_fast; importlib.reload(dqn_fast); import gymnasium",
        "import gymnasium, importlib, dqn_fast; importlib.reload(dqn_fast)",
    ],
)
def test_both_import_orders_register(imports, tmp_path):
    """Whichever is imported first: the environments of TENSOR_ENVS, each once, no warning, and
    nothing heavy imported for it."""
    run(
        f"{imports}\n"
        "ids = {i for i in gymnasium.registry if i.startswith('dqn_fast/')}\n"
        f"assert ids == { ({f'dqn_fast/{env_id}' for env_id in TENSOR_ENVS})!r}, ids\n"
        "import sys; assert 'torch' not in sys.modules\n",
        tmp_path,
    )
