"""A DQN in JAX that takes the steps of a run here: the speed that whole-loop compilation reaches.

    python -m benchmarks.peers.jax_dqn --env-id CartPole-v1 --stop-at-return 475

Environments, replay and learner are arrays on one device, and a chunk of vector steps is one call
of one compiled function. It shares settings and the judge of what was learnt with `dqn_fast`, and
no algorithm: dynamics, replay, gradients, Adam and schedules are written again. A population is the
same chunk under `jax.vmap`. The command trains one member from process start to the goal of
--stop-when-optimal or --stop-at-return, or to the end of the run, and prints one JSON line. Needs
the package jax.

`tuned` keeps what measured fastest on one CPU core, and avoids what is known to cost on a GPU:

- replay is filled by a loop of its own, so that the one that learns has no branch; a `lax.cond`
  in a loop copies its predicate to the host on a GPU in every iteration;
- buffers are donated, so that replay is written in place;
- on the CPU the number of steps of a call is an argument, so that one compilation serves all
  calls, at the same speed; on a GPU a loop whose length is not known asks the host every time, so
  there a length compiles once;
- on the CPU weight gradients are products of an explicitly transposed input, because transposed
  operands go to a slower kernel of XLA's, and many copies act in blocks that stay in the cache.

`tuned=False` is how such loops are usually written: one `lax.cond` a step, nothing donated.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from jax import Array, lax
from numpy.typing import NDArray

from dqn_fast.device import MatmulPrecision
from dqn_fast.dqn import QFunction
from dqn_fast.envs import make_env
from dqn_fast.exact import solve
from dqn_fast.heads import ScalarHead
from dqn_fast.memory import EVAL_EPISODES
from dqn_fast.networks import QNetwork
from dqn_fast.settings import UsageError
from dqn_fast.setup import check
from dqn_fast.train import Args, asked_env_id

if TYPE_CHECKING:
    from benchmarks.turns import Stopwatch

ENDLESS = 10**12
EXPLORE, REPLAY, WEIGHTS, RESET, EVALUATION = range(5)  # streams of random numbers
ACT_BLOCK = 1024
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8

Precision = Literal["highest", "tensorfloat32"]
PRECISIONS: dict[MatmulPrecision, Precision] = {"highest": "highest", "high": "tensorfloat32"}
"""Names of `Args.matmul_precision` in JAX, whose own default on a GPU is TF32."""
Params = list[tuple[Array, Array]]


# --------------------------------------------------------------------------------- environments


@dataclass(frozen=True)
class LineWorld:
    """A corridor from position 0 to the goal at its right end; see `dqn_fast.envs.line_world`.

    The state is the position, uint8 [N]: replay stores it, and the network reads it one-hot.
    """

    n_states: int = 15
    max_steps: int = 40
    step_penalty: float = -0.01
    goal_reward: float = 1.0
    slip_prob: float = 0.0

    num_actions = 2
    reset_noise_dim = 0
    step_noise_dim = 1

    def reset(self, noise: Array) -> Array:
        return jnp.zeros(noise.shape[0], jnp.uint8)

    def step(self, state: Array, action: Array, noise: Array) -> tuple[Array, Array, Array]:
        right = (action == 1) ^ (noise[:, 0] < self.slip_prob)
        position = jnp.clip(state.astype(jnp.int32) + jnp.where(right, 1, -1), 0, self.n_states - 1)
        terminated = position == self.n_states - 1
        reward = self.step_penalty + self.goal_reward * terminated.astype(jnp.float32)
        return position.astype(jnp.uint8), reward, terminated

    def features(self, state: Array) -> Array:
        states = jnp.arange(self.n_states, dtype=state.dtype)
        return (state[..., None] == states).astype(jnp.float32)


@dataclass(frozen=True)
class CartPole:
    """Gymnasium's CartPole-v1; the state is x, x_dot, theta, theta_dot, float32 [N, 4].

    Source: Barto, Sutton & Anderson (1983), with Gymnasium's constants and Euler steps.
    """

    max_steps: int = 500

    num_actions = 2
    reset_noise_dim = 4
    step_noise_dim = 0

    def reset(self, noise: Array) -> Array:
        return 0.1 * noise - 0.05

    def step(self, state: Array, action: Array, noise: Array) -> tuple[Array, Array, Array]:
        gravity, mass_cart, mass_pole, half_length, force, tau = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
        total_mass, moment = mass_cart + mass_pole, mass_pole * half_length
        x, x_dot, theta, theta_dot = state.T
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        temp = (jnp.where(action == 1, force, -force) + moment * theta_dot**2 * sin) / total_mass
        theta_acc = (gravity * sin - cos * temp) / (
            half_length * (4.0 / 3.0 - mass_pole * cos**2 / total_mass)
        )
        x_acc = temp - moment * theta_acc * cos / total_mass
        state = state + tau * jnp.stack([x_dot, x_acc, theta_dot, theta_acc], 1)
        terminated = (jnp.abs(state[:, 0]) > 2.4) | (jnp.abs(state[:, 2]) > 12 * math.pi / 180)
        return state, jnp.ones_like(x), terminated

    def features(self, state: Array) -> Array:
        return state


@dataclass(frozen=True)
class Acrobot:
    """Gymnasium's Acrobot-v1; the state is both angles and their velocities, float32 [N, 4].

    Source: Sutton (1996), with Gymnasium's constants, "book" equations and one step of fourth-order
    Runge-Kutta.
    """

    max_steps: int = 500

    num_actions = 3
    reset_noise_dim = 4
    step_noise_dim = 0

    def reset(self, noise: Array) -> Array:
        return 0.2 * noise - 0.1

    def step(self, state: Array, action: Array, noise: Array) -> tuple[Array, Array, Array]:
        torque, h = action.astype(jnp.float32) - 1.0, 0.2
        k1 = self._derivative(state, torque)
        k2 = self._derivative(state + h / 2 * k1, torque)
        k3 = self._derivative(state + h / 2 * k2, torque)
        k4 = self._derivative(state + h * k3, torque)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = state[:, :2] - math.tau * jnp.round(state[:, :2] / math.tau)
        limits = jnp.array([4 * math.pi, 9 * math.pi], jnp.float32)
        velocities = jnp.clip(state[:, 2:], -limits, limits)
        terminated = -jnp.cos(angles[:, 0]) - jnp.cos(angles.sum(1)) > 1.0
        reward = terminated.astype(jnp.float32) - 1.0
        return jnp.concatenate([angles, velocities], 1), reward, terminated

    @staticmethod
    def _derivative(state: Array, torque: Array) -> Array:
        mass, length, centre, moment, gravity = 1.0, 1.0, 0.5, 1.0, 9.8
        theta1, theta2, v1, v2 = state.T
        cos2, sin2 = jnp.cos(theta2), jnp.sin(theta2)
        both = length**2 + centre**2 + 2 * length * centre * cos2
        d1 = mass * centre**2 + mass * both + 2 * moment
        d2 = mass * (centre**2 + length * centre * cos2) + moment
        phi2 = mass * centre * gravity * jnp.sin(theta1 + theta2)
        bend = mass * length * centre * sin2
        phi1 = -bend * v2**2 - 2 * bend * v2 * v1 + phi2
        phi1 = phi1 + (mass * centre + mass * length) * gravity * jnp.sin(theta1)
        a2 = torque + d2 / d1 * phi1 - bend * v1**2 - phi2
        a2 = a2 / (mass * centre**2 + moment - d2**2 / d1)
        return jnp.stack([v1, v2, -(d2 * a2 + phi1) / d1, a2], 1)

    def features(self, state: Array) -> Array:
        theta1, theta2 = state[..., 0], state[..., 1]
        angles = [jnp.cos(theta1), jnp.sin(theta1), jnp.cos(theta2), jnp.sin(theta2)]
        return jnp.stack([*angles, state[..., 2], state[..., 3]], -1)


Env = LineWorld | CartPole | Acrobot


# ------------------------------------------------------------------------ what is carried, inputs


class Envs(NamedTuple):
    """N copies: state [N, ...], elapsed steps int32 [N] and return float32 [N] of the episode."""

    state: Array
    elapsed: Array
    episode_return: Array


class Replay(NamedTuple):
    """A ring of R rows, R being the capacity rounded up to whole vector steps.

    So a vector step is written in one piece wherever the cursor stands; only the newest `size`
    rows, at most the capacity, are sampled. Actions are uint8; cursor and size int32 [].
    """

    state: Array
    action: Array
    reward: Array
    next_state: Array
    terminated: Array
    cursor: Array
    size: Array


class Learner(NamedTuple):
    """Online and target network, and Adam's moments, each a list of (weight, bias)."""

    params: Params
    target: Params
    mean: Params
    square: Params


