"""Scalar DQN on LineWorld: the loop that speed and learning are measured against.

One environment, a NumPy replay, one action at a time, plain eager torch and one `.item()` per
update, as in the notebook that the project grew from. It imports nothing from `dqn_fast`, because
it checks it, and it draws its random numbers in the notebook's order, because it has to meet the
notebook's published run. It is not meant to be fast.

    python -m benchmarks.reference
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float32]
SEED_BOUND = 1_000_000  # env seeds are drawn from [0, SEED_BOUND), as in the notebook


def at_least(name: str, value: int, low: int) -> None:
    """Raise ValueError where `value` is below `low`."""
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


@dataclass(frozen=True)
class ReferenceConfig:
    """Hyperparameters of the notebook's experiment. Every count of steps is in transitions."""

    seed: int = 7
    """Seed, at least 0, of the initial weights and of every draw of the loop."""
    num_episodes: int = 300
    """Episodes to run, at least 1; with `max_steps` it also sets the length of epsilon's decay."""
    n_states: int = 15
    """Positions on the line, at least 2; the last one is the goal."""
    max_steps: int = 40
    """Transitions after which an episode is truncated, at least 1."""
    step_penalty: float = -0.01
    """Reward of every transition."""
    goal_reward: float = 1.0
    """Reward that is added when the goal is reached."""
    slip_prob: float = 0.05
    """Probability, in [0, 1], that the env flips the action."""
    gamma: float = 0.99
    """Discount per transition, in [0, 1]."""
    learning_rate: float = 1e-3
    """Adam's step size, above 0."""
    buffer_size: int = 25_000
    """Transitions that the replay holds, at least `batch_size`; then the oldest goes first."""
    batch_size: int = 64
    """Transitions sampled per update, at least 1."""
    learning_starts: int = 500
    """No update before this many transitions."""
    train_freq: int = 1
    """Transitions from one round of updates to the next, at least 1."""
    gradient_steps: int = 1
    """Updates per round, at least 0."""
    target_update_interval: int = 200
    """Transitions from one target update to the next, at least 1."""
    tau: float = 1.0
    """Share of the online network in a target update, in (0, 1]; 1 copies it."""
    eps_start: float = 1.0
    """Probability of a random action at transition 0, in [0, 1]."""
    eps_end: float = 0.05
    """Probability of a random action once the decay is over, in [0, 1]."""
    eps_fraction: float = 0.8
    """The decay takes this share, in [0, 1], of `num_episodes * max_steps` transitions."""
    max_grad_norm: float = 10.0
    """Largest global norm of the gradient, above 0; a longer one is scaled down to it."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Units of each hidden layer, at least 1."""
    log_interval: int = 50
    """Episodes from one log line to the next; 0 logs none."""

    def make_env(self) -> "LineWorld":
        """Return the environment that this config describes; ValueError where there is none."""
        return LineWorld(
            self.n_states, self.max_steps, self.step_penalty, self.goal_reward, self.slip_prob
        )

    def check(self) -> None:
        """Raise ValueError, with the field, its value and what is allowed, for a senseless one."""
        self.make_env()
        for name in ("seed", "learning_starts", "gradient_steps", "log_interval"):
            at_least(name, getattr(self, name), 0)
        for name in ("num_episodes", "batch_size", "train_freq", "target_update_interval"):
            at_least(name, getattr(self, name), 1)
        at_least("buffer_size", self.buffer_size, self.batch_size)
        at_least("hidden_sizes", min(self.hidden_sizes, default=1), 1)
        for name in ("gamma", "eps_start", "eps_end", "eps_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass
class LineWorld:
    """A line of states 0..n_states-1, walked from 0 to the goal at the right end.

    Action 0 moves left, 1 moves right, clipped to the ends; with probability `slip_prob` the action
    is flipped first. Observations are one-hot, [n_states] float32.

    Attributes:
        rng: generator of the slips: one `random()` per step, none when `slip_prob` is 0.
        state: position of the agent.
        step_count: steps of this episode.

    Raises:
        ValueError: n_states < 2, max_steps < 1, or slip_prob outside [0, 1].
    """

    n_states: int = 15
    max_steps: int = 40
    step_penalty: float = -0.01
    goal_reward: float = 1.0
    slip_prob: float = 0.0
    n_actions: ClassVar[int] = 2

    def __post_init__(self) -> None:
        at_least("n_states", self.n_states, 2)
        at_least("max_steps", self.max_steps, 1)
        if not 0.0 <= self.slip_prob <= 1.0:
            raise ValueError(f"slip_prob must be in [0, 1], got {self.slip_prob}")
        self.rng = np.random.default_rng()
        self.state = self.step_count = 0

    def _observe(self) -> Floats:
        obs = np.zeros(self.n_states, dtype=np.float32)
        obs[self.state] = 1.0
        return obs

    def reset(self, seed: int | None = None) -> tuple[Floats, dict[str, int]]:
        """Go back to state 0, with a new generator if a seed is given; return obs and info."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.state = self.step_count = 0
        return self._observe(), {"state": self.state}

    def step(self, action: int) -> tuple[Floats, float, bool, bool, dict[str, int]]:
        """Move once; return next_obs, reward, terminated, truncated and info.

        `terminated` and `truncated` can both be true. The caller resets.

        Raises:
            ValueError: the action is not 0 or 1.
        """
        if action not in (0, 1):
            raise ValueError(f"action must be 0 or 1, got {action}")
        if self.slip_prob > 0.0 and self.rng.random() < self.slip_prob:
            action = 1 - action
        self.state = min(max(self.state + (1 if action == 1 else -1), 0), self.n_states - 1)
        self.step_count += 1
        terminated = self.state == self.n_states - 1
        truncated = self.step_count >= self.max_steps
        reward = self.step_penalty + (self.goal_reward if terminated else 0.0)
        return self._observe(), reward, terminated, truncated, {"state": self.state}


@dataclass(frozen=True)
class Batch:
    """B transitions: obs and next_obs [B, n_states], action [B] int64, the rest [B] float32."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


class ReplayBuffer:
    """NumPy ring of `capacity` transitions; when it is full a new one overwrites the oldest."""

    def __init__(self, capacity: int, obs_size: int) -> None:
        self.capacity = capacity
        self.size = 0
        self.cursor = 0  # the row that is written next
        self.obs = np.zeros((capacity, obs_size), dtype=np.float32)
        self.next_obs = np.zeros((capacity, obs_size), dtype=np.float32)
        self.action = np.zeros(capacity, dtype=np.int64)
        self.reward = np.zeros(capacity, dtype=np.float32)
        # Float, so that it enters the TD target without a cast; 1 only where the MDP ended.
        self.terminated = np.zeros(capacity, dtype=np.float32)

    def add(
        self, obs: Floats, action: int, reward: float, next_obs: Floats, terminated: bool
    ) -> None:
        """Store one transition; `next_obs` is the true successor."""
        self.obs[self.cursor] = obs
        self.action[self.cursor] = action
        self.reward[self.cursor] = reward
        self.next_obs[self.cursor] = next_obs
        self.terminated[self.cursor] = terminated
        self.cursor = (self.cursor + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Draw `batch_size` filled rows uniformly with replacement."""
        rows = rng.integers(0, self.size, size=batch_size)
        return Batch(
            obs=torch.from_numpy(self.obs[rows]),
            action=torch.from_numpy(self.action[rows]),
            reward=torch.from_numpy(self.reward[rows]),
            next_obs=torch.from_numpy(self.next_obs[rows]),
            terminated=torch.from_numpy(self.terminated[rows]),
        )


class QNetwork(nn.Module):
    """MLP with ReLU between its layers: [B, obs_size] float32 -> action values [B, n_actions]."""

    def __init__(self, obs_size: int, n_actions: int, hidden_sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = obs_size
        for hidden_size in hidden_sizes:
            layers += [nn.Linear(width, hidden_size), nn.ReLU()]
            width = hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(width, n_actions))

    def forward(self, obs: Tensor) -> Tensor:
        """Return the value of every action."""
        q_values: Tensor = self.layers(obs)
        return q_values


def epsilon_at(step: int, config: ReferenceConfig) -> float:
    """Probability of a random action after `step` transitions: linear, then `eps_end`."""
    decay_steps = max(1, int(config.eps_fraction * config.num_episodes * config.max_steps))
    progress = min(1.0, step / decay_steps)
    return config.eps_start + progress * (config.eps_end - config.eps_start)


@torch.no_grad()
def td_target(target_net: nn.Module, batch: Batch, gamma: float) -> Tensor:
    """One-step Q-learning target, [B] float32; truncation still bootstraps.

    y = r + gamma * (1 - terminated) * max_a Q_target(s', a)

    Source: Mnih et al. (2015); Pardo et al. (2018) for time limits.
    """
    next_q: Tensor = target_net(batch.next_obs).max(dim=1).values  # [B]
    return batch.reward + gamma * (1.0 - batch.terminated) * next_q


def update_(
    q_net: nn.Module,
    target_net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: ReferenceConfig,
) -> float:
    """Take one gradient step on `q_net` in place; return the mean Huber loss (beta 1) before it."""
    q_taken = q_net(batch.obs).gather(1, batch.action.unsqueeze(1)).squeeze(1)  # [B]
    loss = F.smooth_l1_loss(q_taken, td_target(target_net, batch, config.gamma))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(q_net.parameters(), config.max_grad_norm)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def sync_target_(target_net: nn.Module, q_net: nn.Module, tau: float) -> None:
    """Write target <- (1 - tau) * target + tau * online; tau = 1 is the exact copy."""
    for target, online in zip(target_net.parameters(), q_net.parameters(), strict=True):
        target.lerp_(online, tau)


@dataclass(frozen=True)
class ReferenceResult:
    """What a run leaves behind.

    Attributes:
        q_net: the online network.
        episode_returns: undiscounted return of every finished episode, in order.
        episode_lengths: transitions of every finished episode, in order.
        losses: loss of every update, in order.
        transitions: env transitions taken.
        num_updates: gradient steps taken.
        wall_s: seconds in the loop alone, `on_check` and logging included, set-up not.
    """

    q_net: QNetwork
    episode_returns: list[float]
    episode_lengths: list[int]
    losses: list[float]
    transitions: int
    num_updates: int
    wall_s: float


def train_reference(
    config: ReferenceConfig,
    *,
    max_transitions: int | None = None,
    on_check: Callable[[int, QNetwork], bool | None] | None = None,
    check_interval: int = 100,
    log: Callable[[str], None] | None = None,
) -> ReferenceResult:
    """Train one agent on one LineWorld.

    Seeds torch's global generator. All else is drawn from one NumPy generator, in this order: an
    env seed for the probe observation; an env seed per episode; per step an exploration coin and,
    when it falls below epsilon, an action; per update the replay rows.

    Args:
        config: hyperparameters.
        max_transitions: run exactly this many transitions instead of `num_episodes` episodes. The
            run then goes on past `num_episodes`, or stops short of it or within an episode;
            epsilon's decay is still that of `num_episodes * max_steps`.
        on_check: called with (transitions so far, online network) every `check_interval`
            transitions, after that transition's updates; True stops the run. It must not draw from
            a generator of this run or change the network.
        check_interval: transitions between checks, at least 1.
        log: takes one line every `log_interval` episodes: the return of the episode that has just
            ended (not an average), epsilon at its last action, and the transitions so far.

    Raises:
        ValueError: a value of `config`, `max_transitions` or `check_interval` is out of range.
    """
    config.check()
    if max_transitions is not None:
        at_least("max_transitions", max_transitions, 1)
    at_least("check_interval", check_interval, 1)
    env = config.make_env()
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    # The probe observation itself is not needed here, but its draw shifts all that follow.
    env.reset(seed=int(rng.integers(0, SEED_BOUND)))
    # Online first, then target: the order in which torch's generator hands out their weights.
    q_net = QNetwork(config.n_states, env.n_actions, config.hidden_sizes)
    target_net = QNetwork(config.n_states, env.n_actions, config.hidden_sizes)
    target_net.load_state_dict(q_net.state_dict())
    optimizer = torch.optim.Adam(q_net.parameters(), lr=config.learning_rate)
    replay = ReplayBuffer(config.buffer_size, config.n_states)

    episode_returns: list[float] = []
    episode_lengths: list[int] = []
    losses: list[float] = []
    step = 0
    stopped = False

    def running() -> bool:
        if stopped:
            return False
        if max_transitions is not None:
            return step < max_transitions
        return len(episode_returns) < config.num_episodes

    start = time.perf_counter()
    while running():
        obs, _ = env.reset(seed=int(rng.integers(0, SEED_BOUND)))
        episode_return = 0.0
        done = False
        while not done and running():
            epsilon = epsilon_at(step, config)  # before this step is counted
            if rng.random() < epsilon:
                action = int(rng.integers(0, env.n_actions))
            else:
                with torch.no_grad():
                    action = int(q_net(torch.from_numpy(obs).unsqueeze(0)).argmax(dim=1).item())
            next_obs, reward, terminated, truncated, _ = env.step(action)
            replay.add(obs, action, reward, next_obs, terminated)
            obs = next_obs
            episode_return += reward
            done = terminated or truncated
            step += 1

            if (
                replay.size >= config.batch_size
                and step >= config.learning_starts
                and step % config.train_freq == 0
            ):
                for _ in range(config.gradient_steps):
                    batch = replay.sample(config.batch_size, rng)
                    losses.append(update_(q_net, target_net, optimizer, batch, config))
            if step % config.target_update_interval == 0:
                sync_target_(target_net, q_net, config.tau)
            if on_check is not None and step % check_interval == 0:
                stopped = bool(on_check(step, q_net))

        if not done:
            break  # stopped within an episode, which is then not counted
        episode_returns.append(episode_return)
        episode_lengths.append(env.step_count)
        episode = len(episode_returns)
        if log is not None and config.log_interval > 0 and episode % config.log_interval == 0:
            log(
                f"episode {episode:3d} | reward {episode_return:5.2f} | "
                f"eps {epsilon:.3f} | transitions {step}"
            )
    wall_s = time.perf_counter() - start
    return ReferenceResult(
        q_net, episode_returns, episode_lengths, losses, step, len(losses), wall_s
    )


def main(
    config: Annotated[ReferenceConfig, tyro.conf.arg(name="")],
    max_transitions: int | None = None,
    num_threads: int = 1,
) -> None:
    """Train the scalar DQN on LineWorld; print its log, its speed, and one JSON line last.

    Args:
        config: hyperparameters.
        max_transitions: run exactly this many transitions, at least 1, whatever `num_episodes` is.
        num_threads: threads that torch may use, at least 1.
    """
    try:
        config.check()
        at_least("num_threads", num_threads, 1)
        if max_transitions is not None:
            at_least("max_transitions", max_transitions, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(num_threads)
    result = train_reference(config, max_transitions=max_transitions, log=print)
    record = {
        "benchmark": "reference",
        "env_id": "LineWorld-v0",
        "seed": config.seed,
        "num_envs": 1,
        "num_threads": num_threads,
        "global_step": result.transitions,
        "num_updates": result.num_updates,
        "replay_ratio": config.gradient_steps * config.batch_size / config.train_freq,
        "wall_s": result.wall_s,
        "env_steps_per_s": result.transitions / result.wall_s,
        "updates_per_s": result.num_updates / result.wall_s,
    }
    print(
        f"{record['env_steps_per_s']:.0f} env steps/s | {record['updates_per_s']:.0f} updates/s | "
        f"replay ratio {record['replay_ratio']:g} | {result.wall_s:.1f} s, {num_threads} thread(s)"
    )
    print(json.dumps(record))


if __name__ == "__main__":
    tyro.cli(main)
