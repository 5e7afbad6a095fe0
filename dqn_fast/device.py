"""Where a run computes, and under which conditions: device, threads, precision, transfers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import numpy as np
import torch

MatmulPrecision = Literal["highest", "high"]


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
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
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
    """Letters and digits of a name in lower case: what people agree on."""
    return "".join(filter(str.isalnum, name.casefold()))


def _no_device(name: str) -> ValueError:
    cards = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    have = ["auto", "cpu", *(f"cuda:{i} ({card})" for i, card in enumerate(cards))]
    have += ["mps"] if torch.backends.mps.is_available() else []
    return ValueError(f"--device {name}: not to be had here; there is {', '.join(have)}")


@contextmanager
def run_conditions(
    num_threads: int,
    device: torch.device | str = "cpu",
    matmul_precision: MatmulPrecision = "highest",
) -> Iterator[None]:
    """What a run asks of its process; everything is put back as it was.

    Args:
        num_threads: CPU threads of torch; 0 leaves its own choice.
        device: where new CUDA streams and graphs are made, where there is a choice of cards.
        matmul_precision: of float32 matrix products on a GPU.
    """
    device = torch.device(device)
    with (
        cpu_threads(num_threads),
        collector_at_rest(),
        denormals_as_zero(),
        precision_of_products(matmul_precision if device.type == "cuda" else "highest"),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


@contextmanager
def precision_of_products(matmul_precision: MatmulPrecision) -> Iterator[None]:
    """Multiply float32 matrices in float32 ("highest"), or where a GPU has it in TF32 ("high"):
    10 instead of 23 bits of each factor's mantissa, sums in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch use so many CPU threads; 0 leaves its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep Python's garbage collector from walking what is there already.

    torch alone leaves half a million objects; walking them takes 0.15 s, every few thousand
    gradient steps. What is made meanwhile is collected as always.
    """
    frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Let this thread's CPU take numbers below 1e-38 for 0.

    It calculates slowly with them, and Adam's moments of a weight without gradients get there: in
    LineWorld 38 % of the first moments after 2,000 gradient steps and 60 % after 20,000, which cost
    6 % of the compiled loop.
    """
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # NumPy remembers it; asked later, it would warn
    smallest = torch.full((), torch.finfo(torch.float32).tiny)
    before = bool(smallest / 2 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def upload(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device` without waiting for it.

    From pageable memory the copy to a CUDA device would block, and sync-debug mode would not say.
    """
    if device.type != "cuda":
        return array.to(device)
    return array.pin_memory().to(device, non_blocking=True)
