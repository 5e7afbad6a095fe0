"""The loop: what it learns, that it repeats, and what it records."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dqn_fast import tree
from dqn_fast.agent import load_agent
from dqn_fast.dqn import Adam, State
from dqn_fast.envs import TENSOR_ENVS, LineWorld, TensorEnv, make_env
from dqn_fast.record.background import HostCopy
from dqn_fast.record.checkpoint import load_checkpoint, save_checkpoint, saved_part
from dqn_fast.record.run import RunRecord, TrainingError
from dqn_fast.settings import UsageError
from dqn_fast.setup import Training, intervals, schedules_of, setup
from dqn_fast.train import Args, train
from tests.test_dqn import NoHostReads

SHORT = Args(total_timesteps=4_000, eval_interval=2_000, eval_episodes=10, quiet=True, report=False)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name != "wall_s" and "perf/" not in name}
        for row in rows(run_dir)
    ]


# ------------------------------------------------------------------------------- what it learns


def test_the_default_run_solves_line_world(tmp_path):
    """Moves right in all 14 non-terminal states, gets 0.84 or more, and updates (trap 15)."""
    result = train(Args(run_dir=tmp_path / "run", quiet=True, eval_episodes=1000))
    agent = load_agent(result.run_dir, "last", device="cpu")
    assert agent.act(np.arange(14, dtype=np.uint8)).tolist() == [1] * 14
    assert result.summary["eval_return_mean"] >= 0.84
    assert result.summary["policy_optimal"] is True
    assert result.summary["q_error_max"] < 0.05
    assert result.summary["num_updates"] > 4_000
    assert result.summary["status"] == "done"


class ClockState(NamedTuple):
    time: Tensor


@dataclass(frozen=True)
class OnlyTruncates(TensorEnv):
    """Pays 1 a step and never terminates; the time limit ends every episode."""

    max_steps: int = 5
    num_actions: ClassVar[int] = 2

    def reset(self, noise: Tensor) -> ClockState:
        return ClockState(torch.zeros(noise.shape[0]))

    def step(self, state: ClockState, action: Tensor, noise: Tensor) -> Any:
        return ClockState(state.time), torch.ones_like(state.time), torch.zeros_like(action).bool()

    def observe(self, state: ClockState) -> Tensor:
        return torch.ones_like(state.time)[:, None]


def test_truncation_still_bootstraps(tmp_path):
    """r = 1 and gamma = 0.9 without an end: Q goes to 10, not to what five steps pay (trap 1)."""
    args = replace(SHORT, gamma=0.9, total_timesteps=48_000, tau=0.2, run_dir=tmp_path / "run")
    result = train(args, env=OnlyTruncates())
    q_values = result.q_net(torch.ones(1, 1, 1)).flatten()
    assert q_values.tolist() == [pytest.approx(10, abs=0.2)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_every_seed_solves_line_world(seed, tmp_path):
    """The default settings, seeds 0 to 9."""
    result = train(Args(seed=seed, run_dir=tmp_path / "run", quiet=True, eval_episodes=1000))
    assert result.summary["policy_optimal"] is True
    assert result.summary["eval_return_mean"] >= 0.84


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 7, 1024])
@pytest.mark.parametrize("seed", range(5))
def test_any_number_of_envs_solves_line_world(num_envs, seed, tmp_path):
    """The default settings with fewer and with more env copies."""
    args = Args(
        seed=seed, num_envs=num_envs, run_dir=tmp_path / "run", quiet=True, eval_episodes=1000
    )
    summary = train(args).summary
    assert summary["policy_optimal"] is True
    assert summary["eval_return_mean"] >= 0.84


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "squared"},
        {"hidden_sizes": ()},
        {"hidden_sizes": (32,)},
        {"learning_rate_end": None},
        {"tau": 1.0, "target_update_interval": 500},
        {"target_update_interval": 0},
        {"gradient_steps": 3, "train_freq": 100},
        {"num_envs": 7, "train_freq": 5},
        {"num_envs": 1, "train_freq": 4, "total_timesteps": 2_000},
        {"num_envs": 1024, "num_seeds": 2},
        {"max_grad_norm": math.inf},
        {"eps_fraction": 0.0},
        {"log_interval": 0, "eval_interval": 0, "checkpoint_interval": 0},
        {"log_interval": 10**9, "eval_interval": 10**9},
        {"num_threads": 0},
        {"env_params": {"n_states": "300"}},
    ],
    ids=str,
)
def test_settings_run_to_their_end(changes, tmp_path):
    """Each setting learns, ends where it should and writes a whole run directory."""
    result = train(replace(SHORT, **changes, run_dir=tmp_path / "run"))
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["num_updates"] > 0
    total, num_envs = replace(SHORT, **changes).total_timesteps, summary["num_envs"]
    assert summary["global_step"] == math.ceil(total / num_envs) * num_envs
    assert {path.name for path in result.run_dir.iterdir()} >= {
        "config.json", "metrics.jsonl", "episodes.npz", "summary.json", "checkpoint.pt", "best.pt",
    }  # fmt: skip


def test_without_gradient_steps_nothing_is_learned(tmp_path):
    """gradient_steps 0 collects and leaves the network alone."""
    result = train(replace(SHORT, gradient_steps=0, run_dir=tmp_path / "run"))
    fresh = setup(SHORT, result.env).q_net
    assert result.summary["num_updates"] == 0
    assert all(map(torch.equal, fresh.params, result.q_net.params))


@pytest.mark.parametrize(
    "goal", [{"stop_when_optimal": True}, {"stop_at_return": 0.8}], ids=lambda goal: str(goal)
)
def test_a_run_stops_at_its_goal(goal, tmp_path):
    """At the first evaluation in which all members are there, with everything saved."""
    args = replace(SHORT, total_timesteps=200_000, num_seeds=2, **goal, run_dir=tmp_path / "run")
    summary = train(args).summary
    assert summary["status"] == "solved"
    assert summary["global_step"] < 60_000
    reached = [
        all(row["members"]["exact/policy_optimal"])
        if args.stop_when_optimal
        else min(row["members"]["eval/return_mean"]) >= 0.8
        for row in rows(tmp_path / "run")
        if "eval/return_mean" in row
    ]
    assert reached == [False] * (len(reached) - 1) + [True]
    content = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert content["global_step"] == [summary["global_step"]] * 2


def test_what_cannot_be_solved_cannot_stop_when_optimal(tmp_path):
    """The flag is refused before anything is written."""
    args = replace(SHORT, stop_when_optimal=True, run_dir=tmp_path / "run")
    with pytest.raises(
        UsageError, match="--stop-when-optimal: OnlyTruncates has no exact solution"
    ):
        train(args, env=OnlyTruncates())
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- that it repeats


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal bits, of NaN too."""
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def test_same_seed_same_run(tmp_path):
    """metrics.jsonl is identical apart from times, and so is every tensor of the checkpoint."""
    for name in ("a", "b"):
        train(replace(SHORT, num_seeds=2, run_dir=tmp_path / name))
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("a", "b"))
    assert a["resume"].keys() == b["resume"].keys()
    for ours, theirs in zip(*map(tree.leaves, (a, b)), strict=True):
        assert equal(ours, theirs)


