"""Engines: one function, run plainly, compiled and captured, gives the same results."""

from __future__ import annotations

import gc
import json
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from dqn_fast.device import collector_at_rest, cpu_threads, run_conditions
from dqn_fast.engines import (
    AUTO_SWITCH,
    Captured,
    Compiler,
    CudaGraphs,
    EngineUnavailableError,
    Unit,
    choose_engine,
    inductor_options,
    leaves,
    refill,
)
from dqn_fast.engines import compiler as engine
from dqn_fast.envs import make_env
from dqn_fast.noise import Noise
from dqn_fast.record.checkpoint import load_checkpoint
from dqn_fast.train import (
    Args,
    CompiledChunk,
    Learner,
    Runner,
    StepInputs,
    StepRecord,
    UpdateInputs,
    chunk_,
    example_step_inputs,
    example_update_inputs,
    make_learner,
    make_plan,
    planned,
    train,
    vector_step_,
)

CPU = torch.device("cpu")
# Random play: actions do not follow from values, so that rounding cannot change the data.
RANDOM = Args(
    num_envs=16,
    train_freq=16,
    target_update_interval=16,
    batch_size=32,
    hidden_sizes=(32, 32),
    learning_starts=64,
    eps_end=1.0,
    total_timesteps=16_064,
    log_interval=512,
    eval_interval=0,
    checkpoint_interval=0,
    report=False,
    quiet=True,
)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Any:
    """A cache of compiled functions that begins empty and is shared by the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def carried(learner: Learner) -> list[Tensor]:
    return [tensor.detach() for tensor in learner.tensors()]


def run(
    args: Args, device: str = "cpu", num_updates: int = 10**9
) -> tuple[Tensor, Learner, Runner]:
    """Metrics of the first gradient steps, float32 [U, 4, M]; the learner; what ran it."""
    env, noise = make_env(args.env_id, args.env_params), Noise(args.seed, args.num_seeds, device)
    # Many windows, so that most of the noise comes from the engine under test too.
    plan = replace(make_plan(args, env), max_window_steps=75)
    learner = make_learner(args, env, noise)
    runner = Runner(args, learner, plan, noise)
    metrics: list[Tensor] = []
    for chunk, steps, updates in planned(args, env, noise, plan, runner.draw_noise):
        record = runner(steps, updates, chunk.update_counts)
        metrics.append(record.updates.clone())
        if sum(map(len, metrics)) >= num_updates:
            break
    runner.close()
    env.close()
    return torch.cat(metrics)[:num_updates], learner, runner


def assert_same_learning(ours: Any, theirs: Any, rtol: float, exact: bool = True) -> None:
    """Equal draws, and data, exactly or within rounding; equal losses within `rtol`."""
    assert len(ours[0]) == len(theirs[0]) > 0
    for a, b in zip(
        ours[1].replay.state_dict().values(), theirs[1].replay.state_dict().values(), strict=True
    ):
        if exact or not a.is_floating_point():
            assert torch.equal(a.cpu(), b.cpu())
        else:
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=1e-4)
    torch.testing.assert_close(ours[0].cpu(), theirs[0].cpu(), rtol=rtol, atol=1e-6)


# ------------------------------------------------------------------------------- which engine


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
    monkeypatch.setattr("dqn_fast.engines.why_not_compiled", lambda device: None)
    choice = choose_engine(name, torch.device("cuda"), num_updates, on_host)
    assert choice.engine == engine
    if engine == "graph":
        assert choice.compiled == (num_updates > 10 or name == "graph")


# ------------------------------------------------------------------------------------- tracing


def test_leaves_and_refill_are_inverse():
    """Tensors come out in order and go back into the same structure."""
    a, b, c = torch.zeros(3).unbind()
    nested = ([a, None], StepInputs(a, b, c, a), [UpdateInputs(c, b, a, b)])
    flat = leaves(nested)
    assert [t.data_ptr() for t in flat] == [t.data_ptr() for t in (a, a, b, c, a, c, b, a, b)]
    again = refill(nested, iter(flat))
    assert isinstance(again[1], StepInputs)
    assert again[0][1] is None
    assert all(x is y for x, y in zip(leaves(again), flat, strict=True))


@pytest.mark.parametrize("env_id", ["LineWorld-v0", "CartPole-v1", "FrozenLake-v1"])
def test_a_vector_step_traces_whole_and_bakes_nothing_in(env_id):
    """The traced function gives what the plain one gives, and every scheduled number is an input:
    each of them changed changes the result alike (trap 11). Tracing itself writes nothing
    (trap 12)."""
    args = Args.for_env(env_id, num_envs=16, hidden_sizes=(8,), batch_size=8, eps_repeat=0.0)
    args = replace(args, train_freq=16, gradient_steps=1, learning_starts=64, buffer_size=200)
    env, noise = make_env(args.env_id, args.env_params), Noise(0, 1)
    learner, plan = make_learner(args, env, noise), make_plan(args, env)
    for chunk, steps, updates in planned(args, env, noise, plan):
        if chunk.num_updates:
            break
        chunk_(learner, steps, updates, chunk.update_counts)
    step = StepInputs(*(t[0] for t in steps))
    update = UpdateInputs(*(t[0] for t in updates))._replace(sync=torch.tensor(0.5))
    before = [tensor.clone() for tensor in carried(learner)]
    compiler = Compiler(learner.tensors(), learner.with_tensors)
    results = StepRecord(torch.zeros(16), torch.zeros(16, dtype=torch.int32), [torch.zeros(4, 1)])
    graph, constants = compiler.trace(Unit("step", vector_step_, (step, [update]), results))
    assert all(torch.equal(a, b) for a, b in zip(before, carried(learner), strict=True))
    assert (env_id == "FrozenLake-v1") == bool(constants)

    baseline = None
    for change in ("nothing", "epsilon", "step_size", "root_scale", "sync", "gamma", "norm"):
        ours = learner.with_tensors([t.detach().clone() for t in learner.tensors()])
        theirs = learner.with_tensors([t.detach().clone() for t in learner.tensors()])
        new_step, new_update = step, update
        if change == "epsilon":
            new_step = step._replace(epsilon=1.0 - step.epsilon.round())
        elif change in UpdateInputs._fields:
            new_update = update._replace(**{change: getattr(update, change) * 0.5 + 0.1})
        for one in (ours, theirs):
            for param in one.q_net.params:
                param.requires_grad_()
            if change == "gamma":
                one.gamma.fill_(0.3)
            elif change == "norm":
                one.max_grad_norm.fill_(1e-4)
        record = vector_step_(ours, new_step, [new_update])
        with torch.no_grad():
            graph(*carried(theirs), *new_step, *new_update, *leaves(results), *constants)
        for a, b in zip(
            [*leaves(record), *carried(ours)], [*leaves(results), *carried(theirs)], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        baseline = baseline or carried(ours)
        same = [torch.equal(a, b) for a, b in zip(carried(ours), baseline, strict=True)]
        assert all(same) == (change == "nothing"), change


CASES = {
    "members": replace(RANDOM, num_seeds=3),
    "several updates a step": replace(RANDOM, train_freq=4, target_update_interval=20),
    "odd numbers": replace(RANDOM, num_envs=7, train_freq=3),
    "one copy": replace(RANDOM, num_envs=1, train_freq=1, total_timesteps=2_000),
    "double q": replace(RANDOM, env_id="CartPole-v1", double_q=True, env_params={}),
    "held": replace(RANDOM, env_id="MountainCar-v0", eps_repeat=0.5),
    "acrobot": replace(RANDOM, env_id="Acrobot-v1"),
    "table": replace(RANDOM, env_id="FrozenLake-v1"),
    "host": replace(RANDOM, env_id="gym:CartPole-v1", num_envs=4, total_timesteps=2_000),
}


def numbers_in_arithmetic(graph: torch.fx.GraphModule, constants: list[Tensor]) -> list[str]:
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


SHAPES_ONLY = (
    "view", "squeeze", "expand", "slice", "select", "clone", "convert_element_type", "_to_copy",
    "alias", "permute", "transpose", "detach", "broadcast", "copy",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_index_of_a_kernel_takes_part_in_64_bit_arithmetic(case, monkeypatch):
    """In the traced graphs of every kind of run: noise, vector step, gradient step."""
    units: list[Unit] = []
    monkeypatch.setattr(Compiler, "start", lambda self, given: units.extend(given))
    args = CASES[case]
    env, noise = make_env(args.env_id, args.env_params), Noise(args.seed, args.num_seeds)
    learner, plan = make_learner(args, env, noise), make_plan(args, env)
    compiled = CompiledChunk(args, learner, plan, noise)
    env.close()
    assert units[-1].name == "noise"
    monkeypatch.setattr(engine, "_decompositions", lambda device: {})  # as on a GPU
    for unit in units:
        assert numbers_in_arithmetic(*compiled._compiler.trace(unit)) == []


def test_numbers_in_arithmetic_are_found():
    """Through views, and in what Inductor makes of an operation; not in comparisons."""

    def function(x: Tensor) -> list[Tensor]:
        number = torch.arange(4)[:, None].expand(4, 2)
        return [(number == 2).long() + x, number.float(), x[number[:, 0]] * 2**40]

    def wrong(x: Tensor) -> list[Tensor]:
        return [torch.arange(4) * 0xD2511F53]

    for each, expected in ((function, 0), (wrong, 2)):
        x = torch.ones(4, 2, dtype=torch.int64)
        unit = Unit("unit", each, (), [t.clone() for t in each(x)])
        traced = Compiler([x], lambda state: state[0]).trace(unit)
        assert len(numbers_in_arithmetic(*traced)) == expected


def test_what_cannot_be_traced_runs_eagerly(tmp_path):
    """An environment whose Python reads values costs a reason, not the run."""

    class Reads(type(make_env("LineWorld-v0"))):  # type: ignore[misc]
        def step(self, state, action, noise):
            assert float(noise.sum()) >= 0
            return super().step(state, action, noise)

    args = replace(RANDOM, total_timesteps=640, engine="compile", run_dir=tmp_path / "run")
    summary = train(args, env=Reads()).summary
    assert summary["engine"] == "eager"
    assert summary["num_updates"] > 0


# ----------------------------------------------------------------------------------- compiling


SHAPES = [(1, 64, 128, 128), (3, 37, 50, 100), (2, 15, 64, 32), (1, 1, 9, 9), (1, 8, 33, 65)]


def products(_: object, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.bmm(x, y) for x, y in pairs]


def test_the_own_product_is_a_product():
    """Whole and broken tiles, panels and squares, members, and every order in memory, against
    float64; each row the same whatever stands beside it."""
    pairs = []
    for b, m, k, n in SHAPES:
        x, y = torch.randn(b, m, k), torch.randn(b, k, n)
        for left in (x, x.mT.contiguous().mT):
            pairs += [(left, y), (left, y.mT.contiguous().mT)]
    pairs += [(pairs[0][0][:, :5].contiguous(), pairs[0][1])]
    results = [torch.zeros(x.shape[0], x.shape[1], y.shape[2]) for x, y in pairs]
    compiler = Compiler([torch.zeros(1)], lambda state: None)
    unit = Unit("products", products, (pairs,), results)
    with cpu_threads(1):
        own = engine._own_product(torch.zeros(1))
        assert ("dqn_fast.product" in compiler.trace(unit)[0].code) == own
        compiler.start([unit])
        (run,) = compiler.finish()
        run([*compiler.state, *leaves(pairs), *results])
    for (x, y), result in zip(pairs, results, strict=True):
        torch.testing.assert_close(result.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(results[-1], results[0][:, :5])


@pytest.mark.parametrize(("threads", "dtype"), [(2, torch.float32), (1, torch.float64)])
def test_other_products_are_torchs(threads, dtype):
    """The own product has one thread and multiplies float32; otherwise torch's is compiled."""
    x, y = torch.zeros(1, 64, 128, dtype=dtype), torch.zeros(1, 128, 128, dtype=dtype)
    unit = Unit("products", products, ([(x, y)],), [torch.zeros(1, 64, 128, dtype=dtype)])
    with cpu_threads(threads):
        graph, _ = Compiler([torch.zeros(1)], lambda state: None).trace(unit)
    assert "dqn_fast.product" not in graph.code


