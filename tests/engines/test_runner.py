"""Runs: plain, compiled and captured they give the same results, whatever the algorithm."""

from __future__ import annotations

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
from torch.utils._pytree import tree_leaves

from dqn_fast.engines import EngineChoice, Runner, StopRequested, cache_state, compiler
from dqn_fast.engines.graph import CudaGraphs
from dqn_fast.envs import make_env
from dqn_fast.noise import Noise
from dqn_fast.record.checkpoint import load_checkpoint
from dqn_fast.setup import setup
from dqn_fast.train import train
from tests.engines.runs import (
    CASES,
    SHORT,
    SMALL,
    Counting,
    Counts,
    CountsAndPeak,
    Rerun,
    assert_equal,
    assert_same_learning,
    copy_of,
    count,
    inputs_of,
    plan_of,
    refuse,
    run,
)

# ----------------------------------------------------------------------------------- compiled


def test_compiled_and_eager_runs_agree_over_1000_updates(eager, compiled):
    """Equal draws and data exactly, equal losses within float32 rounding over 1 000 gradient steps
    of two members.

    Sums are taken in another order, 1e-7 each; Adam divides by small numbers while its moments are
    young and training carries differences on, so after 1 000 steps 1e-3 is allowed; 1e-5 over the
    first 50.
    """
    assert compiled.runner.engine == "compile", compiled.runner.reason
    assert compiled.runner.compile_s > 0
    assert len(compiled.metrics) >= 1_000
    assert_same_learning(eager, compiled, rtol=1e-3)
    torch.testing.assert_close(eager.metrics[:50], compiled.metrics[:50], rtol=1e-5, atol=1e-7)


def test_a_second_run_finds_what_the_first_compiled(compiled):
    """In the cache; it is the same bit for bit, whatever the chunk's length, and nothing is left to
    compile in mid-run."""
    folder = cache_state().folder
    packages = {path: path.stat().st_mtime_ns for path in folder.glob("*.package")}
    before = dict(torch._dynamo.utils.counters["stats"])
    again = run(replace(SMALL, engine="compile", chunk_steps=5))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.package")} == packages
    assert dict(torch._dynamo.utils.counters["stats"]) == before
    assert_equal((again.metrics, again.state), (compiled.metrics, compiled.state))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "members"])
def test_every_kind_of_run_compiles(case):
    """Replay ratios, all environments, actions that last, environments on the host; members are in
    the runs above.

    Where a step is arithmetic on floats the compiler rounds it otherwise, and so is the data.
    """
    eager = run(replace(CASES[case], engine="eager"), num_updates=300)
    compiled = run(replace(CASES[case], engine="compile"), num_updates=300)
    assert compiled.runner.engine == "compile", compiled.runner.reason
    assert_same_learning(eager, compiled, 1e-3, case not in ("double q", "held", "acrobot"))


# ----------------------------------------------------------------------------------- captured


@pytest.mark.parametrize("case", ["members", "odd numbers"])
def test_captured_chunks_equal_plain_ones(case, graphs_on_the_cpu):
    """The whole loop through recordings, without a GPU: the same metrics and the same state."""
    args = replace(CASES[case], total_timesteps=2_000, log_interval=160)
    eager = run(replace(args, engine="eager"))
    graph = run(replace(args, engine="graph"))
    assert graph.runner.engine == "graph"
    assert graph.runner.captured.num_recordings > 2
    assert_equal((graph.metrics, graph.state), (eager.metrics, eager.state))


