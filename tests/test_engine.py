"""Engines: one function, run plainly, compiled and captured, gives the same results."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dqn_fast import engine
from dqn_fast.device import collector_at_rest, cpu_threads, run_conditions
from dqn_fast.engine import (
    AUTO_SWITCH,
    Captured,
    Compiler,
    Unit,
    choose_engine,
    cuda_graph,
    leaves,
    refill,
)
from dqn_fast.envs import make_env
from dqn_fast.noise import Noise
from dqn_fast.train import (
    Args,
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
    monkeypatch.setattr("dqn_fast.engine.why_not_compiled", lambda device: None)
    choice = choose_engine(name, torch.device("cuda"), num_updates, on_host)
    assert choice.engine == engine
    if engine == "graph":
        assert choice.compiled == (num_updates > 10 or name == "graph")


def test_a_compiler_that_fails_costs_a_message(tmp_path, monkeypatch, capsys):
    """The run goes on eagerly, says why, and its results are those of an eager run."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    args = replace(RANDOM, total_timesteps=640, quiet=False)
    failed = train(replace(args, engine="compile", run_dir=tmp_path / "a")).summary
    assert "compiler failed" in capsys.readouterr().out
    assert failed["engine"].startswith("compile, eager from ")
    eager = train(replace(args, engine="eager", run_dir=tmp_path / "b")).summary
    for name in ("num_updates", "eval_return_mean", "q_error_max"):
        assert failed[name] == eager[name]


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


def rerun(call: Any) -> Any:
    """Records a call where there is no GPU: running it again writes the outputs of the first."""
    snapshot = None

    def replay() -> None:
        nonlocal snapshot
        for target, source in zip(leaves(outputs), leaves(call()), strict=True):
            target.copy_(source)

    outputs = call()
    return replay, outputs


def test_a_recording_reads_fresh_inputs_and_computes_once():
    """First call plain, second recorded, later ones replayed; inputs are fresh each time, a key has
    a recording of its own, and capture itself leaves the carried tensors alone (trap 12)."""
    total, calls = torch.zeros(()), []

    def add_(key: int, x: Tensor) -> Tensor:
        calls.append(key)
        total.add_(key * x)
        return total.clone()

    def record(call: Any) -> Any:
        before = total.clone()
        replay, outputs = rerun(call)
        total.copy_(before)  # as capture: nothing is computed
        return replay, outputs

    captured = Captured(add_, record)
    expected = 0.0
    for x in range(1, 6):
        for key in (1, 10):
            expected += key * x
            assert float(captured(key, torch.tensor(float(x)))) == expected
    assert len(captured._recordings) == 2


def test_recordings_are_bounded(monkeypatch):
    """Beyond the limit a call runs as it is."""
    monkeypatch.setattr(Captured, "MOST_RECORDINGS", 2)
    captured = Captured(lambda key, x: x + key, rerun)
    for _ in range(3):
        for key in range(4):
            assert float(captured(key, torch.tensor(1.0))) == 1.0 + key
    assert len(captured._recordings) == 2


def test_captured_chunks_equal_plain_ones():
    """The whole loop through recordings, without a GPU: the same metrics and the same learner."""
    args = replace(RANDOM, total_timesteps=4_000, log_interval=160)
    eager = run(replace(args, engine="eager"))
    env, noise = make_env(args.env_id, args.env_params), Noise(0, 1)
    learner, plan = make_learner(args, env, noise), make_plan(args, env)

    def record(call: Any) -> Any:
        saved = copy.deepcopy(carried(learner))
        replay, outputs = rerun(call)
        for tensor, value in zip(carried(learner), saved, strict=True):
            tensor.copy_(value)
        return replay, outputs

    captured = Captured(
        lambda counts, steps, updates: chunk_(learner, steps, updates, counts), record
    )
    metrics = [
        captured(chunk.update_counts, steps, updates).updates.clone()
        for chunk, steps, updates in planned(args, env, noise, plan)
    ]
    assert captured._recordings
    assert torch.equal(torch.cat(metrics), eager[0])
    for a, b in zip(carried(learner), carried(eager[1]), strict=True):
        assert torch.equal(a, b)


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
def test_a_replay_does_not_synchronise():
    """CUDA's sync-debug mode finds nothing once the chunks are captured."""
    args = replace(RANDOM, engine="graph")
    env, noise = make_env(args.env_id, args.env_params), Noise(0, 1, "cuda")
    learner, plan = make_learner(args, env, noise), make_plan(args, env)
    runner = Runner(args, learner, plan, noise)
    for number, (chunk, steps, updates) in enumerate(
        planned(args, env, noise, plan, runner.draw_noise)
    ):
        if number < 6:
            runner(steps, updates, chunk.update_counts)
            continue
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            runner(steps, updates, chunk.update_counts)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_capture_leaves_weights_and_inputs_alone():
    """Recording a call computes nothing (trap 12)."""
    x = torch.ones(4, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x.add_(1)
    torch.cuda.synchronize()
    replay, _ = cuda_graph(lambda: x.add_(1))
    assert x.tolist() == [2.0] * 4
    replay()
    assert x.tolist() == [3.0] * 4


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