def test_compiled_and_eager_runs_agree_over_1000_updates():
    """Equal draws and data exactly, equal losses within float32 rounding over 1 000 gradient steps.

    Sums are taken in another order, 1e-7 each; Adam divides by small numbers while its moments are
    young and training carries differences on, so after 1 000 steps 1e-3 is allowed; 1e-5 over the
    first 50.
    """
    eager = run(replace(RANDOM, engine="eager"))
    before = dict(torch._dynamo.utils.counters["stats"])
    compiled = run(replace(RANDOM, engine="compile"))
    assert compiled[2].engine == "compile"
    assert compiled[2].compile_s > 0
    assert len(compiled[0]) >= 1_000
    assert dict(torch._dynamo.utils.counters["stats"]) == before  # nothing left to recompile
    assert_same_learning(eager, compiled, rtol=1e-3)
    torch.testing.assert_close(eager[0][:50], compiled[0][:50], rtol=1e-5, atol=1e-7)

    # A second run finds it in the cache and is the same bit for bit, whatever the chunk's length.
    packages = {path: path.stat().st_mtime_ns for path in engine._cache().iterdir()}
    again = run(replace(RANDOM, engine="compile", chunk_steps=5))
    assert {path: path.stat().st_mtime_ns for path in engine._cache().iterdir()} == packages
    assert torch.equal(again[0], compiled[0])
    for a, b in zip(carried(again[1]), carried(compiled[1]), strict=True):
        assert torch.equal(a, b)