def test_compiled_functions_are_captured_too(eager, compiled, graphs_on_the_cpu):
    """What runs inside a recording is what the compiler made, and learns as eager does."""
    graphs_on_the_cpu["compiled"] = True
    graph = run(replace(SMALL, engine="graph"))
    assert graph.runner.engine == "graph"
    assert graph.runner.compile_s > 0
    assert_same_learning(eager, graph, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["graph", "compile", "auto"])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_gpu_engines_agree_with_eager(name, num_seeds):
    """Captured and compiled runs draw the same and lose the same over 1 000 gradient steps."""
    args = replace(SMALL, num_seeds=num_seeds, device="cuda")
    eager = run(replace(args, engine="eager"))
    other = run(replace(args, engine=name))
    assert len(other.metrics) >= 1_000
    assert other.runner.engine == ("compile" if name == "compile" else "graph")
    assert_same_learning(eager, other, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_replay_does_not_synchronise(compiled, no_synchronisation, monkeypatch):
    """CUDA's sync-debug mode finds nothing once each kind of chunk was recorded; a whole run has
    few kinds, with plain kernels and with compiled ones."""
    if not compiled:
        monkeypatch.setattr("dqn_fast.engines.choice.why_not_compiled", lambda device: "not wanted")
    training = setup(replace(SMALL, num_seeds=1, engine="graph", device="cuda"))
    runner = training.runner
    seen: set[Any] = set()
    replayed = 0
    for chunk, steps, updates in training.inputs():
        if chunk.update_counts not in seen:
            runner(steps, updates, chunk.update_counts)
            plain = runner.captured.num_plain
            if chunk.update_counts in runner.captured._recordings:
                seen.add(chunk.update_counts)
            continue
        with no_synchronisation():
            runner(steps, updates, chunk.update_counts)
        replayed += 1
    training.close()
    assert replayed > 20
    assert runner.captured.num_plain == plain == 2
    assert runner.captured.num_recordings <= 10


def test_runs_of_one_process_do_not_meet(captured_on):
    """Three in a row, one in a thread, and two in turns, chunk by chunk: all the same."""
    args = replace(SHORT, engine="graph", device=captured_on)
    alone = run(args)
    for _ in range(2):
        assert torch.equal(run(args).metrics, alone.metrics)

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(run, args).result().metrics, alone.metrics)

    two = [setup(args), setup(args)]
    metrics: list[list[Tensor]] = [[], []]
    for pair in zip(*(training.chunks() for training in two), strict=True):
        for kept, (_, record) in zip(metrics, pair, strict=True):
            kept.append(record.updates.clone())
    for training, kept in zip(two, metrics, strict=True):
        assert training.runner.captured.num_recordings > 2
        assert torch.equal(torch.cat(kept), alone.metrics)
        training.close()


def test_a_run_after_a_failed_capture(captured_on, monkeypatch):
    """A capture that broke in the middle leaves nothing behind that another one stumbles over."""
    args = replace(SHORT, engine="graph", device=captured_on)
    alone = run(args)
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
        failed = run(args)
    assert failed.runner.engine in ("eager", "compile")
    assert "in the middle of a capture" in failed.runner.reason
    assert_same_learning(failed, alone, rtol=1e-3)
    again = run(args)
    assert again.runner.engine == "graph"
    assert torch.equal(again.metrics, alone.metrics)


# --------------------------------------------------------------------------- another algorithm

PLAIN, COMPILED = EngineChoice("eager", False, "test"), EngineChoice("compile", True, "test")
FUSED = EngineChoice("fused", False, "test")


@pytest.mark.parametrize(
    ("choice", "recordings"),
    [
        pytest.param(PLAIN, None, id="eager"),
        pytest.param(EngineChoice("graph", False, "test"), 2, id="graph"),
        pytest.param(FUSED, None, id="fused"),
        # 25 s; the test of a new buffer compiles this algorithm too.
        pytest.param(COMPILED, None, id="compile", marks=pytest.mark.slow),
    ],
)
def test_engines_run_an_algorithm_that_is_not_dqn(choice, recordings, graphs_on_the_cpu):
    """One that adds noise up and counts its updates: the same records and the same state from
    every engine as from `chunk_` alone. So the calls that try an engine write nothing."""
    expected, expected_state, _ = count(Counting(), Counts, None)
    record, state, runner = count(Counting(), Counts, choice)
    assert runner.engine == choice.engine, runner.reason
    assert recordings is None or runner.captured.num_recordings >= recordings
    assert state.num_updates.tolist() == [2 * 34] * 2
    assert len(record.updates) == 2 * 34
    assert state.total.unique().numel() == state.total.numel()  # no two copies alike
    assert_equal((record, state), (expected, expected_state))


