"""The scalar reference loop: the published run, its environment, replay, schedule and update."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.reference import (
    Batch,
    LineWorld,
    QNetwork,
    ReferenceConfig,
    ReplayBuffer,
    epsilon_at,
    main,
    sync_target_,
    td_target,
    train_reference,
    update_,
)

# Big enough to learn a two-state line, small enough for a second or two.
SMALL = ReferenceConfig(
    n_states=2,
    max_steps=1,
    slip_prob=0.0,
    batch_size=16,
    learning_starts=16,
    target_update_interval=20,
    hidden_sizes=(16,),
    eps_end=1.0,
    learning_rate=1e-2,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, as the command does by default, and leave torch as it was."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def table(rows: list[list[float]]) -> nn.Linear:
    """Return a network that reads Q(s, a) = rows[s][a] off a one-hot state."""
    net = nn.Linear(len(rows), len(rows[0]), bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor(rows).T)
    return net


def hand_batch() -> Batch:
    """Three transitions on three states: an ordinary, a terminating and a truncating one."""
    return Batch(
        obs=torch.eye(3)[[0, 1, 1]],
        action=torch.tensor([1, 1, 0]),
        reward=torch.tensor([-0.5, 1.0, -0.5]),
        next_obs=torch.eye(3)[[1, 2, 0]],
        terminated=torch.tensor([0.0, 1.0, 0.0]),  # the time limit of the third is not stored
    )


def test_published_first_line_is_met() -> None:
    """The default run's fiftieth episode has the return, epsilon and transitions once published."""
    lines: list[str] = []
    result = train_reference(ReferenceConfig(), max_transitions=1999, log=lines.append)
    assert lines == ["episode  50 | reward -0.40 | eps 0.802 | transitions 1999"]
    assert len(result.episode_returns) == 50
    assert sum(result.episode_lengths) == result.transitions == 1999
    assert result.num_updates == len(result.losses) == 1999 - 500 + 1
    assert np.isfinite(result.losses).all()


@pytest.mark.parametrize(("eps_fraction", "decay_steps"), [(0.0, 1), (0.01, 120)])
def test_draw_order(eps_fraction: float, decay_steps: int) -> None:
    """Draws come as: probe seed; per episode an env seed; per step a coin and a random action."""
    # A short, slippery line, so that one draw out of place changes returns.
    config = ReferenceConfig(
        seed=3, n_states=4, slip_prob=0.3, learning_starts=10_000, eps_fraction=eps_fraction
    )
    rng, env = np.random.default_rng(3), LineWorld(n_states=4, slip_prob=0.3)
    torch.manual_seed(3)
    q_net = QNetwork(4, 2, (128, 128))  # created first, and never updated in this run
    rng.integers(0, 1_000_000)
    returns: list[float] = []
    step = 0
    for _ in range(8):
        obs, _ = env.reset(seed=int(rng.integers(0, 1_000_000)))
        returns.append(0.0)
        done = False
        while not done:
            if rng.random() < max(0.05, 1.0 - 0.95 * step / decay_steps):
                action = int(rng.integers(0, 2))
            else:
                action = int(q_net(torch.tensor(obs)).argmax())
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[-1] += reward
            done = terminated or truncated
            step += 1
    assert train_reference(config, max_transitions=step).episode_returns == returns


def test_line_world_by_hand() -> None:
    """Moves, clipping at the left end, rewards and the goal are as calculated by hand."""
    env = LineWorld(n_states=3, max_steps=10)
    obs, info = env.reset(seed=0)
    assert obs.dtype == np.float32
    assert (obs.tolist(), info["state"]) == ([1.0, 0.0, 0.0], 0)
    for action, state, reward, terminated in [
        (0, 0, -0.01, False),  # clipped
        (1, 1, -0.01, False),
        (0, 0, -0.01, False),
        (1, 1, -0.01, False),
        (1, 2, 0.99, True),
        (1, 2, 0.99, True),  # clipped at the right end too, where nobody has reset
    ]:
        got = env.step(action)
        assert got[0].tolist() == np.eye(3)[state].tolist()
        assert got[1] == pytest.approx(reward)
        assert got[2:4] == (terminated, False)
        assert got[4]["state"] == state
    env.reset()
    assert (env.state, env.step_count) == (0, 0)


def test_line_world_both_flags_at_once() -> None:
    """The goal on the last allowed step is termination and truncation; elsewhere truncation."""
    env = LineWorld(n_states=3, max_steps=2)
    env.reset(seed=0)
    assert env.step(1)[2:4] == (False, False)
    assert env.step(1)[2:4] == (True, True)
    env.reset()
    env.step(1)
    assert env.step(0)[2:4] == (False, True)