def test_auto_changes_over_in_mid_run(tmp_path, monkeypatch, capsys):
    """Eager first, compiled from a gradient step on that does not depend on the clock; the log, the
    summary and the losses know nothing else of it."""
    monkeypatch.setattr(engine, "AUTO_SWITCH", 100)
    args = replace(RANDOM, total_timesteps=8_000, quiet=False)
    auto = [train(replace(args, run_dir=tmp_path / str(i))).summary for i in range(2)]
    assert "compile from global_step" in capsys.readouterr().out
    assert auto[0]["engine"].startswith("eager, compile from ")
    for name in ("engine", "eval_return_mean", "q_error_max"):
        assert auto[0][name] == auto[1][name]
    eager = train(replace(args, engine="eager", run_dir=tmp_path / "eager")).summary
    assert auto[0]["num_updates"] == eager["num_updates"]
    assert auto[0]["q_error_max"] == pytest.approx(eager["q_error_max"], rel=1e-3)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c == "members" else [pytest.mark.slow]) for c in CASES],
)
def test_every_kind_of_run_compiles(case):
    """Members, replay ratios, all environments, actions that last, environments on the host.

    Where a step is arithmetic on floats the compiler rounds it otherwise, and so is the data.
    """
    eager = run(replace(CASES[case], engine="eager"), num_updates=300)
    compiled = run(replace(CASES[case], engine="compile"), num_updates=300)
    assert compiled[2].engine == "compile", compiled[2].reason
    assert_same_learning(eager, compiled, 1e-3, case not in ("double q", "held", "acrobot"))