def test_another_seed_another_run(tmp_path):
    """Seeds change the run (trap 13)."""
    for seed in (0, 1):
        train(replace(SHORT, seed=seed, run_dir=tmp_path / str(seed)))
    assert without_times(tmp_path / "0") != without_times(tmp_path / "1")


def test_chunk_length_changes_nothing(tmp_path):
    """K = 1 and K = 8 give the same run, bit for bit."""
    for steps in (1, 8):
        train(replace(SHORT, chunk_steps=steps, num_envs=24, run_dir=tmp_path / str(steps)))
    assert without_times(tmp_path / "1") == without_times(tmp_path / "8")
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("1", "8"))
    assert all(torch.equal(a["q_net"][name], b["q_net"][name]) for name in a["q_net"])


# ------------------------------------------------------------------------ what waits for nothing


def test_between_evaluations_nothing_is_read_on_the_host(tmp_path, monkeypatch):
    """Chunks, log points and checkpoints, up to the evaluation at the end, ask for no value."""
    for module in ("metrics", "run"):
        monkeypatch.setattr(f"dqn_fast.record.{module}.HostCopy", Late)
    with ExitStack() as forbidden:
        advance, check_finite = RunRecord.advance, RunRecord.check_finite

        def begin(self: RunRecord, chunk: Any) -> None:
            if not chunk.before:
                forbidden.enter_context(NoHostReads())
            advance(self, chunk)

        def end(self: RunRecord) -> None:
            forbidden.close()
            check_finite(self)

        monkeypatch.setattr(RunRecord, "advance", begin)
        monkeypatch.setattr(RunRecord, "check_finite", end)
        args = replace(SHORT, eval_interval=0, log_interval=256, checkpoint_interval=1_000)
        train(replace(args, run_dir=tmp_path / "run"))
    assert len(rows(tmp_path / "run")) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_between_evaluations_nothing_waits_for_the_gpu(engine, tmp_path, monkeypatch):
    """The same by CUDA's own sync-debug mode, from the first log point on: by then all is warm."""
    before = torch.cuda.get_sync_debug_mode()
    advance, check_finite = RunRecord.advance, RunRecord.check_finite

    def begin(self: RunRecord, chunk: Any) -> None:
        if chunk.before >= 2_048:
            torch.cuda.set_sync_debug_mode("error")
        advance(self, chunk)

    def end(self: RunRecord) -> None:
        torch.cuda.set_sync_debug_mode(before)
        check_finite(self)

    monkeypatch.setattr(RunRecord, "advance", begin)
    monkeypatch.setattr(RunRecord, "check_finite", end)
    args = replace(SHORT, eval_interval=0, log_interval=256, checkpoint_interval=1_000)
    try:
        train(replace(args, device="cuda", engine=engine, run_dir=tmp_path / "run"))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(rows(tmp_path / "run")) == 16