EACH = [
    pytest.param(FUSED, id="fused"),
    pytest.param(COMPILED, id="compile", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("choice", EACH)
def test_another_algorithm_on_the_host_is_compiled(choice):
    """Its actions and its updates are compiled, its vector step is called as it is."""
    expected = count(Counting(), Counts, None)[:2]
    *counted, runner = count(Counting(on_host=True), Counts, choice)
    assert runner.engine == choice.engine, runner.reason
    assert_equal(tuple(counted), expected)


@pytest.mark.parametrize("choice", EACH)
def test_a_new_buffer_in_a_state_is_compiled(choice):
    """A field more, which the step writes, and nobody else is told of: it is carried, compiled and
    equal."""
    expected, expected_state, _ = count(Counting(), CountsAndPeak, None, gradient_steps=1)
    record, state, runner = count(Counting(), CountsAndPeak, choice, gradient_steps=1)
    assert runner.engine == choice.engine, runner.reason
    assert (state.peak > 0).all()
    assert_equal((record, state), (expected, expected_state))


@pytest.mark.parametrize("changes", [{"gradient_steps": 0}, {"learning_starts": 10**6}])
def test_a_run_without_gradient_steps_is_not_in_the_compilers_way(changes, tmp_path):
    """Nothing of a vector step is compiled then, and nobody waits for the compiler."""
    args = replace(
        SMALL, total_timesteps=640, engine="compile", run_dir=tmp_path / "run", **changes
    )
    summary = train(args).summary
    assert (summary["num_updates"], summary["global_step"]) == (0, 640)
    assert summary["status"] == "done"


# ---------------------------------------------------------------------- while the loop waits


@pytest.mark.parametrize("engine", ["fused", "compile"])
def test_a_run_that_waits_for_the_compiler_can_be_stopped(engine, tmp_path, monkeypatch):
    """Before the first chunk with gradient steps, which waits, has run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    algorithm = Counting()
    plan = plan_of(algorithm)
    state, noise = algorithm.init(Counts), Noise(5, algorithm.num_members)
    runner = Runner(algorithm, state, plan, noise, EngineChoice(engine, True, "test"))
    assert runner.engine == engine
    runner.should_stop = lambda: True
    for _, chunk in plan.chunks():
        before = copy_of(state)
        inputs = inputs_of(chunk, algorithm, noise, runner)
        try:
            runner(*inputs, chunk.update_counts)
        except StopRequested:
            break
    else:
        raise AssertionError("it never waited")
    assert_equal(before, state)
    assert int(state.num_updates[0]) == 0
    assert list((tmp_path / "dqn_fast").glob("work-*")) == []
    runner.close()


def test_a_cache_that_is_not_used_is_named(tmp_path, monkeypatch):
    """In the reason of the engine, with what is wrong with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dqn_fast").symlink_to("elsewhere")
    algorithm = Counting()
    state, noise = algorithm.init(Counts), Noise(5, algorithm.num_members)
    runner = Runner(algorithm, state, plan_of(algorithm), noise, COMPILED)
    runner.close()
    wrong = f"{tmp_path / 'dqn_fast'} is a symbolic link, so nothing compiled is kept"
    assert runner.reason == f"test; {wrong}"
    assert runner.engine == "compile"
    assert not (tmp_path / "elsewhere").exists()


# ------------------------------------------------------------------------------ what goes wrong


def test_what_cannot_be_traced_runs_eagerly(tmp_path):
    """An environment whose Python reads values costs a reason, not the run."""

    class Reads(type(make_env("LineWorld-v0"))):  # type: ignore[misc]
        def step(self, state, action, noise):
            assert float(noise.sum()) >= 0
            return super().step(state, action, noise)

    args = replace(SMALL, total_timesteps=640, engine="compile", run_dir=tmp_path / "run")
    summary = train(args, env=Reads()).summary
    assert summary["engine"] == "eager"
    assert summary["num_updates"] > 0


COMPILER = "dqn_fast.engines.compiler"
FAILURES: dict[str, tuple[str, Any, str]] = {
    "tracing": (f"{COMPILER}.Compiler.trace", refuse, "not compilable: this fails on purpose"),
    "exporting": ("torch.export.export", refuse, "not compilable: this fails on purpose"),
    "the cache": (f"{COMPILER}.usable_cache", refuse, "not compilable: this fails on purpose"),
    "starting": (
        f"{COMPILER}.watched.subprocess.Popen", refuse, "not compilable: this fails on purpose",
    ),
    "compiling": (f"{COMPILER}.sys.executable", "false", "the compiler failed: no message"),
    "loading": (f"{COMPILER}._load", refuse, "not loadable: this fails on purpose"),
    "the first call": (
        f"{COMPILER}._load", lambda *_: refuse, "does not run: this fails on purpose",
    ),
    "its numbers": (
        f"{COMPILER}._load", lambda *_: lambda tensors: None,
        "draw does not run: its numbers are not those of the plain function",
    ),
    "graphs": (
        "tests.engines.runs.Rerun.__init__", refuse, "no CUDA graphs: this fails on purpose",
    ),
    "capturing": (
        "tests.engines.runs.Rerun.record", refuse, "capture failed: this fails on purpose",
    ),
}  # fmt: skip


def keep_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that a test says are damaged stay for the other tests, and nobody makes new ones."""
    monkeypatch.setattr(Path, "unlink", lambda self, *_, **__: None)
    monkeypatch.setattr(compiler.Compiler, "_compile", lambda self, jobs: None)


@pytest.mark.parametrize("point", FAILURES)
def test_whatever_fails_costs_a_line(
    point, compiled, eager_run, graphs_on_the_cpu, tmp_path, monkeypatch, capsys
):
    """Wherever the making of an engine fails, the run is the one without it: one line says why;
    files, metrics and weights are the same."""
    if point in ("exporting", "starting", "compiling"):  # where nothing is in the cache
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, value, reason = FAILURES[point]
    if point == "starting":  # the module is not the compiler's alone
        own = types.SimpleNamespace(**vars(subprocess))
        monkeypatch.setattr(compiler.watched, "subprocess", own)
    if point == "loading":
        keep_packages(monkeypatch)
    monkeypatch.setattr(target, value)
    name = "graph" if point in ("graphs", "capturing") else "compile"
    args = replace(SHORT, engine=name, run_dir=tmp_path / "run", quiet=False)
    summary = train(args).summary
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
        "wall_s", "perf/", "startup_s", "compile_s", "eval_s", "loop_s", "_per_s", "reason", *but,
    )  # fmt: skip

    def content(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows.append(json.loads((folder / "summary.json").read_text()))
        return [{k: v for k, v in row.items() if not any(t in k for t in times)} for row in rows]

    assert content(ours) == content(theirs)
    a, b = (load_checkpoint(folder / "checkpoint.pt") for folder in (ours, theirs))
    for checkpoint in (a, b):
        record = checkpoint["resume"]["record"]
        for name in ("spent", "eval_s", "window", "tracker", "engine", "running"):
            del record[name]
    for x, y in zip(tree_leaves(a["resume"]), tree_leaves(b["resume"]), strict=True):
        same = isinstance(x, Tensor) and torch.equal(x.nan_to_num(-7.7), y.nan_to_num(-7.7))
        assert same or x is y or (not isinstance(x, Tensor) and x == y)


def test_without_compiled_kernels_a_graph_has_plain_ones(
    compiled, eager_run, graphs_on_the_cpu, tmp_path, monkeypatch, capsys
):
    """The next best engine of a graph with compiled kernels is the graph."""
    graphs_on_the_cpu["compiled"] = True
    monkeypatch.setattr(f"{COMPILER}._load", refuse)
    keep_packages(monkeypatch)
    args = replace(SHORT, engine="graph", run_dir=tmp_path / "run", quiet=False)
    summary = train(args).summary
    out = capsys.readouterr().out
    assert out.count("(plain kernels, not loadable: this fails on purpose)") == 1
    assert summary["engine"] == "graph"
    assert_same_run(tmp_path / "run", eager_run, "engine")