# ----------------------------------------------------------------------------------- capturing


class Rerun:
    """Records calls where there is no GPU: a replay runs the call and overwrites its outputs."""

    def __init__(self, device: Any = None) -> None:
        self.num_recorded = 0

    def warm_up(self, call: Any) -> Any:
        return call()

    def record(self, call: Any) -> Any:
        self.num_recorded += 1
        kept: list[Any] = []

        def replay() -> Any:
            outputs = call()
            if not kept:
                kept.append(refill(outputs, iter([t.clone() for t in leaves(outputs)])))
            for target, source in zip(leaves(kept[0]), leaves(outputs), strict=True):
                target.copy_(source)
            return kept[0]

        return replay


@pytest.fixture
def graphs_on_the_cpu(monkeypatch) -> None:
    """`--engine graph` captures on the CPU too, by running calls again."""
    choose = engine.choose_engine

    def chosen(name: Any, device: Any, num_updates: int, on_host: bool = False) -> Any:
        if name == "graph" and not on_host:
            return engine.Choice("graph", plain_or_compiled["compiled"], "asked for")
        return choose(name, device, num_updates, on_host)

    plain_or_compiled = {"compiled": False}
    monkeypatch.setattr("dqn_fast.train.choose_engine", chosen)
    monkeypatch.setattr("dqn_fast.train.CudaGraphs", Rerun)
    return plain_or_compiled