@pytest.mark.gpu
def test_the_gpu_learns_as_the_cpu_does(tmp_path):
    """The same draws; the first losses agree within float32 rounding."""
    for device in ("cpu", "cuda"):
        train(replace(SHORT, device=device, log_interval=128, run_dir=tmp_path / device))
    for ours, theirs in zip(rows(tmp_path / "cpu")[:8], rows(tmp_path / "cuda")[:8], strict=True):
        for name in ("charts/episodic_return", "losses/td_loss"):
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-3)


# ----------------------------------------------------------------------------- what it records


def test_epsilon_at_start_middle_and_end():
    """Linear in global_step over eps_fraction of the run, whatever num_envs is (trap 6)."""
    args = replace(SHORT, num_envs=10, total_timesteps=2_000, eps_fraction=0.8)
    training = setup(replace(args, num_seeds=2), LineWorld())
    drawn = torch.cat([steps.epsilon for _, steps, _ in training.inputs()])
    assert drawn.shape == (200, 2)
    expected = {0: 1.0, 80: 1 - 0.95 / 2, 159: 1 - 0.95 * 1590 / 1600, 160: 0.05, 199: 0.05}
    for step, value in expected.items():
        assert drawn[step].tolist() == [pytest.approx(value, abs=1e-6)] * 2


@pytest.mark.parametrize("num_envs", [1, 4096])
def test_without_a_decay_epsilon_is_at_its_end_from_the_start(num_envs):
    """eps_fraction 0: not one vector step at eps_start."""
    schedules = schedules_of(Args(num_envs=num_envs, eps_fraction=0.0))
    epsilon = schedules.epsilon(np.array([0, num_envs]))
    assert epsilon.flatten().tolist() == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("env_id", TENSOR_ENVS)