def test_line_world_slip() -> None:
    """Slip 1 flips every action; 0.25 flips a quarter, on draws of the seed; 0 draws nothing."""
    env = LineWorld(n_states=4, slip_prob=1.0)
    env.reset(seed=0)
    assert [env.step(a)[4]["state"] for a in (0, 0, 1, 1, 1)] == [1, 2, 1, 0, 0]

    env = LineWorld(n_states=2000, max_steps=1000, slip_prob=0.25)
    env.reset(seed=5)
    slips = np.random.default_rng(5).random(1000) < 0.25
    states = [0]
    for slip in slips:
        states.append(max(states[-1] + (-1 if slip else 1), 0))
        assert env.step(1)[4]["state"] == states[-1]
    assert 200 < slips.sum() < 300

    env = LineWorld()
    env.reset(seed=5)
    env.step(1)
    assert env.rng.random() == np.random.default_rng(5).random()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LineWorld(n_states=1), "n_states must be at least 2, got 1"),
        (lambda: LineWorld(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: LineWorld(slip_prob=1.5), r"slip_prob must be in \[0, 1\], got 1.5"),
        (lambda: LineWorld(slip_prob=-0.1), r"slip_prob must be in \[0, 1\], got -0.1"),
        (lambda: LineWorld().step(2), "action must be 0 or 1, got 2"),
        (lambda: LineWorld().step(-1), "action must be 0 or 1, got -1"),
    ],
)
def test_line_world_errors(make: Callable[[], Any], message: str) -> None:
    """What the world cannot be, and what cannot be done in it, is refused with the number."""
    with pytest.raises(ValueError, match=message):
        make()


def test_replay_overwrites_the_oldest() -> None:
    """After 2.5 times the capacity every sampled row is whole and one of the newest rows."""
    capacity, count = 8, 20
    replay = ReplayBuffer(capacity, obs_size=1)
    rng = np.random.default_rng(0)
    for i in range(count):
        obs = np.full(1, i, dtype=np.float32)
        replay.add(obs, i, float(i), obs + 0.5, i % 2 == 1)
        batch = replay.sample(200, rng)
        oldest = max(0, i + 1 - capacity)
        assert replay.size == i + 1 - oldest
        assert set(batch.action.tolist()) == set(range(oldest, i + 1))
        assert torch.equal(batch.obs[:, 0], batch.action.float())
        assert torch.equal(batch.reward, batch.action.float())
        assert torch.equal(batch.next_obs[:, 0], batch.action + 0.5)
        assert torch.equal(batch.terminated, (batch.action % 2).float())
    assert batch.action.dtype == torch.int64
    assert batch.obs.dtype == batch.reward.dtype == batch.terminated.dtype == torch.float32


def test_epsilon_schedule() -> None:
    """Epsilon is 1 at the start, half-way in the middle, and 0.05 from transition 9 600 on."""
    config = ReferenceConfig()
    assert epsilon_at(0, config) == 1.0
    assert epsilon_at(4_800, config) == pytest.approx(0.525)
    assert epsilon_at(9_599, config) > 0.05
    assert epsilon_at(9_600, config) == pytest.approx(0.05)
    assert epsilon_at(1_000_000, config) == pytest.approx(0.05)
    assert epsilon_at(1, replace(config, eps_fraction=0.0)) == pytest.approx(0.05)


def test_td_target_by_hand() -> None:
    """The target bootstraps from the best next action, through truncation, not termination."""
    target_net = table([[2.0, 4.0], [1.0, -1.0], [100.0, 100.0]])
    target = td_target(target_net, hand_batch(), gamma=0.5)
    # -0.5 + 0.5 * 1;  1;  -0.5 + 0.5 * 4
    assert target.tolist() == [0.0, 1.0, 1.5]
    assert not target.requires_grad


@pytest.mark.parametrize("max_grad_norm", [10.0, 0.1])
def test_update_by_hand(max_grad_norm: float) -> None:
    """One update equals NumPy's: mean Huber loss, and its gradient clipped by global norm."""
    q_net = table([[0.0, 0.5], [1.0, 4.0], [0.0, 0.0]])
    target_net = table([[2.0, 4.0], [1.0, -1.0], [100.0, 100.0]])
    before = q_net.weight.detach().clone()
    loss = update_(
        q_net,
        target_net,
        torch.optim.SGD(q_net.parameters(), lr=1.0),
        hand_batch(),
        replace(ReferenceConfig(), gamma=0.5, max_grad_norm=max_grad_norm),
    )
    error = np.array([0.5 - 0.0, 4.0 - 1.0, 1.0 - 1.5])
    assert loss == pytest.approx(np.mean([0.5 * 0.5**2, 3.0 - 0.5, 0.5 * 0.5**2]))
    gradient = np.zeros((2, 3))  # [A, n_states], as nn.Linear keeps its weight
    gradient[[1, 1, 0], [0, 1, 1]] = np.clip(error, -1.0, 1.0) / 3
    norm = float(np.linalg.norm(gradient))
    gradient *= min(1.0, max_grad_norm / norm)
    np.testing.assert_allclose((before - q_net.weight.detach()).numpy(), gradient, rtol=1e-4)
    assert target_net.weight.grad is None


