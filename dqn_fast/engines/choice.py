"""Which engine runs a training run, and why."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch

EngineName = Literal["auto", "eager", "compile", "graph"]

AUTO_SWITCH = 16_384
"""Gradient steps after which `auto` changes over on a CPU. A fixed number, so that a run can be
repeated; compiling, 30 to 40 s on another core, is done by then or nearly so."""

AUTO_COMPILE_ON_CUDA = 100_000
"""Gradient steps from which `auto` waits for the compiler before it captures on a GPU: compiled
kernels save 0.6 ms a vector step with one gradient step (990 and 390 us on an H100, 813 and 273
with 132 members), so a minute of compiling pays from here on."""


class EngineUnavailableError(RuntimeError):
    """An engine cannot run here; the message says why, in a few words."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True)
class EngineChoice:
    """How a run is to be executed.

    Attributes:
        engine: "eager", "compile" or "graph".
        compiled: whether compiled functions are used, in or outside a graph.
        switch: gradient steps that are taken plainly before; None: no change in mid-run.
        reason: why, in a few words.
    """

    engine: EngineName
    compiled: bool
    reason: str
    switch: int | None = None


def choose_engine(
    name: EngineName, device: torch.device, num_updates: int, on_host: bool = False
) -> EngineChoice:
    """The engine that `name` stands for, and why.

    Args:
        name: what was asked for. If the engine is not available on this machine, the next best one
            is used and `reason` says why.
        device: of the run.
        num_updates: gradient steps to come.
        on_host: whether the environment lives outside torch, which no graph can capture.
    """
    missing = why_not_compiled(device)
    steps = f"{num_updates:,} gradient steps"
    if name == "eager":
        return EngineChoice("eager", False, "asked for")
    if name == "compile":
        if missing:
            return EngineChoice("eager", False, f"compile cannot be had: {missing}")
        return EngineChoice("compile", True, "asked for")
    if device.type == "cuda" and not on_host:
        pays = num_updates >= AUTO_COMPILE_ON_CUDA
        compiled = missing is None and (pays or name == "graph")
        what = "compiled kernels" if compiled else "plain kernels"
        if name == "auto":
            what += f", {steps} {'pay' if pays else 'do not pay'} for compiling"
        if missing:
            what = f"plain kernels, {missing}"
        return EngineChoice(
            "graph", compiled, f"{'asked for' if name == 'graph' else 'CUDA'}; {what}"
        )
    if name == "graph":
        where = "an environment on the host" if on_host else f"no CUDA graphs on {device.type}"
        if missing:
            return EngineChoice("eager", False, f"graph cannot be had: {where}; {missing}")
        return EngineChoice("compile", True, f"graph cannot be had: {where}")
    if missing:
        return EngineChoice("eager", False, missing)
    if num_updates < 2 * AUTO_SWITCH:
        return EngineChoice("eager", False, f"{steps} take no longer than compiling")
    return EngineChoice("compile", True, f"{steps}, the first {AUTO_SWITCH:,} eager", AUTO_SWITCH)


def without_compiler(choice: EngineChoice, why: str) -> EngineChoice:
    """The next best choice where compiled functions cannot be had: plain ones, in a graph if that
    was chosen."""
    if choice.engine == "graph":
        return EngineChoice("graph", False, f"plain kernels, {why}")
    return EngineChoice("eager", False, why)


def why_not_compiled(device: torch.device) -> str | None:
    """What the compiler lacks for `device`; None where it can be used."""
    if device.type == "cpu":
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "no C++ compiler"
        return None
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "no Triton"
    return f"no compiler for {device.type}"