def test_the_probe_is_one_state(env_id, tmp_path):
    """Where nothing is learned its values stay the same, whatever the observations are."""
    args = replace(SHORT, gradient_steps=0, total_timesteps=2_048, eval_interval=0, eval_episodes=1)
    env = make_env(env_id, {"max_steps": 20})
    train(replace(args, log_interval=256, run_dir=tmp_path / "run"), env=env)
    probes = [row["q/probe_0"] for row in rows(tmp_path / "run")]
    assert len(probes) == 8
    assert len(set(probes)) == 1


def test_no_episode_is_dropped_where_a_vector_step_is_longer_than_the_interval(tmp_path):
    """2 048 copies that all finish in every step, with a log point in each."""
    args = replace(SHORT, num_envs=2_048, log_interval=1_024, total_timesteps=8_192)
    summary = train(replace(args, run_dir=tmp_path / "run"), env=OnlyTruncates(1)).summary
    assert summary["num_episodes"] == 8_192
    assert summary["episodes_dropped"] == 0


def test_log_points_and_metrics(tmp_path):
    """Every interval fires at the first vector step past its multiples, with the metrics' names."""
    args = replace(SHORT, num_envs=30, total_timesteps=3_000, log_interval=500, eval_interval=1_000)
    train(replace(args, run_dir=tmp_path / "run"))
    log = rows(tmp_path / "run")
    assert [row["global_step"] for row in log] == [510, 1020, 1500, 2010, 2520, 3000]
    assert [row["global_step"] for row in log if "eval/return_mean" in row] == [1020, 2010, 3000]
    assert log[-1].keys() >= {
        "charts/episodic_return", "charts/episodic_length", "charts/epsilon", "charts/episodes",
        "losses/td_loss", "losses/q_value", "losses/td_target", "losses/grad_norm",
        "eval/return_mean", "eval/return_std", "perf/env_steps_per_s", "perf/updates_per_s",
        "q/probe_0", "q/probe_1", "exact/q_error_max", "exact/policy_optimal",
        "exact/optimal_return",
    }  # fmt: skip


def test_every_finished_episode_is_recorded(tmp_path):
    """In order, with return and length; steps in episodes and steps under way make up the run."""
    args = replace(SHORT, num_seeds=2, env_params={"n_states": 6})
    result = train(replace(args, run_dir=tmp_path / "run"))
    episodes = np.load(tmp_path / "run" / "episodes.npz")
    assert (np.diff(episodes["global_step"]) >= 0).all()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["resume"]["state"]
    elapsed = state["env"]["elapsed"].view(2, -1).sum(1)
    for member in range(2):
        own = episodes["member"] == member
        steps = episodes["episode_length"][own].sum() + elapsed[member].item()
        assert steps == result.summary["global_step"]
        won = episodes["episode_length"][own] < 40
        returns = -0.01 * episodes["episode_length"][own] + won
        assert np.abs(episodes["episode_return"][own] - returns)[won].max() < 1e-5
    assert episodes["num_dropped"] == 0
    assert rows(tmp_path / "run")[-1]["members"]["charts/episodes"] == [
        int((episodes["member"] == m).sum()) for m in range(2)
    ]