def test_sync_target() -> None:
    """tau = 1 is the exact copy, in the target's own memory; tau = 0.25 goes a quarter."""
    torch.manual_seed(0)
    q_net, target_net = QNetwork(3, 2, (4,)), QNetwork(3, 2, (4,))
    old = [p.detach().clone() for p in target_net.parameters()]
    sync_target_(target_net, q_net, 0.25)
    for a, b, o in zip(target_net.parameters(), q_net.parameters(), old, strict=True):
        torch.testing.assert_close(a, 0.75 * o + 0.25 * b)
    sync_target_(target_net, q_net, 1.0)
    for a, b in zip(target_net.parameters(), q_net.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_loop_bootstraps_through_truncation_only() -> None:
    """With reward 1 and gamma 0.5 an action that is always truncated is worth 2, the goal 1."""
    config = replace(SMALL, step_penalty=1.0, goal_reward=0.0, gamma=0.5)
    result = train_reference(config, max_transitions=800)
    q_values = result.q_net(torch.tensor([[1.0, 0.0]]))[0]
    assert result.num_updates > 0
    assert q_values.tolist() == pytest.approx([2.0, 1.0], abs=0.05)


def test_target_network_starts_as_a_copy() -> None:
    """The first loss is that of the initial online network against itself."""
    # Greedy one-step episodes without slips: every row of the replay is the same transition.
    config = replace(SMALL, n_states=3, eps_start=0.0, eps_end=0.0)
    torch.manual_seed(config.seed)
    q_values = QNetwork(3, 2, config.hidden_sizes)(torch.eye(3)).detach()  # [state, action]
    action = int(q_values[0].argmax())
    error = float(q_values[0, action] - (-0.01 + 0.99 * q_values[action].max()))
    result = train_reference(config, max_transitions=config.learning_starts)
    assert abs(error) < 1.0  # where Huber is the half square
    assert result.losses == [pytest.approx(0.5 * error**2, rel=1e-4)]


def test_update_counts() -> None:
    """Updates fall on multiples of train_freq from learning_starts and a full batch on."""
    config = replace(SMALL, learning_starts=20, train_freq=7, gradient_steps=3)
    assert train_reference(config, max_transitions=40).num_updates == 3 * 3  # at 21, 28, 35
    config = replace(SMALL, learning_starts=0)
    assert train_reference(config, max_transitions=17).num_updates == 2  # at 16, 17


def test_checks_and_length_of_run() -> None:
    """Checks fall on multiples of the interval, True stops the run, and so does either limit."""
    seen: list[int] = []

    def stop_at_30(transitions: int, q_net: QNetwork) -> bool:
        seen.append(transitions)
        return transitions >= 30

    config = replace(SMALL, max_steps=40, num_episodes=2)
    stopped = train_reference(config, on_check=stop_at_30, check_interval=10, max_transitions=100)
    assert (seen, stopped.transitions) == ([10, 20, 30], 30)
    by_episodes = train_reference(config)
    assert len(by_episodes.episode_returns) == 2
    assert by_episodes.transitions == sum(by_episodes.episode_lengths)
    longer = train_reference(config, max_transitions=60)
    assert longer.transitions == 60
    assert len(longer.episode_returns) > 2
    assert longer.episode_returns[:2] == by_episodes.episode_returns
    assert longer.losses == train_reference(config, max_transitions=60).losses


def test_command_prints_json_last(capsys: pytest.CaptureFixture[str]) -> None:
    """The command's last line is one JSON object whose rates are counts over the loop's time."""
    main(replace(SMALL, num_episodes=50))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("episode  50 | reward ")
    record = json.loads(lines[-1])
    assert record["global_step"] == 50
    assert record["num_updates"] == 35
    assert record["replay_ratio"] == 16
    assert record["env_steps_per_s"] == pytest.approx(50 / record["wall_s"])
    assert record["updates_per_s"] == pytest.approx(35 / record["wall_s"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_states": 1}, "n_states must be at least 2, got 1"),
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
        ({"buffer_size": 63}, "buffer_size must be at least 64, got 63"),
        ({"eps_end": 1.5}, "eps_end must be in [0, 1], got 1.5"),
        ({"tau": 0.0}, "tau must be in (0, 1], got 0.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    ],
)
def test_command_refuses_bad_input(
    change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that makes no sense ends the command with status 2 and one line that names it."""
    with pytest.raises(SystemExit) as exit_info:
        main(replace(ReferenceConfig(), **change))
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_reference_stands_alone() -> None:
    """Importing the reference does not import the package that it checks."""
    code = "import sys, benchmarks.reference; sys.exit('dqn_fast' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
