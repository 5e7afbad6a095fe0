"""Which engine is chosen, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from dqn_fast.engines import EngineChoice, choose_engine, without_compiler
from dqn_fast.engines.choice import AUTO_COMPILE, AUTO_FUSE

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "num_updates", "expected"),
    [
        ("eager", 10**9, ("eager", False)),
        ("compile", 1, ("compile", True)),
        ("fused", 1, ("fused", False)),
        ("graph", 1, ("fused", True)),
        ("auto", AUTO_FUSE - 1, ("eager", False)),
        ("auto", AUTO_FUSE, ("fused", False)),
        ("auto", AUTO_COMPILE, ("fused", True)),
    ],
)
@pytest.mark.parametrize("on_host", [False, True])
def test_the_choice_on_a_cpu(name, num_updates, expected, on_host):
    """auto fuses where gradient steps are many, and compiles what cannot be fused where they are
    very many; graph needs a GPU."""
    choice = choose_engine(name, CPU, num_updates, on_host)
    assert (choice.engine, choice.compiled) == expected
    assert choice.reason


@pytest.mark.parametrize("name", ["auto", "fused", "compile", "graph", "eager"])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_no_compiler_is_never_an_error(name, device, monkeypatch):
    """Without a compiler every engine is eager, and the reason says why."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    choice = choose_engine(name, torch.device(device), 10**9)
    assert (choice.engine, choice.compiled) == ("eager", False)
    assert name == "eager" or "compiler" in choice.reason


@pytest.mark.parametrize(
    ("name", "num_updates", "on_host", "engine"),
    [
        ("auto", 10, False, "fused"),
        ("auto", 10**9, False, "fused"),
        ("graph", 10, False, "graph"),
        ("auto", 10, True, "fused"),
        ("auto", 10**9, True, "fused"),
        ("fused", 10, False, "fused"),
        ("fused", 10, True, "fused"),
        ("compile", 10, False, "compile"),
    ],
)
def test_the_choice_on_a_gpu(name, num_updates, on_host, engine, monkeypatch):
    """Everything is fused; a graph in its place holds compiled kernels in long runs."""
    monkeypatch.setattr("dqn_fast.engines.choice.why_not_compiled", lambda device: None)
    choice = choose_engine(name, torch.device("cuda"), num_updates, on_host)
    assert choice.engine == engine
    if engine != "compile":
        assert choice.compiled == (num_updates > 10 or name == "graph")


@pytest.mark.parametrize(
    ("engine", "left"), [("graph", "graph"), ("compile", "eager"), ("fused", "fused")]
)
def test_without_the_compiler_a_graph_stays(engine, left):
    """With plain kernels; compiled functions outside a graph become plain ones; what is generated
    needs no copy of the state."""
    choice = without_compiler(EngineChoice(engine, True, "asked for"), "too little memory")
    assert (choice.engine, choice.compiled) == (left, False)
    assert engine == "fused" or "too little memory" in choice.reason
