"""Where a run computes, and under which conditions: device, threads, precision, transfers."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, Literal, TypeVar

import numpy as np
import torch

MatmulPrecision = Literal["highest", "high"]
T = TypeVar("T")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def choose_device(name: str) -> torch.device:
    """The device that `name` stands for.

    Args:
        name: "auto" for CUDA where there is a card, else the CPU; a device in torch's words, "cpu",
            "cuda" for the current card, "cuda:1", "mps"; or a card's name or a part of it, "H100",
            "rtx 4090", whatever its case and spaces: of several equal cards the first.

    Returns:
        The device; of CUDA with its number.

    Raises:
        ValueError: no such device here, or cards of several models have names like this; the
            message names them.
    """
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = None
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        number = device.index or 0 if device is not None and device.type == "cuda" else None
        if number is not None and number < torch.cuda.device_count():  # full, or another's
            why = f"cannot be used, {first_line(error)}"
            raise ValueError(f"--device {asked}: {why}") from error
        return _card_called(name, error)
    if device.type == "meta":  # torch's stand-in that computes nothing
        raise _no_device(name)
    if device.type == "cuda" and ":" not in name:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _card_called(name: str, error: Exception) -> torch.device:
    """The first CUDA card whose name holds `name`; `error` says why that is no device."""
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    asked, plain = _letters(name), [_letters(card) for card in cards]
    if asked == "" or (asked.isdigit() and len(asked) < 3):  # 1 is in every "H100"
        raise _no_device(name) from error
    found = [i for i, card in enumerate(plain) if card == asked]
    found = found or [i for i, card in enumerate(plain) if asked in card]
    if not found:
        raise _no_device(name) from error
    if len({cards[i] for i in found}) > 1:
        which = ", ".join(f"cuda:{i} ({cards[i]})" for i in found)
        raise ValueError(f"--device {name}: must name one model; it may be {which}") from error
    return torch.device("cuda", found[0])


def _letters(name: str) -> str:
    """Letters and digits of a name in lower case; spellings of a name differ in the rest."""
    return "".join(filter(str.isalnum, name.casefold()))


def _no_device(name: str) -> ValueError:
    cards = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    have = ["auto", "cpu", *(f"cuda:{i} ({card})" for i, card in enumerate(cards))]
    have += ["mps"] if torch.backends.mps.is_available() else []
    return ValueError(f"--device {name}: not available here; there is {', '.join(have)}")


@contextmanager
def run_conditions(
    num_threads: int,
    device: torch.device | str = "cpu",
    matmul_precision: MatmulPrecision = "highest",
) -> Iterator[None]:
    """Settings of the process for the time of a run; afterwards all are as before.

    Args:
        num_threads: CPU threads of torch; 0 leaves its own choice.
        device: becomes the current device, on which torch makes CUDA streams and graphs.
        matmul_precision: of float32 matrix products on a GPU.
    """
    device = torch.device(device)
    with (
        cpu_threads(num_threads),
        gc_frozen(),
        flush_denormals(),
        precision_of_products(matmul_precision if device.type == "cuda" else "highest"),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


class ProcessSetting(Generic[T]):
    """A setting of the whole process that several users share, who may end in any order.

    The user who began last decides. When all have ended, the setting has its first value again.
    """

    def __init__(self, read: Callable[[], T], write: Callable[[T], object]) -> None:
        self._read, self._write, self._lock = read, write, threading.Lock()
        self._before: list[list[T]] = []  # for each user, in the order in which they came

    @contextmanager
    def lent(self, value: T | None) -> Iterator[None]:
        """Set it within a context; None leaves it alone."""
        with self._lock:
            mine = [self._read()]
            self._before.append(mine)
            self._write(mine[0] if value is None else value)
        try:
            yield
        finally:
            with self._lock:
                place = next(i for i, other in enumerate(self._before) if other is mine)
                del self._before[place]
                if place < len(self._before):  # a later user is still there
                    self._before[place][0] = mine[0]
                else:
                    self._write(mine[0])


_precision = ProcessSetting[str](
    torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
)
_threads = ProcessSetting[int](torch.get_num_threads, torch.set_num_threads)


def precision_of_products(matmul_precision: MatmulPrecision) -> AbstractContextManager[None]:
    """Multiply float32 matrices in float32 ("highest") or, on a GPU that has it, in TF32 ("high").

    TF32 keeps 10 of the 23 bits of each factor's mantissa and adds in float32. The setting belongs
    to the process: of two runs at the same time the later one decides, except in graphs that are
    already captured.
    """
    return _precision.lent(matmul_precision)


def cpu_threads(number: int) -> AbstractContextManager[None]:
    """Let torch use `number` CPU threads; 0 leaves its own choice."""
    return _threads.lent(number or None)


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Keep Python's garbage collector from visiting the objects that exist now.

    torch alone makes half a million objects. A full collection visits them every few thousand
    gradient steps and takes 0.15 s. Objects that are made within the context are collected.
    """
    frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Let the CPU replace float32 numbers below 1e-38 by 0 in this thread.

    A CPU computes slowly with them. Adam's moments of a weight without gradients become so small:
    in LineWorld 38 % of the first moments after 2,000 gradient steps and 60 % after 20,000. They
    cost 6 % of the compiled loop.
    """
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # NumPy caches it; a first call with denormals flushed would warn
    smallest = torch.full((), torch.finfo(torch.float32).tiny)
    before = bool(smallest / 2 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def upload(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device` without waiting for it.

    From pageable memory the copy to a CUDA device would block, and CUDA's sync-debug mode would not
    report it.
    """
    if device.type != "cuda":
        return array.to(device)
    return array.pin_memory().to(device, non_blocking=True)
