"""Functions of tensors as one generated program: memory, constants, the cache, refusals."""

from __future__ import annotations

import pytest
import torch

from dqn_fast.engines.choice import EngineUnavailableError
from dqn_fast.engines.fused import calls
from dqn_fast.engines.fused.calls import Call, generate

SQUARES = torch.arange(5).square()
STATE = {"total": torch.zeros(1, dtype=torch.int64)}


def add_(state, index):
    """Add a constant of the table; returns the total and its double."""
    state["total"].add_(SQUARES[index])
    return state["total"], 2 * state["total"]


def clear_(state):
    state["total"].zero_()
    return ()


CALLS = {
    "add": Call(add_, STATE, (torch.zeros(1, dtype=torch.int64),)),
    "clear": Call(clear_, STATE, ()),
}


def test_calls_write_the_state_and_their_results():
    """Two functions share a state; each call reads the inputs as they are by then."""
    program = generate(CALLS, None)
    state, index, first, second = (torch.zeros(1, dtype=torch.int64) for _ in range(4))
    add = program.bind("add", [state, index, first, second])
    clear = program.bind("clear", [state])
    for number, total in ((3, 9), (4, 25), (0, 25)):
        index.fill_(number)
        add()
        assert [t.item() for t in (state, first, second)] == [total, total, 2 * total]
    clear()
    assert state.item() == 0


def test_a_program_is_compiled_once(monkeypatch):
    """This process, and after it the cache, has the program; other constants are another one."""
    one = generate(CALLS, None)
    assert generate(CALLS, None) is one
    monkeypatch.setattr(calls, "_programs", {})
    with monkeypatch.context() as patch:
        patch.setattr(calls, "Build", None)  # nothing compiles
        assert generate(CALLS, None) is not one
    monkeypatch.setitem(globals(), "SQUARES", SQUARES + 1)
    program = generate(CALLS, None)
    state, index, first, second = (torch.zeros(1, dtype=torch.int64) for _ in range(4))
    program.bind("add", [state, index, first, second])()
    assert state.item() == 1


def test_with_an_identity_nothing_is_traced_again(monkeypatch):
    """The identity and the sources name the program."""
    one = generate(CALLS, ["squares", 1])
    with monkeypatch.context() as patch:
        patch.setattr(calls, "trace", None)
        assert generate(CALLS, ["squares", 1]) is one
        with pytest.raises(EngineUnavailableError, match="cannot be traced"):
            generate(CALLS, ["squares", 2])


def test_a_function_that_reads_numbers_is_refused():
    """The error names the reason."""

    def branch(state):
        return state["total"] + (1 if state["total"].item() else 2)

    with pytest.raises(EngineUnavailableError, match="a number of a tensor is read"):
        generate({"branch": Call(branch, STATE, ())}, None)


def test_without_a_compiler(monkeypatch):
    """It is an error that callers expect."""
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    with pytest.raises(EngineUnavailableError, match="no C\\+\\+ compiler"):
        generate(CALLS, None)
