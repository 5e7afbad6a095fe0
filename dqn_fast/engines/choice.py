"""Which engine runs a training run, and why."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass, replace
from typing import Literal

import torch

EngineName = Literal["auto", "eager", "fused", "compile", "graph"]

AUTO_FUSE = 2_000
"""Gradient steps of a run from which `auto` generates its program on a CPU. A vector step with one
gradient step takes 0.9 ms eager and 0.12 ms generated, and the program is there after 1.7 s."""

AUTO_COMPILE = 65_536
"""Gradient steps of a run from which `auto` compiles on a CPU what cannot be fused, and waits for
the 30 to 40 s that this takes. The numbers are fixed so that a run can be repeated."""

AUTO_COMPILE_ON_CUDA = 100_000
"""Gradient steps of a run from which `auto` compiles before it captures on a GPU. A vector step
with one gradient step takes 990 us with plain kernels and 390 us with compiled ones (H100; 813 and
273 us with 132 members), so 100,000 of them save the minute that compiling takes."""


class EngineUnavailableError(RuntimeError):
    """An engine cannot run on this machine; the message says why, in a few words."""


class StopRequested(Exception):
    """The run was asked to stop while it waited for the compiler; the state was not written."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine executes a run.

    Attributes:
        engine: "eager", "fused", "compile" or "graph".
        compiled: whether functions are compiled; a graph then holds compiled kernels, and a run
            that cannot be fused is compiled.
        reason: why, in a few words.
    """

    engine: EngineName
    compiled: bool
    reason: str


def choose_engine(
    name: EngineName, device: torch.device, num_updates: int, on_host: bool = False
) -> EngineChoice:
    """The engine that `name` stands for, and why.

    Args:
        name: value of --engine. If the engine is not available on this machine, the next best one
            is used and `reason` says why.
        device: of the run.
        num_updates: gradient steps to come.
        on_host: whether the environment lives outside torch, which no graph can capture.
    """
    missing = why_not_compiled(device)
    steps = f"{num_updates:,} gradient steps"
    if name == "fused" and device.type not in ("cpu", "cuda"):
        choice = choose_engine("auto", device, num_updates, on_host)
        return replace(choice, reason=f"fused is not available on {device.type}; {choice.reason}")
    if name == "eager":
        return EngineChoice("eager", False, "asked for")
    if name == "compile":
        if missing:
            return EngineChoice("eager", False, f"compile is not available: {missing}")
        return EngineChoice("compile", True, "asked for")
    if device.type == "cuda" and name in ("auto", "fused"):
        # Compiled kernels are for a graph that takes its place.
        compiled = missing is None and num_updates >= AUTO_COMPILE_ON_CUDA
        return EngineChoice("fused", compiled, "asked for" if name == "fused" else "CUDA")
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
            return EngineChoice("eager", False, f"graph is not available: {where}; {missing}")
        engine: EngineName = "fused" if device.type == "cpu" else "compile"
        return EngineChoice(engine, True, f"graph is not available: {where}")
    if missing:
        if name == "fused":
            missing = f"fused is not available: {missing}"
        return EngineChoice("eager", False, missing)
    compiled = num_updates >= AUTO_COMPILE
    if name == "fused":
        return EngineChoice("fused", compiled, "asked for")
    if num_updates < (AUTO_FUSE if device.type == "cpu" else AUTO_COMPILE):
        return EngineChoice("eager", False, f"{steps} take no longer than compiling")
    engine = "fused" if device.type == "cpu" else "compile"
    return EngineChoice(engine, compiled, f"{steps} pay for compiling")


def without_compiler(choice: EngineChoice, why: str) -> EngineChoice:
    """The choice with plain functions in place of compiled ones; a graph stays a graph, and a
    generated program, which needs no copy of the state, is generated."""
    if choice.engine == "graph":
        return EngineChoice("graph", False, f"plain kernels, {why}")
    if choice.engine == "fused":
        return replace(choice, compiled=False)
    return EngineChoice("eager", False, why)


def why_not_compiled(device: torch.device) -> str | None:
    """Reason why the compiler does not work for `device`; None if it works."""
    if device.type == "cpu":
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "no C++ compiler"
        return None
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "no Triton"
    return f"no compiler for {device.type}"