class Statistics(NamedTuple):
    """Sums over finished episodes and gradient steps since they were last read, [] each."""

    episodes: Array
    episode_return: Array
    episode_length: Array
    loss: Array
    grad_norm: Array


class Carry(NamedTuple):
    """All that goes from group to group."""

    learner: Learner
    envs: Envs
    replay: Replay
    statistics: Statistics


def _member_axes(each: Any = 0, shared: Any = None) -> Carry:
    replay = Replay(each, each, each, each, each, cursor=shared, size=shared)
    return Carry(each, each, replay, each)


MEMBERS = _member_axes()
"""Axis of the members in the state of a population. All write replay at the same place: a cursor
for each would turn one write of a slice into a scatter."""


class Inputs(NamedTuple):
    """Of G groups; a group is P vector steps and then U gradient steps.

    Attributes:
        step: numbers of the vector steps, uint32 [G, P].
        epsilon: float32 [G, P].
        update: numbers of the gradient steps, uint32 [G, U].
        step_size: learning rate / (1 - b1^t), float32 [G, U].
        inverse_correction: 1 / sqrt(1 - b2^t), float32 [G, U].
        sync: weight of the online network in the target after that step, float32 [G, U].
        learns: whether the group's gradient steps are taken, bool [G].
    """

    step: Any
    epsilon: Any
    update: Any
    step_size: Any
    inverse_correction: Any
    sync: Any
    learns: Any