def test_config_says_what_ran(tmp_path):
    """Every argument, what follows from them, rounded values, versions."""
    args = replace(SHORT, num_envs=60, name="x", env_params={"n_states": 9}, run_dir=tmp_path / "r")
    train(args)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["args"]["num_envs"] == 60
    assert config["env_params"]["n_states"] == 9
    assert config["env_params"]["slip_prob"] == 0.05
    assert config["derived"]["replay_ratio"] == 4.0
    assert config["software"]["torch"] == torch.__version__
    text = " ".join(config["derived"]["rounded"])
    assert "total_timesteps 4,000 -> 4,020" in text
    assert "learning_starts 500 -> 540" in text
    assert "eval_interval 2,000 -> at the first multiple of 60" in text
    assert "log_interval" not in text  # not asked for: a multiple of num_envs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1_280, 4_096, 16_384)),
        ({"total_timesteps": 2**21}, (41_920, 2**17, 2**19)),
        ({"total_timesteps": 10**9}, (2_048 * 64, 8_192 * 64, 131_072 * 64)),
        ({"num_envs": 1, "total_timesteps": 12_000}, (240, 750, 3_000)),
        ({"num_envs": 1_024}, (1_024, 4_096, 16_384)),
        ({"num_envs": 60_000, "buffer_size": 60_000}, (60_000,) * 3),
        ({"log_interval": 0, "eval_interval": 7}, (0, 7, 16_384)),
    ],
)
def test_intervals_that_are_not_set_follow_from_the_run(settings, expected):
    """A 50th, a 16th and a quarter of the run, in whole vector steps, and bounded; what is set
    stays."""
    assert tuple(intervals(Args(**settings)).values()) == expected


class Late:
    """A `HostCopy` of a device that is behind: for a while it says that it is not there."""

    def __init__(self, tree: Any, device: torch.device, lent: bool = False) -> None:
        self._copy, self._asked = HostCopy(tree, device), 0

    @property
    def ready(self) -> bool:
        self._asked += 1
        return self._asked > 7

    def get(self) -> Any:
        return self._copy.get()


def test_a_device_that_is_behind_changes_nothing(tmp_path, monkeypatch):
    """Rows, episodes, snapshots and checkpoint are those of a device that answers at once."""
    args = replace(SHORT, num_seeds=2, chunk_steps=4, log_interval=320, checkpoint_interval=1_000)
    train(replace(args, run_dir=tmp_path / "at once"))
    for module in ("metrics", "run"):
        monkeypatch.setattr(f"dqn_fast.record.{module}.HostCopy", Late)
    late: list[int] = []
    settle = RunRecord.settle

    def settling(self: RunRecord, wait: bool = False) -> Any:
        rows = list(settle(self, wait))
        late.append(len(self._pending))
        return rows

    monkeypatch.setattr(RunRecord, "settle", settling)
    train(replace(args, run_dir=tmp_path / "late"))
    assert max(late) > 1
    assert late[-1] == 0
    assert without_times(tmp_path / "late") == without_times(tmp_path / "at once")
    for name in ("episodes.npz", "diagnostics.npz"):
        ours, theirs = (np.load(tmp_path / run / name) for run in ("late", "at once"))
        assert all(np.array_equal(ours[key], theirs[key], equal_nan=True) for key in theirs)
    ours, theirs = (
        load_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("late", "at once")
    )
    for content in (ours, theirs):
        times = ("spent", "eval_s", "window", "tracker")
        content["resume"]["record"] = {
            name: value for name, value in content["resume"]["record"].items() if name not in times
        }
    for a, b in zip(tree_leaves(ours["resume"]), tree_leaves(theirs["resume"]), strict=True):
        assert equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("copied_bytes", [2**28, 1_000])
def test_a_checkpoint_is_of_its_own_moment(copied_bytes, tmp_path, monkeypatch):
    """Copied or written from where it lies: later vector steps do not get into it."""
    monkeypatch.setattr("dqn_fast.record.run.COPIED_BYTES", copied_bytes)
    saved: list[Any] = []

    def save(path: Path, content: Any, keep: int = 1) -> None:
        time.sleep(0.05)  # the loop goes on meanwhile, where it does not wait
        save_checkpoint(path, content, keep)
        saved.append(load_checkpoint(path))

    monkeypatch.setattr("dqn_fast.record.run.save_checkpoint", save)
    train(replace(SHORT, checkpoint_interval=1_500, eval_interval=0, run_dir=tmp_path / "run"))
    replays = [content["resume"]["state"]["replay"] for content in saved if "resume" in content]
    assert replays[0]["size"].item() == 1_536
    assert replays[-1]["size"].item() == 4_032
    first, last = (replay["rows"]["obs"] for replay in (replays[0], replays[-1]))
    assert torch.equal(first, last[:, :1_536])
    assert first.shape == (1, 1_536)  # rows that hold nothing are not written
    assert first.untyped_storage().nbytes() == first.nbytes


