"""Functions that are traced and compiled: whole, with nothing baked in, and kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from dqn_fast import tree
from dqn_fast.algorithm import StepInputs, UpdateInputs
from dqn_fast.engines import EngineUnavailableError, compiler
from dqn_fast.engines.compiler import Compiler, Traced, inductor_options
from dqn_fast.setup import setup
from dqn_fast.train import Args
from tests.engines.runs import CASES, assert_equal, copy_of

# Its process compiles what the tests of runs need while these trace.
pytestmark = pytest.mark.usefixtures("compiling")

# ------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("env_id", ["LineWorld-v0", "CartPole-v1", "FrozenLake-v1"])
def test_a_vector_step_traces_whole_and_bakes_nothing_in(env_id):
    """The traced function gives what the plain one gives, and every scheduled number is an input:
    each of them changed changes the result alike (trap 11). Tracing itself writes nothing
    (trap 12), and the constants of a function are neither carried nor written."""
    args = Args.for_env(env_id, num_envs=16, hidden_sizes=(8,), batch_size=8, eps_repeat=0.0)
    args = replace(args, train_freq=16, gradient_steps=1, learning_starts=64, buffer_size=200)
    training = setup(replace(args, device="cpu", engine="eager"))
    dqn, state = training.dqn, training.state
    for chunk, steps, updates in training.inputs():
        if chunk.num_updates:
            break
        training.runner(steps, updates, chunk.update_counts)
    step = StepInputs(*(t[0] for t in steps))
    update = UpdateInputs(*(t[0] for t in tree.leaves(updates)))._replace(sync=torch.tensor([0.5]))
    before = copy_of(state)
    traces = Compiler(state)
    graph, constants = traces.trace(Traced("step", dqn.vector_step_, (step, [update])))
    results = traces.results["step"]
    assert_equal(before, state)
    addresses = {tensor.data_ptr() for tensor in tree.leaves(state)}
    assert not addresses & {constant.data_ptr() for constant in constants}
    constants_before = [constant.clone() for constant in constants]

    baseline, settings = None, ("step_size", "inverse_correction", "sync", "gamma", "norm")
    for change in ("nothing", "epsilon", *settings):
        ours, theirs = copy_of(state), copy_of(state)
        new_step, new_update = step, update
        if change == "epsilon":
            new_step = step._replace(epsilon=1.0 - step.epsilon.round())
        elif change in UpdateInputs._fields:
            new_update = update._replace(**{change: getattr(update, change) * 0.5 + 0.1})
        for one in (ours, theirs):
            if change == "gamma":
                one.hyper.gamma.fill_(0.3)
            elif change == "norm":
                one.hyper.max_grad_norm.fill_(1e-4)
        record = dqn.vector_step_(ours, new_step, [new_update])
        with torch.no_grad():
            inputs = tree.leaves((new_step, new_update, results))
            graph(*(t.detach() for t in tree.leaves(theirs)), *inputs, *constants)
        ours, theirs = ([t.detach() for t in tree.leaves(one)] for one in (ours, theirs))
        plain, traced = [*tree.leaves(record), *ours], [*tree.leaves(results), *theirs]
        for a, b in zip(plain, traced, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        baseline = baseline or plain
        same = [torch.equal(a, b) for a, b in zip(plain, baseline, strict=True)]
        same = same[: -len(state.hyper)]  # the last tensors are the settings themselves
        assert all(same) == (change == "nothing"), change
    assert_equal(constants_before, constants)


@pytest.mark.parametrize("env_id", ["LineWorld-v0", "FrozenLake-v1"])
def test_examples_have_the_shapes_of_the_real_inputs(env_id):
    """What is compiled for is what comes: shapes, dtypes and strides."""
    args = Args.for_env(env_id, num_seeds=3, num_envs=1, total_timesteps=600, batch_size=8)
    training = setup(replace(args, device="cpu", engine="eager"))
    chunks = training.inputs()
    steps, updates = next(inputs for chunk, *inputs in chunks if chunk.num_updates)
    examples = tree.leaves(training.dqn.example_inputs(torch.device("cpu")))
    for example, tensor in zip(examples, tree.leaves((steps, updates)), strict=True):
        assert example.dtype == tensor.dtype
        assert example.shape == tensor[0].shape
        assert tensor[0].is_contiguous()


# ------------------------------------------------------------------------- indices have 32 bits

SHAPES_ONLY = (
    "view", "squeeze", "expand", "slice", "select", "clone", "convert_element_type", "_to_copy",
    "alias", "permute", "transpose", "detach", "broadcast", "copy",
)  # fmt: skip


def find_numbers_in_arithmetic(graph: torch.fx.GraphModule, constants: list[Tensor]) -> list[str]:
    """Operations that calculate in 64-bit integers with an `arange` made in the same graph.

    Inductor makes of it the index of a GPU's kernel, which has 32 bits whatever the dtype says; so
    such a result is wrong beyond 2**31 (trap 19). Comparisons and floats are no matter.
    """
    table = {**select_decomp_table()}
    lifted = iter(constants)
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    with values[0].fake_mode as mode:
        inputs = [mode.from_tensor(next(lifted)) if v is None else v for v in values]
        lowered = make_fx(graph, table)(*inputs)
    found: list[str] = []
    for traced in (graph, lowered):
        indices: set[torch.fx.Node] = set()
        for node in traced.graph.nodes:
            name = str(node.target)
            value = node.meta.get("val")
            if name.startswith(("aten.arange", "prims.iota")):
                indices.add(node)
            elif indices.intersection(node.all_input_nodes) and isinstance(value, Tensor):
                if value.dtype != torch.int64 or "index" in name or "gather" in name:
                    continue
                indices.add(node)
                if not any(word in name for word in SHAPES_ONLY):
                    found.append(f"{name} in {node.stack_trace or node}")
    return found


# The others trace the same lines for other shapes.
DIFFERENT = ("members", "several updates a step", "held", "table", "host")


@pytest.mark.parametrize(
    "case", [c if c in DIFFERENT else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_no_index_of_a_kernel_takes_part_in_64_bit_arithmetic(case, monkeypatch):
    """In the traced graphs of every kind of run: noise, vector step, gradient step."""
    functions: list[Traced] = []
    compilers: list[Compiler] = []

    def start(self: Compiler, given: list[Traced]) -> None:
        functions.extend(given)
        compilers.append(self)
        for traced in given:
            self.results[traced.name] = self._find_results(traced)

    monkeypatch.setattr(Compiler, "start", start)
    monkeypatch.setattr(Compiler, "finish", lambda self: [])
    setup(replace(CASES[case], engine="compile")).close()
    assert functions[-1].name == "draw"
    monkeypatch.setattr(compiler, "_decompositions", lambda device: {})  # as on a GPU
    for traced in functions:
        assert find_numbers_in_arithmetic(*compilers[0].trace(traced)) == []


def test_numbers_in_arithmetic_are_found():
    """Through views, and in what Inductor makes of an operation; not in comparisons."""

    def function(x: Tensor) -> list[Tensor]:
        number = torch.arange(4)[:, None].expand(4, 2)
        return [(number == 2).long() + x, number.float(), x[number[:, 0]] * 2**40]

    def wrong(x: Tensor) -> list[Tensor]:
        return [torch.arange(4) * 0xD2511F53]

    for each, expected in ((function, 0), (wrong, 2)):
        x = torch.ones(4, 2, dtype=torch.int64)
        traced = Compiler(x).trace(Traced("each", each, ()))
        assert len(find_numbers_in_arithmetic(*traced)) == expected


# ------------------------------------------------------------------------------ what is compiled


def double_and_add_(x: Tensor, y: Tensor) -> Tensor:
    return x.mul_(2).add_(y).clone()


def test_every_function_is_compiled_once():
    """And one that two runs share is compiled for the first of them."""
    x = torch.ones(3)
    functions = [Traced(name, double_and_add_, (torch.ones(3),)) for name in ("one", "other")]
    several = Compiler(x)
    several.start(functions)
    assert several._process is not None
    jobs = several._process.args[3:]
    several.close()
    assert len(jobs) == len(set(jobs)) == 4


def test_damaged_packages_are_made_again(tmp_path):
    """They cost one run its compiled functions, not all the runs to come."""
    torch.save(torch.zeros(1_000), tmp_path / "whole.pt2")  # packages are archives of this kind
    damaged = (tmp_path / "whole.pt2").read_bytes()[:1_000]

    def start() -> Compiler:
        both = Compiler(torch.ones(3))
        both.start([Traced(name, double_and_add_, (torch.ones(3),)) for name in ("one", "other")])
        return both

    first = start()
    first.close()
    for package in first._packages:
        package.write_bytes(damaged)
    second = start()
    assert second._process is None  # as if they were compiled
    with pytest.raises(EngineUnavailableError, match="not loadable"):
        second.finish()
    assert not any(package.exists() for package in first._packages)
    third = start()
    assert third._process is not None  # they are compiled again
    third.close()


@pytest.mark.parametrize(
    ("version", "needed"),
    [("2.11.0+cu130", True), ("2.12.1", True), ("2.13.0+cpu", False), ("3.0.0a0", False)],
)
def test_options_are_those_that_a_version_needs(version, needed):
    """Of our own compilations only; torch's settings stay as they are."""
    assert bool(inductor_options(version)) == needed
    assert all(hasattr(torch._inductor.config, name) for name in inductor_options(version))