# -------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class Schedule:
    """Which group learns and with what, in whole numbers of transitions.

    Attributes:
        args: settings.
        num_steps: P, vector steps of a group.
        num_updates: U, gradient steps of a group.
        fill: groups before the first that learns.
        num_groups: groups of the run.
    """

    args: Args
    num_steps: int
    num_updates: int
    fill: int
    num_groups: int

    @classmethod
    def of(cls, args: Args) -> Schedule:
        """Raise UsageError where gradient steps cannot come in equal groups."""
        n, freq = args.num_envs, args.train_freq
        num_steps = max(1, freq // n)
        vector_steps = -(-args.total_timesteps // n)
        need(args, args.gradient_steps >= 1, "gradient_steps", "at least 1")
        need(
            args,
            n % freq == 0 or freq % n == 0,
            "train_freq",
            "a multiple of --num-envs or divisor",
        )
        need(
            args,
            vector_steps % num_steps == 0,
            "total_timesteps",
            f"a multiple of --train-freq {freq}",
        )
        first = cls._first_learning_step(args)
        return cls(
            args=args,
            num_steps=num_steps,
            num_updates=args.gradient_steps * max(1, n // freq),
            fill=min(-(-(first + 1) // num_steps) - 1, vector_steps // num_steps),
            num_groups=vector_steps // num_steps,
        )

    @staticmethod
    def _first_learning_step(args: Args) -> int:
        return max(-(-max(args.learning_starts, args.batch_size) // args.num_envs) - 1, 0)

    @property
    def transitions(self) -> int:
        """Transitions of a group."""
        return self.num_steps * self.args.num_envs

    def inputs(self, first: int, count: int, capacity: int) -> Inputs:
        """Inputs of `count` groups from `first` on, padded to `capacity` groups."""
        args, n, u = self.args, self.args.num_envs, self.num_updates
        group = first + np.arange(count, dtype=np.int64)
        step = group[:, None] * self.num_steps + np.arange(self.num_steps)
        t = np.maximum(group - self.fill, 0)[:, None] * u + np.arange(1, u + 1)
        # The last vector step's transitions are shared out evenly: U times each stamp.
        stamp = (step[:, -1:] * u + np.arange(1, u + 1)) * n
        rate_end = args.learning_rate if args.learning_rate_end is None else args.learning_rate_end
        rate = _linear(stamp / u, args.learning_rate, rate_end, args.total_timesteps)
        ramp = int(args.eps_fraction * args.total_timesteps)
        inputs = Inputs(
            step=step.astype(np.uint32),
            epsilon=_linear(step * n, args.eps_start, args.eps_end, ramp).astype(np.float32),
            update=t.astype(np.uint32),
            step_size=(rate / (1.0 - ADAM_BETAS[0] ** t)).astype(np.float32),
            inverse_correction=(1.0 / np.sqrt(1.0 - ADAM_BETAS[1] ** t)).astype(np.float32),
            sync=np.where(self._syncs(group, stamp), args.tau, 0.0).astype(np.float32),
            learns=group >= self.fill,
        )
        pad = capacity - count
        return Inputs(*(np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)) for x in inputs))

    def _syncs(self, group: NDArray[np.int64], stamp: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a stamp is the first at or past a multiple of the interval, bool like `stamp`."""
        period = self.args.target_update_interval * self.num_updates
        if not period:
            return np.zeros(stamp.shape, np.bool_)
        # A group's first gradient step looks back to its start; the very first, to where learning
        # was allowed.
        begin = np.where(
            group == self.fill,
            self._first_learning_step(self.args) * self.args.num_envs,
            group * self.transitions,
        )
        before = np.concatenate([begin[:, None] * self.num_updates, stamp[:, :-1]], 1)
        return stamp // period > before // period


def _linear(step: Any, start: float, end: float, duration: float) -> NDArray[np.float64]:
    """From `start` at 0 to `end` at `duration`, then constant."""
    fraction = np.clip(step / duration, 0.0, 1.0) if duration > 0 else np.ones_like(step, float)
    return np.asarray(start + fraction * (end - start))


def need(args: Args, ok: bool, name: str, allowed: str) -> None:
    """Raise UsageError that names the flag of setting `name` unless `ok`."""
    if not ok:
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} {getattr(args, name)}: must be {allowed} for the loop in JAX")


def environment(args: Args) -> Env:
    """The environment of `args`; UsageError where it is not one of these, or not as they are."""
    known: dict[str, type[Env]] = {
        "LineWorld-v0": LineWorld, "CartPole-v1": CartPole, "Acrobot-v1": Acrobot,
    }  # fmt: skip
    need(args, args.env_id in known, "env_id", f"one of {', '.join(known)}")
    if args.env_id != "LineWorld-v0":
        need(args, set(args.env_params) <= {"max_steps"}, "env_params", "max_steps only")
    try:
        params = make_env(args.env_id, args.env_params).params
    except ValueError as error:
        raise UsageError(str(error)) from error
    need(args, params.get("n_states", 0) <= 256, "env_params", "at most 256 states")
    cls = known[args.env_id]
    return cls(**{f.name: params[f.name] for f in dataclasses.fields(cls)})


# --------------------------------------------------------------------------- pieces of the step


@jax.custom_vjp
def dense(x: Array, weight: Array) -> Array:
    """x [B, I] times weight [I, O], with a backward pass that suits XLA's kernels on the CPU.

    Its fast ones take no transposed left operand, so the input is transposed first; the barrier
    keeps the compiler from undoing that. With few outputs a sum of products is faster still.
    """
    return x @ weight


def _dense_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, weight = saved
    if weight.shape[1] <= 8:
        return grad @ weight.T, (x[:, None, :] * grad[:, :, None]).sum(0).T
    return grad @ weight.T, lax.optimization_barrier(x.T) @ grad


dense.defvjp(lambda x, weight: (x @ weight, (x, weight)), _dense_backward)


def init_params(key: Array, sizes: tuple[int, ...]) -> Params:
    """Weights [I, O] and biases [O], uniform within 1/sqrt(I)."""
    layers: Params = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        bound = fan_in**-0.5
        draw = jax.random.uniform(
            jax.random.fold_in(key, i), (fan_in + 1, fan_out), jnp.float32, -bound, bound
        )
        layers.append((draw[:-1], draw[-1]))
    return layers


def uniform(bits: Array) -> Array:
    """Random bits, uint32, as float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def env_step(
    env: Env, envs: Envs, action: Array, step_noise: Array, reset_noise: Array
) -> tuple[Envs, tuple[Array, ...]]:
    """One step of all copies; those that finish go on from a reset (SAME_STEP).

    Returns:
        The copies to go on from; reward, true successor, terminated, done, and return and length
        of the episode with this step.
    """
    state, reward, terminated = env.step(envs.state, action, step_noise)
    elapsed, episode_return = envs.elapsed + 1, envs.episode_return + reward
    done = terminated | (elapsed >= env.max_steps)
    fresh = env.reset(reset_noise)
    wide = done.reshape(-1, *[1] * (state.ndim - 1))
    following = Envs(
        jnp.where(wide, fresh, state),
        jnp.where(done, 0, elapsed),
        jnp.where(done, 0.0, episode_return),
    )
    return following, (reward, state, terminated, done, episode_return, elapsed)


def store(
    replay: Replay, state: Array, action: Array, outcome: tuple[Array, ...], capacity: int
) -> Replay:
    """Write N transitions at the cursor, over the oldest."""
    rows = (state, action.astype(jnp.uint8), *outcome)
    n, num_rows = state.shape[0], replay.reward.shape[0]
    data = (
        lax.dynamic_update_slice_in_dim(stored, new, replay.cursor, 0)
        for stored, new in zip(replay[:5], rows, strict=True)
    )
    cursor = jnp.where(replay.cursor + n >= num_rows, 0, replay.cursor + n)
    return Replay._make([*data, cursor, jnp.minimum(replay.size + n, capacity)])


def sample(replay: Replay, bits: Array) -> tuple[Array, ...]:
    """Rows drawn with replacement among the newest `size`; bits uint32 [B].

    The remainder favours some rows by less than size / 2^32 of their share.
    """
    age = (bits % replay.size.astype(jnp.uint32)).astype(jnp.int32)
    row = replay.cursor - 1 - age
    row = jnp.where(row < 0, row + replay.reward.shape[0], row)
    return tuple(stored.at[row].get(mode="promise_in_bounds") for stored in replay[:5])


def huber(error: Array) -> Array:
    size = jnp.abs(error)
    return jnp.where(size < 1.0, 0.5 * error * error, size - 0.5)


@dataclass(frozen=True)
class Algorithm:
    """The functions that are compiled: act, learn, a group of steps, a chunk of groups, evaluate.

    Attributes:
        for_cpu: whether to compute as suits XLA's kernels on the CPU; the same within rounding.
    """

    args: Args
    env: Env
    for_cpu: bool

    def q_values(self, params: Params, state: Array) -> Array:
        """float32 [B, A] of states [B, ...]."""
        x = self.env.features(state)
        for i, (weight, bias) in enumerate(params):
            x = (dense(x, weight) if self.for_cpu else x @ weight) + bias
            x = jax.nn.relu(x) if i < len(params) - 1 else x
        return x

    def greedy(self, params: Params, state: Array) -> Array:
        """Greedy actions of all copies, int32 [N]; ties go to the lowest."""
        n = len(state)
        if not self.for_cpu or n % ACT_BLOCK:
            return jnp.argmax(self.q_values(params, state), -1)
        blocks = state.reshape(n // ACT_BLOCK, ACT_BLOCK, *state.shape[1:])
        return lax.map(lambda block: jnp.argmax(self.q_values(params, block), -1), blocks).ravel()

    def init(self, key: Array) -> Carry:
        """Fresh network, copies and an empty replay."""
        args, n = self.args, self.args.num_envs
        bits = jax.random.bits(jax.random.fold_in(key, RESET), (n, self.env.reset_noise_dim))
        state = self.env.reset(uniform(bits))
        sizes = (self.env.features(state).shape[-1], *args.hidden_sizes, self.env.num_actions)
        params = init_params(jax.random.fold_in(key, WEIGHTS), sizes)

        def zeros() -> Params:
            return jax.tree.map(jnp.zeros_like, params)

        rows = -(-args.buffer_size // n) * n
        states = [jnp.zeros((rows, *state.shape[1:]), state.dtype) for _ in range(2)]
        replay = Replay(
            states[0],
            jnp.zeros(rows, jnp.uint8),
            jnp.zeros(rows),
            states[1],
            jnp.zeros(rows, bool),
            jnp.int32(0),
            jnp.int32(0),
        )
        return Carry(
            Learner(params, jax.tree.map(jnp.array, params), zeros(), zeros()),
            Envs(state, jnp.zeros(n, jnp.int32), jnp.zeros(n)),
            replay,
            no_statistics(),
        )

    def vector_step(self, carry: Carry, key: Array, step: Array, epsilon: Array) -> Carry:
        """Act, step the copies, store; everything random follows from the step's number."""
        env, envs, split = self.env, carry.envs, 2 + self.env.step_noise_dim
        key = jax.random.fold_in(jax.random.fold_in(key, EXPLORE), step)
        noise = uniform(jax.random.bits(key, (split + env.reset_noise_dim, self.args.num_envs))).T
        coin, choice = noise[:, 0], noise[:, 1]
        action = jnp.where(
            coin < epsilon,
            (choice * env.num_actions).astype(jnp.int32),
            self.greedy(carry.learner.params, envs.state),
        )
        following, outcome = env_step(env, envs, action, noise[:, 2:split], noise[:, split:])
        reward, state, terminated, done, episode_return, length = outcome
        stored = (reward, state, terminated)
        replay = store(carry.replay, envs.state, action, stored, self.args.buffer_size)
        s = carry.statistics
        statistics = s._replace(
            episodes=s.episodes + done.sum(),
            episode_return=s.episode_return + jnp.where(done, episode_return, 0.0).sum(),
            episode_length=s.episode_length + jnp.where(done, length, 0).sum(),
        )
        return carry._replace(envs=following, replay=replay, statistics=statistics)

    def update(
        self,
        learner: Learner,
        batch: tuple[Array, ...],
        step_size: Array,
        inverse_correction: Array,
        sync: Array,
    ) -> tuple[Learner, Array, Array]:
        """One gradient step on a batch (state, action, reward, next state, terminated).

        Returns:
            The learner, the loss and the gradient's norm before clipping.

        Source: Mnih et al. (2015); van Hasselt et al. (2016); Kingma & Ba (2015), algorithm 1.
        """
        args, tree = self.args, jax.tree.map
        state, action, reward, next_state, terminated = batch
        next_q = self.q_values(learner.target, next_state)
        chosen = self.q_values(learner.params, next_state) if args.double_q else next_q
        # With two actions a choice by mask is one fused kernel, a gather and its gradient are not.
        next_value = (next_q * jax.nn.one_hot(jnp.argmax(chosen, -1), 2)).sum(-1)
        target = reward + jnp.where(terminated, 0.0, args.gamma * next_value)
        taken = jax.nn.one_hot(action, 2)

        def loss_of(params: Params) -> Array:
            error = (self.q_values(params, state) * taken).sum(-1) - target
            return jnp.mean(huber(error) if args.loss == "huber" else error * error)

        loss, grads = jax.value_and_grad(loss_of)(learner.params)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, args.max_grad_norm / jnp.maximum(norm, 1e-12))
        grads = tree(lambda g: g * scale, grads)
        b1, b2 = ADAM_BETAS
        mean = tree(lambda m, g: m + (1.0 - b1) * (g - m), learner.mean, grads)
        square = tree(lambda v, g: b2 * v + (1.0 - b2) * (g * g), learner.square, grads)
        params = tree(
            lambda p, m, v: p - step_size * (m / (jnp.sqrt(v) * inverse_correction + ADAM_EPS)),
            learner.params,
            mean,
            square,
        )
        followed = tree(lambda t, p: t + sync * (p - t), learner.target, params)
        return Learner(params, followed, mean, square), loss, norm

    def learn(self, carry: Carry, key: Array, x: Inputs) -> Carry:
        """The U gradient steps of a group."""
        key = jax.random.fold_in(key, REPLAY)
        batch_size, replay = self.args.batch_size, carry.replay

        def one(carried: tuple[Learner, Statistics], at: Any) -> Any:
            learner, s = carried
            number, *schedule = at
            bits = jax.random.bits(jax.random.fold_in(key, number), (batch_size,))
            learner, loss, norm = self.update(learner, sample(replay, bits), *schedule)
            return (learner, s._replace(loss=s.loss + loss, grad_norm=s.grad_norm + norm)), None

        (learner, statistics), _ = lax.scan(
            one,
            (carry.learner, carry.statistics),
            (x.update, x.step_size, x.inverse_correction, x.sync),
        )
        return carry._replace(learner=learner, statistics=statistics)

    def chunk(
        self, carry: Carry, key: Array, inputs: Inputs, count: Any, learns: bool | None
    ) -> tuple[Carry, Statistics]:
        """`count` groups of vector steps and gradient steps.

        Args:
            learns: whether they take gradient steps; None: each asks its input.

        Returns:
            What is carried on, and the statistics of these groups.
        """

        def group(i: Array, carry: Carry) -> Carry:
            x = Inputs(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in inputs))
            carry, _ = lax.scan(
                lambda c, at: (self.vector_step(c, key, *at), None), carry, (x.step, x.epsilon)
            )
            if learns is None:
                return lax.cond(x.learns, lambda c: self.learn(c, key, x), lambda c: c, carry)
            return self.learn(carry, key, x) if learns else carry

        carry = lax.fori_loop(0, count, group, carry)
        return carry._replace(statistics=no_statistics()), carry.statistics

    def evaluate(self, params: Params, key: Array) -> Array:
        """Returns of `eval_episodes` greedy episodes, the first of each copy; float32 [E]."""
        env, count = self.env, self.args.eval_episodes or EVAL_EPISODES

        def noise(k: Array, dim: int) -> Array:
            return uniform(jax.random.bits(jax.random.fold_in(key, k), (count, dim)))

        def step(carried: Any) -> Any:
            k, envs, finished, returns = carried
            draw = noise(k, env.step_noise_dim + env.reset_noise_dim)
            action = jnp.argmax(self.q_values(params, envs.state), -1)
            dim = env.step_noise_dim
            envs, (_, _, _, done, total, _) = env_step(
                env, envs, action, draw[:, :dim], draw[:, dim:]
            )
            return k + 1, envs, finished | done, jnp.where(done & ~finished, total, returns)

        state = env.reset(noise(jnp.int32(0), env.reset_noise_dim))
        envs = Envs(state, jnp.zeros(count, jnp.int32), jnp.zeros(count))
        start = (jnp.int32(1), envs, jnp.zeros(count, bool), jnp.zeros(count))
        return lax.while_loop(lambda c: ~c[2].all(), step, start)[3]


def no_statistics() -> Statistics:
    return Statistics(jnp.int32(0), jnp.float32(0), jnp.int32(0), jnp.float32(0), jnp.float32(0))


# -------------------------------------------------------------------------------------- the loop


class JaxLoop:
    """A run that goes on for as long as it is asked to.

    Attributes:
        schedule: of the run.
        algorithm: functions of arrays.
        carry: state after the last group; of a population with members in front, [M, ...].
        group: groups done.
        capacity: groups of one call at most: long enough that its cost vanishes.
        statistics: of the last call; of a population [M] each.
    """

    def __init__(self, args: Args, tuned: bool = True, precision: Precision = "highest") -> None:
        """Check the settings and make the state; nothing is compiled yet but that.

        Args:
            args: of the run; member i of a population has the draws of the single run of seed + i.
            tuned: see the head of this file.
            precision: of float32 products on a GPU: as torch's default, or with TF32.

        Raises:
            UsageError: the settings make no sense, or are not possible here.
        """
        check(args)
        need(args, args.eps_repeat == 0.0, "eps_repeat", "0")
        on_cpu = jax.default_backend() == "cpu"
        self._tuned, self._precision, self._dynamic = tuned, precision, tuned and on_cpu
        self.schedule, env = Schedule.of(args), environment(args)
        self.algorithm = Algorithm(args, env, tuned and on_cpu)
        self._chunk: Callable[..., Any] = self.algorithm.chunk
        if args.num_seeds == 1:
            self._key = jax.random.key(args.seed)
            self.carry = jax.jit(self.algorithm.init)(self._key)
        else:
            seeds = (args.seed + np.arange(args.num_seeds)).astype(np.uint32)
            self._key = jax.vmap(jax.random.key)(seeds)
            init = jax.vmap(self.algorithm.init, out_axes=MEMBERS)
            self.carry = jax.jit(init)(self._key)
            self._chunk = self._population
        self.group, self._functions = 0, dict[tuple[bool | None, int], Any]()
        self.capacity = self._most_groups(on_cpu)
        self.statistics: Statistics | None = None

    def _most_groups(self, on_cpu: bool) -> int:
        """A call of a population takes 0.2 to 0.4 s on a CPU core; on a GPU, where members run
        beside each other, 32 times the work is a call of a tenth of a second."""
        args = self.algorithm.args
        work = self.schedule.transitions + self.schedule.num_updates * args.batch_size
        if args.num_seeds == 1:
            return max(8, min(2048, 2**18 // work))
        budget = 2**18 if on_cpu else 2**23
        return max(1, min(2048, budget // (args.num_seeds * work)))

    def _population(
        self,
        carry: Carry,
        keys: Array,
        inputs: Inputs,
        count: Any,
        learns: bool | None,
    ) -> tuple[Carry, Statistics]:
        """`Algorithm.chunk` of every member, all at the same schedule."""

        def one(carry: Carry, key: Array) -> tuple[Carry, Statistics]:
            return self.algorithm.chunk(carry, key, inputs, count, learns)

        mapped = jax.vmap(one, in_axes=(MEMBERS, 0), out_axes=(MEMBERS, 0))
        result: tuple[Carry, Statistics] = mapped(carry, keys)
        return result

    @property
    def global_step(self) -> int:
        """Transitions of one member so far."""
        return self.group * self.schedule.transitions

    @property
    def num_updates(self) -> int:
        """Gradient steps of one member so far."""
        return max(self.group - self.schedule.fill, 0) * self.schedule.num_updates

    def prepare(self, learns: bool, count: int) -> Any:
        """Compile a call of `count` groups, once; on the CPU one serves every count."""
        mode = learns if self._tuned else None
        size = self.capacity if self._dynamic else count
        if (mode, size) not in self._functions:
            inputs = self.schedule.inputs(0, 0, size)
            chunk = self._chunk
            if self._dynamic:
                function = partial(chunk, learns=mode)
                example: tuple[Any, ...] = (self.carry, self._key, inputs, np.int32(0))
            else:
                function = partial(chunk, learns=mode, count=count)
                example = (self.carry, self._key, inputs)
            jitted = jax.jit(function, donate_argnums=0 if self._tuned else ())
            with jax.default_matmul_precision(self._precision):
                self._functions[mode, size] = jitted.lower(*example).compile()
        return self._functions[mode, size]

    def advance(self, count: int) -> None:
        """Run `count` groups and wait for them; gradient steps once replay is filled."""
        end = self.group + count
        while self.group < end:
            learns = self.group >= self.schedule.fill
            goal = end if learns or not self._tuned else min(end, self.schedule.fill)
            count = min(goal - self.group, self.capacity)
            function = self.prepare(learns, count)
            size = self.capacity if self._dynamic else count
            inputs = self.schedule.inputs(self.group, count, size)
            rest = (np.int32(count),) if self._dynamic else ()
            self.carry, self.statistics = function(self.carry, self._key, inputs, *rest)
            self.group += count
        jax.block_until_ready(self.carry)


def jax_loop(
    args: Args, stopwatch: Stopwatch, tuned: bool = True, precision: Precision = "highest"
) -> None:
    """Train for ever, from the first update on; compilation and filling replay are not timed.

    Steps and updates count those of all members.
    """
    loop = JaxLoop(dataclasses.replace(args, total_timesteps=ENDLESS), tuned, precision)
    loop.advance(loop.schedule.fill)
    loop.advance(loop.capacity)
    m = args.num_seeds
    while not stopwatch.lap(m * loop.global_step, m * loop.num_updates):
        loop.advance(loop.capacity)
        jax.device_get(loop.statistics)


def as_q_function(params: Params) -> QFunction:
    """The same Q-values in torch, of one member."""
    sizes = (params[0][0].shape[0], *(weight.shape[1] for weight, _ in params))
    arrays = [array for weight, bias in params for array in (weight[None], bias[None, None])]
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    return QFunction(QNetwork(sizes), ScalarHead(), tensors)


def train_jax(
    args: Args,
    should_stop: Callable[[dict[str, Any]], bool] = lambda _: False,
    tuned: bool = True,
    precision: Precision = "highest",
) -> dict[str, Any]:
    """A run with the schedules of a finite one, to its goal or its end.

    The greedy policy is evaluated at the end of every group in which `eval_interval` is crossed,
    once replay is filled, and at the end of the run. LineWorld is compared with its exact solution
    too, by the code that judges runs here.

    Args:
        args: settings of one member; nothing is written.
        should_stop: asked after every evaluation, with its row of `history`; once true, the run
            ends.
        tuned, precision: see `JaxLoop`.

    Returns:
        "startup_s" (making the state and compiling), "train_s", "eval_s", "global_step",
        "num_updates", "solved" and "history", a row of metrics for each evaluation.

    Raises:
        UsageError: the settings make no sense, or are not possible here.
    """
    began = time.perf_counter()
    need(args, args.num_seeds == 1, "num_seeds", "1")
    loop = JaxLoop(args, tuned, precision)
    schedule, algorithm = loop.schedule, loop.algorithm
    exact = solve(make_env(args.env_id, args.env_params), [args.gamma])
    if args.stop_when_optimal and exact is None:
        raise UsageError(f"--stop-when-optimal: {args.env_id} has no exact solution here")
    interval = args.eval_interval or schedule.num_groups * schedule.transitions
    with jax.default_matmul_precision(precision):
        play = jax.jit(algorithm.evaluate).lower(loop.carry.learner.params, loop._key).compile()
    for learns in (False, True):
        loop.prepare(learns, loop.capacity)
    startup = time.perf_counter() - began

    history: list[dict[str, Any]] = []
    eval_s = 0.0
    solved, key = False, jax.random.fold_in(loop._key, EVALUATION)
    loop.advance(schedule.fill)
    while loop.group < schedule.num_groups and not solved:
        crossing = (loop.global_step // interval + 1) * interval
        loop.advance(min(-(-crossing // schedule.transitions), schedule.num_groups) - loop.group)
        params, asked = loop.carry.learner.params, time.perf_counter()
        returns = play(params, jax.random.fold_in(key, len(history)))
        row = {"global_step": loop.global_step, "return_mean": float(returns.mean())}
        if exact is not None:
            known = exact.compare(as_q_function(params))
            row |= {name: values[0] for name, values in known.items()}
        row["wall_s"] = time.perf_counter() - began
        eval_s += row["wall_s"] + began - asked
        history.append(row)
        goal = args.stop_at_return
        solved = bool(args.stop_when_optimal and row["policy_optimal"])
        solved |= goal is not None and row["return_mean"] >= goal
        if should_stop(row):
            break
    return {
        "startup_s": startup,
        "train_s": time.perf_counter() - began - startup - eval_s,
        "eval_s": eval_s,
        "global_step": loop.global_step,
        "num_updates": loop.num_updates,
        "solved": solved,
        "history": history,
    }


def main() -> int:
    """Train from the command line and print one JSON line; returns the exit status."""
    args = tyro.cli(Args, default=Args.for_env(asked_env_id(sys.argv[1:])))
    try:
        result = train_jax(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"env_id": args.env_id, "seed": args.seed} | result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