def test_run_directories_do_not_collide(tmp_path, monkeypatch):
    """Two runs of the same second get two directories, named after the experiment."""
    monkeypatch.chdir(tmp_path)
    args = replace(SHORT, total_timesteps=64, learning_starts=0, name="mine", seed=3)
    first, second = train(args).run_dir, train(args).run_dir
    assert first != second
    assert first.name.startswith("LineWorld-v0__mine__s3__")


def test_on_log_sees_every_log_point(tmp_path):
    """The hook gets global_step, the training and the metrics."""
    seen = []

    def note(step: int, training: Training, row: dict[str, Any]) -> None:
        size = training.state.replay.size.item()
        seen.append((step, size, training.env, row["charts/epsilon"]))

    result = train(replace(SHORT, log_interval=1_000, run_dir=tmp_path / "run"), on_log=note)
    assert [step for step, *_ in seen] == [1_024, 2_048, 3_008, 4_032]
    assert all(step == size and env is result.env for step, size, env, _ in seen)


def test_a_point_that_only_saves_logs_nothing(tmp_path):
    """No row without metrics, and no call of the hook."""
    seen = []
    args = replace(SHORT, log_interval=2_000, checkpoint_interval=500, run_dir=tmp_path / "run")
    train(args, on_log=lambda step, _, row: seen.append((step, bool(row))))
    assert seen == [(2_048, True), (4_032, True)]
    assert [row["global_step"] for row in rows(tmp_path / "run")] == [step for step, _ in seen]


def test_an_environment_of_ones_own_goes_by_its_name(tmp_path):
    """In the settings of config.json too; parameters that it could not get are refused."""
    args = replace(SHORT, total_timesteps=1_000, run_dir=tmp_path / "run")
    with pytest.raises(UsageError, match=r"--env-params max_steps 3: must be empty with an env"):
        train(replace(args, env_params={"max_steps": 3}), env=OnlyTruncates())
    assert not (tmp_path / "run").exists()
    train(args, env=OnlyTruncates())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["env_id"] == config["args"]["env_id"] == "OnlyTruncates"
    assert "env_id" not in config["changed"]


def test_numbers_of_numpy_are_settings_like_any_other(tmp_path):
    """As a sweep over np.linspace gives them, of the run and of the environment."""
    args = replace(
        SHORT, num_envs=np.int64(8), hidden_sizes=(np.int64(16),), gamma=np.float32(0.5),
        total_timesteps=np.int64(1_000), run_dir=tmp_path / "run",
    )  # fmt: skip
    env = LineWorld(slip_prob=np.float64(0.1), n_states=np.int64(7))
    assert type(env.params["slip_prob"]) is float
    train(args, env=env)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["args"]["num_envs"] == 8
    assert config["env_params"]["n_states"] == 7
    for which in ("best", "last"):
        assert load_agent(tmp_path / "run", which, env=env).act(0) in (0, 1)