def test_a_recording_reads_fresh_inputs():
    """A call with a new part of its key runs as it is; all others are recorded, once for each key,
    and replayed with the inputs of each call (trap 12)."""
    total, calls = torch.zeros(()), []

    def add_(key: tuple[int, ...], x: Tensor) -> Tensor:
        calls.append(key)
        total.add_(sum(key) * x)
        return total.clone()

    recorder = Rerun()
    captured = Captured(add_, recorder)
    expected = 0.0
    for x in range(1, 6):
        for key in ((1,), (10,), (1, 10), (10, 10, 1)):
            expected += sum(key) * x
            assert float(captured(key, torch.tensor(float(x)))) == expected
    assert captured.num_plain == 2
    assert captured.num_recordings == recorder.num_recorded == 4


def test_recordings_are_bounded(monkeypatch):
    """Beyond the limit a call runs as it is."""
    monkeypatch.setattr(Captured, "MOST_RECORDINGS", 2)
    captured = Captured(lambda key, x: x + sum(key), Rerun())
    for _ in range(3):
        for key in range(4):
            assert float(captured((key,), torch.tensor(1.0))) == 1.0 + key
    assert captured.num_recordings == 2


ODD = replace(RANDOM, num_envs=48, log_interval=1_000, eval_interval=4_100, total_timesteps=65_536)
KINDS = {
    "default": (Args(), 8, 2),
    "odd intervals": (ODD, 12, 2),
    "a period of 25 steps": (replace(ODD, num_envs=4, train_freq=100), 12, 2),
    "a period longer than a recording": (replace(ODD, num_envs=16, train_freq=1_000), 12, 2),
    "several counts": (replace(ODD, num_envs=7, train_freq=3), 14, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_few_kinds_of_chunks(kind, graphs_on_the_cpu):
    """Recordings and calls that ran as they are, over a whole run: few, and the calls short and at
    the start of a kind, whatever windows, log points, learning start and period do."""
    args, most_recordings, most_plain = KINDS[kind]
    args = replace(args, engine="graph", gradient_steps=1)
    plan = make_plan(args, make_env(args.env_id, args.env_params))
    lengths = []

    def call(key: tuple[int, ...], x: Tensor) -> Tensor:
        lengths.append(len(key))
        return x

    captured = Captured(call, Rerun())
    for _, chunk in plan.chunks():
        captured(chunk.update_counts, torch.zeros(()))
    assert sum(lengths) == plan.num_vector_steps
    assert max(lengths) <= engine.RECORDED_STEPS
    assert captured.num_recordings <= most_recordings
    assert captured.num_plain <= most_plain


@pytest.mark.parametrize(
    "args", [replace(RANDOM, total_timesteps=4_000, log_interval=160), CASES["odd numbers"]]
)
def test_captured_chunks_equal_plain_ones(args, graphs_on_the_cpu):
    """The whole loop through recordings, without a GPU: the same metrics and the same learner."""
    args = replace(args, total_timesteps=4_000)
    eager = run(replace(args, engine="eager"))
    graph = run(replace(args, engine="graph"))
    assert graph[2].engine == "graph"
    assert graph[2].captured.num_recordings > 2
    assert torch.equal(graph[0], eager[0])
    for a, b in zip(carried(graph[1]), carried(eager[1]), strict=True):
        assert torch.equal(a, b)


def test_compiled_functions_are_captured_too(graphs_on_the_cpu):
    """What runs inside a recording is what the compiler made, and learns as eager does."""
    graphs_on_the_cpu["compiled"] = True
    args = replace(RANDOM, total_timesteps=4_000)
    graph = run(replace(args, engine="graph"))
    assert graph[2].engine == "graph"
    assert graph[2].compile_s > 0
    assert_same_learning(run(replace(args, engine="eager")), graph, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["graph", "compile", "auto"])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_gpu_engines_agree_with_eager(name, num_seeds):
    """Captured and compiled runs draw the same and lose the same over 1 000 gradient steps."""
    args = replace(RANDOM, num_seeds=num_seeds)
    eager = run(replace(args, engine="eager"), "cuda", 1_000)
    other = run(replace(args, engine=name), "cuda", 1_000)
    assert other[2].engine == ("compile" if name == "compile" else "graph")
    assert_same_learning(eager, other, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_replay_does_not_synchronise(compiled, no_synchronisation, monkeypatch):
    """CUDA's sync-debug mode finds nothing once each kind of chunk was recorded; a whole run has
    few kinds, with plain kernels and with compiled ones."""
    if not compiled:
        monkeypatch.setattr(engine, "why_not_compiled", lambda device: "not wanted")
    args = replace(RANDOM, engine="graph")
    env, noise = make_env(args.env_id, args.env_params), Noise(0, 1, "cuda")
    learner, plan = make_learner(args, env, noise), make_plan(args, env)
    runner = Runner(args, learner, plan, noise)
    seen: set[Any] = set()
    replayed = 0
    for chunk, steps, updates in planned(args, env, noise, plan, runner.draw_noise):
        if chunk.update_counts not in seen:
            runner(steps, updates, chunk.update_counts)
            plain = runner.captured.num_plain
            if chunk.update_counts in runner.captured._recordings:
                seen.add(chunk.update_counts)
            continue
        with no_synchronisation():
            runner(steps, updates, chunk.update_counts)
        replayed += 1
    assert replayed > 20
    assert runner.captured.num_plain == plain == 2
    assert runner.captured.num_recordings <= 10


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def captured_on(request, graphs_on_the_cpu) -> str:
    """A device on which `--engine graph` captures: through a recorder of the tests, or really."""
    if request.param == "cuda":
        request.getfixturevalue("monkeypatch").undo()
    return str(request.param)


@pytest.mark.parametrize("captured_on", DEVICES, indirect=True)
def test_runs_of_one_process_do_not_meet(captured_on, tmp_path):
    """Three in a row, one in a thread, and two in turns, chunk by chunk: all the same."""
    args = replace(FAILING, engine="graph", quiet=True, device=captured_on, total_timesteps=640)
    alone = run(args, captured_on)
    for _ in range(2):
        assert torch.equal(run(args, captured_on)[0], alone[0])

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(run, args, captured_on).result()[0], alone[0])

    def steps_of(args: Args) -> Any:
        env = make_env(args.env_id, args.env_params)
        noise, plan = Noise(args.seed, args.num_seeds, captured_on), make_plan(args, env)
        learner = make_learner(args, env, noise)
        runner = Runner(args, learner, replace(plan, max_window_steps=75), noise)
        for chunk, steps, updates in planned(args, env, noise, plan, runner.draw_noise):
            yield runner(steps, updates, chunk.update_counts).updates.clone()
        assert runner.captured.num_recordings > 2

    pairs = list(zip(steps_of(args), steps_of(args), strict=True))
    for updates in zip(*pairs, strict=True):
        assert torch.equal(torch.cat(updates), alone[0])


@pytest.mark.parametrize("captured_on", DEVICES, indirect=True)
def test_a_run_after_a_failed_capture(captured_on, monkeypatch):
    """A capture that broke in the middle leaves nothing behind that another one stumbles over."""
    args = replace(FAILING, engine="graph", quiet=True, device=captured_on, total_timesteps=640)
    alone = run(args, captured_on)
    recorder = Rerun if captured_on == "cpu" else CudaGraphs
    record = recorder.record

    def breaks(self: Any, call: Any) -> Any:
        def call_and_break() -> Any:
            if captured_on == "cuda":  # elsewhere a call would compute
                call()
            raise RuntimeError("in the middle of a capture")

        return call_and_break() if captured_on == "cpu" else record(self, call_and_break)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "record", breaks)
        failed = run(args, captured_on)
    assert failed[2].engine in ("eager", "compile")
    assert "in the middle of a capture" in failed[2].reason
    assert_same_learning(failed, alone, rtol=1e-3)
    again = run(args, captured_on)
    assert again[2].engine == "graph"
    assert torch.equal(again[0], alone[0])


@pytest.mark.gpu
def test_capture_leaves_weights_and_inputs_alone():
    """Recording a call computes nothing (trap 12)."""
    x = torch.ones(4, device="cuda")
    graphs = CudaGraphs(x.device)
    graphs.warm_up(lambda: x.add_(1))
    replay = graphs.record(lambda: x.add_(1))
    assert x.tolist() == [2.0] * 4
    replay()
    assert x.tolist() == [3.0] * 4


# ------------------------------------------------------------------------------ what goes wrong


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this fails on purpose\nand has a second line")


FAILURES: dict[str, tuple[str, Any, str]] = {
    "tracing": ("dqn_fast.engines.Compiler.trace", refuse, "not compilable: this fails on purpose"),
    "exporting": ("torch.export.export", refuse, "not compilable: this fails on purpose"),
    "the cache": ("dqn_fast.engines._cache", refuse, "not compilable: this fails on purpose"),
    "starting": (
        "dqn_fast.engines.subprocess.Popen", refuse, "not compilable: this fails on purpose",
    ),
    "compiling": ("dqn_fast.engines.sys.executable", "false", "the compiler failed: no message"),
    "loading": ("dqn_fast.engines._load", refuse, "not loadable: this fails on purpose"),
    "the first call": (
        "dqn_fast.engines._load", lambda _: refuse, "does not run: this fails on purpose",
    ),
    "its numbers": (
        "dqn_fast.engines._load", lambda _: lambda tensors: None,
        "noise does not run: its numbers are not those of the plain function",
    ),
    "graphs": (
        "tests.test_engine.Rerun.__init__", refuse, "no CUDA graphs: this fails on purpose",
    ),
    "capturing": (
        "tests.test_engine.Rerun.record", refuse, "capture failed: this fails on purpose",
    ),
}  # fmt: skip
FAILING = replace(
    RANDOM, total_timesteps=1_280, log_interval=320, eval_interval=640, num_envs=8, train_freq=8,
    hidden_sizes=(16,), eval_episodes=5, quiet=False, checkpoint_interval=640,
)  # fmt: skip


@pytest.fixture(scope="module")
def eager_run(tmp_path_factory) -> Path:
    """The run that an engine which cannot be had comes down to."""
    run_dir = tmp_path_factory.mktemp("eager") / "run"
    train(replace(FAILING, engine="eager", run_dir=run_dir))
    return run_dir


@pytest.mark.parametrize("point", FAILURES)
def test_whatever_fails_costs_a_line(
    point, eager_run, graphs_on_the_cpu, tmp_path, monkeypatch, capsys
):
    """Wherever the making of an engine fails, the run is the one without it: one line says why;
    files, metrics and weights are the same."""
    if point in ("exporting", "starting", "compiling"):  # where nothing is in the cache
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    elif point in ("loading", "the first call", "its numbers"):  # a package that is there
        train(replace(FAILING, engine="compile", run_dir=tmp_path / "compiled", quiet=True))
    target, value, reason = FAILURES[point]
    if point == "starting":  # the module is not the engine's alone
        own = types.SimpleNamespace(**vars(subprocess))
        monkeypatch.setattr(engine, "subprocess", own)
    monkeypatch.setattr(target, value)
    name = "graph" if point in ("graphs", "capturing") else "compile"
    summary = train(replace(FAILING, engine=name, run_dir=tmp_path / "run")).summary
    out = capsys.readouterr()
    assert out.err == ""
    assert sum(reason in line for line in out.out.splitlines()) == 1
    assert "second line" not in out.out
    assert summary["engine"] == "eager"
    assert_same_run(tmp_path / "run", eager_run)


def assert_same_run(ours: Path, theirs: Path, *but: str) -> None:
    """The same files with the same content, but for times and the values named."""
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    times = (
        "wall_s",
        "perf/",
        "startup_s",
        "compile_s",
        "eval_s",
        "loop_s",
        "_per_s",
        "reason",
        *but,
    )

    def content(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows.append(json.loads((folder / "summary.json").read_text()))
        return [{k: v for k, v in row.items() if not any(t in k for t in times)} for row in rows]

    assert content(ours) == content(theirs)
    a, b = (load_checkpoint(folder / "checkpoint.pt") for folder in (ours, theirs))
    for x, y in zip(tree_leaves(a["resume"]), tree_leaves(b["resume"]), strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def test_without_compiled_kernels_a_graph_has_plain_ones(
    eager_run, graphs_on_the_cpu, tmp_path, monkeypatch, capsys
):
    """The next best engine of a graph with compiled kernels is the graph."""
    graphs_on_the_cpu["compiled"] = True
    monkeypatch.setattr("dqn_fast.engines._load", refuse)
    summary = train(replace(FAILING, engine="graph", run_dir=tmp_path / "run")).summary
    out = capsys.readouterr().out
    assert out.count("(plain kernels, not loadable: this fails on purpose)") == 1
    assert summary["engine"] == "graph"
    assert_same_run(tmp_path / "run", eager_run, "engine")


def test_damaged_packages_are_made_again(tmp_path, monkeypatch):
    """They cost one run its compiled functions, not all the runs to come."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def compiled() -> Tensor:
        x = torch.ones(3)
        compiler = Compiler([x], lambda state: state[0])
        units = [
            Unit("double", lambda x: [x.mul_(2).clone()], (), [torch.zeros(3)]),
            Unit("add", lambda x, y: [x.add_(y).clone()], (x,), [torch.zeros(3)]),
        ]
        compiler.start(units)
        double, add = compiler.finish()
        assert x.tolist() == [1.0] * 3  # to try them wrote nothing
        result = torch.zeros(3)
        double([*compiler.state, result])
        add([*compiler.state, torch.ones(3), result])
        return result

    assert compiled().tolist() == [3.0] * 3
    packages = list(engine._cache().iterdir())
    assert len(packages) == 2
    for package in packages:
        package.write_bytes(package.read_bytes()[:1_000])
    with pytest.raises(EngineUnavailableError, match="not loadable"):
        compiled()
    assert compiled().tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("version", "needed"),
    [("2.11.0+cu130", True), ("2.12.1", True), ("2.13.0+cpu", False), ("3.0.0a0", False)],
)
def test_options_are_those_that_a_version_needs(version, needed):
    """Of our own compilations only; torch's settings stay as they are."""
    assert bool(inductor_options(version)) == needed
    assert all(hasattr(torch._inductor.config, name) for name in inductor_options(version))


# -------------------------------------------------------------------------------------- others


def test_the_collector_is_given_back_as_it_was():
    """Nothing stays frozen after a run, and what was frozen before it stays so."""
    gc.unfreeze()  # another test may have run the training command, which freezes as it ends
    with collector_at_rest():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    with collector_at_rest():
        pass
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


@pytest.mark.parametrize("before", [False, True])
def test_small_numbers_are_zero_during_a_run_and_then_as_before(before):
    """Below float32's normal numbers there is only 0 while a run lasts."""
    tiny = torch.full((), torch.finfo(torch.float32).tiny)
    torch.set_flush_denormal(before)
    try:
        with run_conditions(1):
            assert tiny / 2 == 0
            assert tiny / 2 * 2 == 0
        assert (tiny / 2 == 0) == before
    finally:
        torch.set_flush_denormal(False)


def test_examples_have_the_shapes_of_the_real_inputs():
    """What is compiled for is what comes: shapes, dtypes and strides."""
    for args in (replace(RANDOM, num_seeds=3, num_envs=1), replace(RANDOM, env_id="CartPole-v1")):
        env, noise = make_env(args.env_id), Noise(0, args.num_seeds)
        learner = make_learner(args, env, noise)
        examples = [*example_step_inputs(learner), *example_update_inputs(learner, args.batch_size)]
        for chunk, *real_inputs in planned(args, env, noise, make_plan(args, env)):
            steps, updates = real_inputs
            if chunk.num_updates:
                break
        real = [*(t[0] for t in steps), *(t[0] for t in updates)]
        for example, tensor in zip(examples, real, strict=True):
            assert example.dtype == tensor.dtype
            assert example.shape == tensor.shape
            assert tensor.is_contiguous()
