"""Which engine is chosen, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from dqn_fast.engines import EngineChoice, choose_engine, without_compiler
from dqn_fast.engines.choice import AUTO_SWITCH

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "num_updates", "expected"),
    [
        ("eager", 10**9, ("eager", False, None)),
        ("compile", 1, ("compile", True, None)),
        ("graph", 1, ("compile", True, None)),
        ("auto", 2 * AUTO_SWITCH - 1, ("eager", False, None)),
        ("auto", 2 * AUTO_SWITCH, ("compile", True, AUTO_SWITCH)),
    ],
)
def test_the_choice_on_a_cpu(name, num_updates, expected):
    """auto compiles where gradient steps are many, beside the loop; graph needs a GPU."""
    choice = choose_engine(name, CPU, num_updates)
    assert (choice.engine, choice.compiled, choice.switch) == expected
    assert choice.reason


@pytest.mark.parametrize("name", ["auto", "compile", "graph", "eager"])
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
        ("auto", 10, False, "graph"),
        ("auto", 10**9, False, "graph"),
        ("graph", 10, False, "graph"),
        ("auto", 10, True, "eager"),
        ("compile", 10, False, "compile"),
    ],
)
def test_the_choice_on_a_gpu(name, num_updates, on_host, engine, monkeypatch):
    """Everything is captured but what lives on the host; long runs hold compiled kernels."""
    monkeypatch.setattr("dqn_fast.engines.choice.why_not_compiled", lambda device: None)
    choice = choose_engine(name, torch.device("cuda"), num_updates, on_host)
    assert choice.engine == engine
    if engine == "graph":
        assert choice.compiled == (num_updates > 10 or name == "graph")


@pytest.mark.parametrize(("engine", "left"), [("graph", "graph"), ("compile", "eager")])
def test_without_the_compiler_a_graph_stays(engine, left):
    """With plain kernels; compiled functions outside a graph become plain ones."""
    choice = without_compiler(EngineChoice(engine, True, "asked for", 100), "too little memory")
    assert (choice.engine, choice.compiled, choice.switch) == (left, False, None)
    assert "too little memory" in choice.reason