# -------------------------------------------------------------------------- runs that go wrong


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_breaks_off_keeps_its_agent(error, tmp_path):
    """In a file of its own; the checkpoint before stands, and the run can go on from it."""
    nets = []

    def stop(step: int, training: Training, row: dict[str, Any]) -> None:
        nets.append(training.q_net)
        if step >= 2_000:
            raise error

    args = replace(SHORT, eval_interval=0, run_dir=tmp_path / "run")
    with pytest.raises(error):
        train(args, on_log=stop)
    broken = load_checkpoint(tmp_path / "run" / "broken.pt")
    assert broken["global_step"] == [2_048]
    assert all(map(torch.equal, broken["q_net"].values(), nets[-1].params))
    assert "resume" not in broken
    agent = load_agent(tmp_path / "run", "last", device="cpu")
    assert agent.global_step == [1_920]
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["resume"]["global_step"] == 1_920
    with pytest.raises(ValueError, match=r"best.pt: does not exist, .*; use --agent last"):
        load_agent(tmp_path / "run")


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(late, tmp_path, monkeypatch):
    """The message names gradient step and global_step; the last good checkpoint stands, also where
    the device tells of it late."""
    if late:
        for module in ("metrics", "run"):
            monkeypatch.setattr(f"dqn_fast.record.{module}.HostCopy", Late)
    args = replace(
        SHORT, learning_rate=1e30, max_grad_norm=math.inf, loss="squared", checkpoint_interval=256,
        log_interval=512, run_dir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"not finite in gradient step \d+, at global_step \d"):
        train(args)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"].startswith("failed: loss or gradient not finite")
    content = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in content["q_net"].values())
    last = rows(tmp_path / "run")[-1]
    assert last["losses/grad_norm"] is None  # the row that tells of it is there, once
    assert [row["global_step"] for row in rows(tmp_path / "run")].count(last["global_step"]) == 1


def test_adam_state_is_part_of_the_checkpoint(tmp_path):
    """What is needed to go on: networks, moments, envs, replay, counters."""
    train(replace(SHORT, run_dir=tmp_path / "run"))
    resume = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["resume"]
    assert resume["num_updates"] > 0
    assert resume["record"]["num_evaluations"] > 0
    state = resume["state"]
    assert set(state) == set(State._fields)
    assert set(state["adam"]) == set(Adam._fields)
    assert state["replay"]["size"].tolist() == [[4_032]]
    assert state["held"] is None


def test_a_checkpoint_gives_the_state_back(tmp_path):
    """Into a state of the same settings, bit for bit, through `tree.load_`; other settings are
    refused by the place that differs."""
    args = replace(SHORT, num_seeds=2, eps_repeat=0.5, run_dir=tmp_path / "run")
    states = []
    train(args, on_log=lambda _step, training, _row: states.append(training.state))
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["resume"]["state"]
    fresh = setup(args)
    tree.load_(saved_part(fresh.state, fresh.dqn, 4_032), saved)
    assert all(map(torch.equal, tree.leaves(fresh.state), tree.leaves(states[-1])))
    for change, message in (
        ({"eps_repeat": 0.0}, "held: must be None"),
        ({"buffer_size": 100}, r"replay/rows/obs: must be torch.uint8 \(2, 100\)"),
        ({"hidden_sizes": (8,)}, "params: must hold 4 values"),
    ):
        other = setup(replace(args, **change))
        before = tree.clone(other.state)
        with pytest.raises(ValueError, match=message):
            tree.load_(saved_part(other.state, other.dqn, 4_032), saved)
        assert all(map(torch.equal, tree.leaves(other.state), tree.leaves(before)))


def test_setup_writes_nothing_and_closes_what_it_made(tmp_path, monkeypatch):
    """No directory; an environment of one's own stays open, one that was made does not."""
    monkeypatch.chdir(tmp_path)
    closed = []
    monkeypatch.setattr(LineWorld, "close", lambda self: closed.append(self))
    own = LineWorld()
    setup(SHORT, own).close()
    assert closed == []
    training = setup(SHORT)
    assert closed == []
    training.close()
    assert closed == [training.env]
    assert not list(tmp_path.iterdir())


def test_inputs_of_a_chunk_are_parts_of_its_window():
    """Noise and schedules are drawn for a window of chunks; a chunk's own are the same numbers."""
    training = setup(replace(SHORT, num_seeds=2, total_timesteps=1_500, chunk_steps=3))
    for chunk, *parts in training.inputs():
        for ours, theirs in zip(parts, training.inputs_of(chunk), strict=True):
            assert all(map(torch.equal, tree.leaves(ours), tree.leaves(theirs)))
