"""Vectorised, device-resident deep Q-learning in PyTorch.

Gymnasium knows the tensor environments, as `dqn_fast/LineWorld-v0` and so on, in every process that
imports both packages, in either order.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_REGISTERED = ("Acrobot-v1", "CartPole-v1", "LineWorld-v0", "MountainCar-v0")
_MODULE = "dqn_fast.envs.to_gymnasium"


def _register() -> None:
    """Make the tensor environments known to Gymnasium, by names: nothing is imported for it."""
    from gymnasium.envs.registration import register, registry

    for env_id in _REGISTERED:
        if f"dqn_fast/{env_id}" not in registry:
            register(
                f"dqn_fast/{env_id}",
                entry_point=f"{_MODULE}:TensorSingleEnv",
                vector_entry_point=f"{_MODULE}:TensorVectorEnv",
                kwargs={"env": env_id},
            )


class _RegisterOnImport(MetaPathFinder):
    """Registers when Gymnasium is imported: training does not need it, so it does not import it."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Gymnasium's spec, as the other finders give it, with a loader that registers as well."""
        if name != "gymnasium" or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "gymnasium" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
