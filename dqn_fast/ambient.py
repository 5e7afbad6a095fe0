"""State of the process that a program may have set before it calls this package.

`standard_state` runs a function under torch's and NumPy's own defaults, whatever the program has
set, so that a run is the same in every program. `global_numbers` seeds the random generators of the
process, from which some environments draw. Both leave everything as they found it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from dqn_fast.device import ProcessSetting

P = ParamSpec("P")
T = TypeVar("T")
_dtype = ProcessSetting[torch.dtype](torch.get_default_dtype, torch.set_default_dtype)
_anomalies = ProcessSetting[bool](torch.is_anomaly_enabled, torch.set_anomaly_enabled)


def _algorithms() -> tuple[bool, bool]:
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), only_warns


def _set_algorithms(flags: tuple[bool, bool]) -> None:
    if flags != _algorithms():  # torch imports its compiler to set them
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])


_deterministic = ProcessSetting[tuple[bool, bool]](_algorithms, _set_algorithms)


@contextmanager
def standard_state() -> Iterator[None]:
    """Compute as in a process that has changed no setting of torch or NumPy.

    These are standard then: default dtype and device, gradients, inference mode, autocast, anomaly
    detection, deterministic algorithms and NumPy's errors. Default dtype, anomaly detection and
    algorithms belong to the whole process, so other threads see them change.
    """
    with ExitStack() as stack:
        stack.enter_context(_dtype.lent(torch.float32))
        stack.enter_context(_anomalies.lent(False))
        stack.enter_context(_deterministic.lent((False, False)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def in_standard_state(function: Callable[P, T]) -> Callable[P, T]:
    """`standard_state` for a function that is called often: without cost where nothing differs."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _is_standard():
            return function(*args, **kwargs)
        with standard_state():
            return function(*args, **kwargs)

    return call


def _is_standard() -> bool:
    """Whether the settings are standard that can change results without gradients."""
    return (
        torch.get_default_dtype() is torch.float32
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
        and not torch.are_deterministic_algorithms_enabled()
        and torch.get_default_device().type == "cpu"
    )


# ------------------------------------------------------------------------- global random numbers


def global_states() -> tuple[Any, Any, torch.Tensor]:
    """States of the generators of `random`, `numpy.random` and torch's on the CPU."""
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002


def set_global_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Give the generators the states that `global_states` returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.default_generator.set_state(states[2])


def seed_global_numbers(*seed: int) -> None:
    """Seed these generators; each number of `seed` is at least 0."""
    words = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]))


def derived_seed() -> int:
    """A seed that follows from the state of `random`'s generator, which stays as it is."""
    generator = random.Random()
    generator.setstate(random.getstate())
    return generator.getrandbits(32)


_numbers = ProcessSetting[tuple[Any, Any, torch.Tensor]](global_states, set_global_states)


def global_numbers_kept() -> AbstractContextManager[None]:
    """Leave the generators as they were before this context."""
    return _numbers.lent(None)


@contextmanager
def global_numbers(*seed: int) -> Iterator[None]:
    """Let the generators start from a seed; afterwards they are as before.

    They belong to the whole process: of two runs at the same time, neither repeats if its
    environment draws from them.
    """
    with global_numbers_kept():
        seed_global_numbers(*seed)
        yield
