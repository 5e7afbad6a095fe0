"""How the functions of a vector step are run: the same functions, whatever the engine.

What an engine may rely on, and the tests hold the step to: every tensor that lives longer than a
chunk keeps its address, noise and schedules come in as tensors, and nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

EngineName = Literal["auto", "eager"]


def choose_engine(name: EngineName) -> tuple[str, str]:
    """The engine that `name` stands for, and why, in a few words."""
    if name == "auto":
        return "eager", "the only engine of this version"
    return name, "asked for"


def choose_device(name: str) -> torch.device:
    """The device that `name` stands for; "auto" takes CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu"]
        have += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        have += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(
            f"--device {name}: not to be had here; there is auto, {', '.join(have)}"
        ) from error
    return device


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch use so many CPU threads; 0 leaves its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def upload(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device` without waiting for it.

    From pageable memory the copy to a CUDA device would block, and sync-debug mode would not say.
    """
    if device.type != "cuda":
        return array.to(device)
    return array.pin_memory().to(device, non_blocking=True)
