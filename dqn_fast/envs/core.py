"""Batched environments as pure functions of tensors.

An environment implements its dynamics: `reset`, `step`, `observe` and, if the network does not read
the stored observation itself, `features`. The base class implements autoreset (Gymnasium's
SAME_STEP), the time limit and episode statistics. Environments draw no random numbers: noise comes
in as uniform floats, so a step can be repeated, compiled, captured and checked by hand.

The leading axis E counts env copies: M members times N copies each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from dqn_fast.bellman import TabularMDP
from dqn_fast.envs.params import plain
from dqn_fast.envs.spaces import describe_value, is_reset_result
from dqn_fast.settings import one_line


class VectorState(NamedTuple):
    """State of E env copies between two steps.

    Attributes:
        env: the environment's own state, a NamedTuple of tensors [E, ...].
        obs: observation of that state, [E, ...].
        elapsed: steps taken in the current episode, int32 [E].
        episode_return: undiscounted sum of its rewards so far, float32 [E].
    """

    env: Any
    obs: Tensor
    elapsed: Tensor
    episode_return: Tensor

    def leaves(self) -> list[Tensor]:
        """All tensors, flat, in a fixed order."""
        return [*self.env, self.obs, self.elapsed, self.episode_return]

    @torch.no_grad()
    def copy_(self, source: VectorState) -> None:
        """Overwrite every tensor with the one of `source`."""
        for target, tensor in zip(self.leaves(), source.leaves(), strict=True):
            target.copy_(tensor)


class Outcome(NamedTuple):
    """Results of one vector step, before the copies that finished are reset.

    Attributes:
        reward: float32 [E].
        next_obs: the true successor's observation [E, ...], never one from after a reset.
        terminated: the MDP ended, bool [E]; the only flag that stops the bootstrap.
        truncated: the time limit was reached, bool [E]; may be true together with `terminated`.
        episode_return: return of the episode up to and with this step, float32 [E]. At the end of
            an episode it is in the environment's own units, if the environment reports that.
        episode_length: its length in steps, int32 [E].
        valid: bool [E]; False for a copy that was only reset, as in Gymnasium's NEXT_STEP mode, so
            that it has no transition to store. None: all copies took a step.
    """

    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    truncated: Tensor
    episode_return: Tensor
    episode_length: Tensor
    valid: Tensor | None = None

    @property
    def done(self) -> Tensor:
        """The episode is over, bool [E]."""
        return self.terminated | self.truncated


class TensorEnv(ABC):
    """Base of all tensor environments; subclass it as a frozen dataclass of parameters.

    An environment with a method `render(self, state)`, which returns uint8 [H, W, 3] for one copy's
    state, can be filmed; see `dqn_fast.envs.render`.

    Attributes:
        num_actions: actions are the int64 numbers 0 .. num_actions - 1.
        action_start: the number that the environment itself gives to action 0.
        max_steps: time limit of an episode in steps, >= 1.
        reset_noise_dim: uniform numbers that `reset` reads for each copy.
        step_noise_dim: uniform numbers that `step` reads for each copy.
    """

    num_actions: ClassVar[int]
    action_start: ClassVar[int] = 0
    max_steps: int
    reset_noise_dim: ClassVar[int] = 0
    step_noise_dim: ClassVar[int] = 0

    @abstractmethod
    def reset(self, noise: Tensor) -> Any:
        """First states of E episodes.

        Args:
            noise: uniform in [0, 1), float32 [E, reset_noise_dim]; the states are on its device.

        Returns:
            NamedTuple of tensors [E, ...].
        """

    @abstractmethod
    def step(self, state: Any, action: Tensor, noise: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Dynamics of one step, for all copies, without changing `state`.

        Args:
            state: NamedTuple of tensors [E, ...].
            action: int64 [E].
            noise: uniform in [0, 1), float32 [E, step_noise_dim].

        Returns:
            The next state, the reward (float32 [E]) and terminated (bool [E]).
        """

    @abstractmethod
    def observe(self, state: Any) -> Tensor:
        """Observation [E, ...] of `state`, in the dtype in which the replay stores it."""

    def features(self, obs: Tensor) -> Tensor:
        """Inputs of the network, float32 [..., F], from observations [..., *obs_shape]."""
        return obs.float()

    def features_of(self, obs: Any) -> Tensor:
        """Inputs of the network, float32 [..., F], from observations that are not trusted.

        Args:
            obs: one observation or a batch with any leading axes, as `observe` returns them or as
                `shown` shows them; numbers, arrays or a tensor.

        Raises:
            ValueError: they are no observations of this environment; one line.
        """
        stored = self.example_obs()[0]
        try:
            given = obs if isinstance(obs, Tensor) else torch.from_numpy(np.array(obs))
        except (TypeError, ValueError):
            raise self._no_obs(obs, stored) from None
        is_float, as_float = given.is_floating_point(), stored.is_floating_point()
        if is_float and not bool(given.isfinite().all()):
            raise ValueError(f"{self._label}: its observation holds NaN or infinite numbers")
        shape = given.shape[max(given.ndim - stored.ndim, 0) :]
        if shape == stored.shape and as_float >= is_float:
            cast = given.to(stored.dtype)
            if not (as_float or (torch.equal(cast.to(given.dtype), given) and self._has(cast))):
                raise ValueError(
                    f"{self._label}: its observation {one_line(obs)} is no state of it"
                )
            return self.features(cast)
        if is_float and given.shape[-1:] == self.features(stored[None]).shape[-1:]:
            return given.float()
        raise self._no_obs(obs, stored)

    def _has(self, obs: Tensor) -> bool:
        """Whether whole numbers are observations of this environment, as far as it is known."""
        return True

    def _no_obs(self, obs: Any, stored: Tensor) -> ValueError:
        kind = "numbers" if stored.is_floating_point() else "whole numbers"
        what = f"{kind} of shape [{', '.join(['...', *map(str, stored.shape)])}]"
        hint = "; env.reset() returns (obs, info): pass obs" if is_reset_result(obs) else ""
        return ValueError(
            f"{self._label}: its observation is {describe_value(obs)}; must be {what}{hint}"
        )

    @property
    def _label(self) -> str:
        return str(getattr(self, "name", type(self).__name__))

    def example_obs(self) -> Tensor:
        """An observation [1, ...] in the shape and dtype of stored observations."""
        return self.observe(self.reset(torch.zeros(1, self.reset_noise_dim)))

    def shown(self, obs: Tensor) -> Tensor:
        """Observations as elements of `observation_space`, if that is not Discrete."""
        return self.features(obs)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by name, as JSON can hold them."""
        return plain(dataclasses.asdict(self)) if dataclasses.is_dataclass(self) else {}

    def identity(self) -> Any | None:
        """JSON values that this environment's functions of tensors follow from, with the sources of
        this package; None: they follow from other sources too."""
        known = type(self).__module__.startswith("dqn_fast.envs.") and not self.on_host
        return [type(self).__name__, self.params] if known else None

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Gymnasium's space of one copy's observation: a Box of its features, or Discrete for the
        number of its state."""
        features = self.features(self.example_obs())
        return Box(-math.inf, math.inf, features.shape[1:], np.float32)

    # For environments on the host; the rest of the class is for tensors.

    on_host: ClassVar[bool] = False
    """Whether the copies are outside torch."""
    image_shapes: Sequence[tuple[int, ...]] = ()
    """Shapes of the images in an observation, if the environment knows of them."""
    background: bool = False
    """Whether a step runs while the learner learns, between `send` and `vector_step`."""

    def send(self, action: Tensor) -> None:
        """Begin the step that the next `vector_step` ends; action int64 [E]."""
        raise NotImplementedError(f"{type(self).__name__} steps at once")

    def for_evaluation(self) -> TensorEnv:
        """An environment of the same kind that shares no episode with this one."""
        return self

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Context of an evaluation, in which only the first episode of each copy matters."""
        return contextlib.nullcontext()

    def host_state(self) -> Any | None:
        """State of all copies outside torch, for a checkpoint: plain values and tensors.

        Returns:
            None, bool, int, float, str, lists, dicts with text as keys, and tensors, nested; empty
            for tensor environments. None: the state cannot be saved, so that a resumed run begins
            new episodes.
        """
        return {}

    def load_host_state_(self, saved: Any) -> None:
        """Continue from a result of `host_state`, after `vector_reset` has made as many copies.

        Raises:
            ValueError: it does not fit; the copies must be reset again.
        """
        if saved != {}:
            raise ValueError(f"{type(self).__name__} has no state outside torch")

    def close(self) -> None:  # noqa: B027 - nothing to do unless something is held
        """Release resources outside torch, such as processes and windows."""

    def vector_reset(self, noise: Tensor) -> VectorState:
        """Start E episodes; arguments as `reset`."""
        state = self.reset(noise)
        zeros = torch.zeros(noise.shape[0], device=noise.device)
        return VectorState(state, self.observe(state), zeros.int(), zeros)

    def vector_step(
        self, vector: VectorState, action: Tensor, step_noise: Tensor, reset_noise: Tensor
    ) -> tuple[VectorState, Outcome]:
        """Step all copies; those that finish start their next episode in the same step.

        Args:
            vector: current state; not changed.
            action: int64 [E].
            step_noise: float32 [E, step_noise_dim].
            reset_noise: float32 [E, reset_noise_dim], read for the copies that finish.

        Returns:
            The next state, and the results of the step.
        """
        state, reward, terminated = self.step(vector.env, action, step_noise)
        elapsed = vector.elapsed + 1
        outcome = Outcome(
            reward=reward,
            next_obs=self.observe(state),
            terminated=terminated,
            truncated=elapsed >= self.max_steps,
            episode_return=vector.episode_return + reward,
            episode_length=elapsed,
        )
        done, fresh = outcome.done, self.reset(reset_noise)
        env = type(state)(*(_select(done, r, s) for r, s in zip(fresh, state, strict=True)))
        return (
            VectorState(
                env=env,
                obs=self.observe(env),
                elapsed=torch.where(done, 0, elapsed),
                episode_return=torch.where(done, 0.0, outcome.episode_return),
            ),
            outcome,
        )


class TabularEnv(TensorEnv):
    """A tensor environment with a finite number of states, which can be solved exactly.

    Attributes:
        grid_shape: rows and columns of the grid that the states form, for pictures; None: no grid.
    """

    grid_shape: tuple[int, int] | None = None

    @abstractmethod
    def mdp(self) -> TabularMDP:
        """The dynamics as a table of X states, without the time limit."""

    @abstractmethod
    def states(self) -> Any:
        """All states in the order of the table, as `step` takes them: tensors [X, ...]."""

    @abstractmethod
    def state_index(self, obs: Tensor) -> Tensor:
        """Row of the table, int64 [...], of observations [..., *obs_shape]."""

    def _has(self, obs: Tensor) -> bool:
        row = self.state_index(obs)
        return bool(((row >= 0) & (row < len(self.states()[0]))).all())


def _select(mask: Tensor, if_true: Tensor, if_false: Tensor) -> Tensor:
    """`torch.where` with the mask [E] spread over the trailing axes."""
    return torch.where(mask.view(-1, *[1] * (if_true.ndim - 1)), if_true, if_false)


class EnvError(RuntimeError):
    """An environment broke its contract in a run; the message names it, the copy and the step."""


class CopiesError(EnvError):
    """Copies of an environment cannot be made."""


class EnvCheckError(AssertionError):
    """An environment breaks a rule that training relies on; the message names the rule."""


def check_env(env: TensorEnv, num_envs: int = 64, num_steps: int = 200, seed: int = 0) -> None:
    """Raise EnvCheckError unless `env` keeps the rules that training relies on.

    Plays random actions and checks shapes, dtypes, finiteness, purity (inputs unchanged, equal
    inputs give equal results), independence of the copies, termination, time limit, and the
    observations before and after a reset.

    Args:
        env: the environment.
        num_envs: copies to play, >= 2.
        num_steps: vector steps to play.
        seed: of actions and noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def ensure(condition: bool | Tensor, rule: str) -> None:
        if not condition:
            raise EnvCheckError(f"{type(env).__name__}: {rule}")

    def pure(name: str, function: Callable[..., Any], *args: Any) -> Any:
        before = [[t.clone() for t in _tensors(a)] for a in args]
        try:
            first, second = function(*args), function(*args)
        except Exception as error:
            raise EnvCheckError(
                f"{type(env).__name__}: {name} raises {type(error).__name__}: {error}"
            ) from error
        after = [list(_tensors(a)) for a in args]
        ensure(_equal(before, after), f"{name} must not change its inputs")
        ensure(_equal(first, second), f"{name} must give equal results for equal inputs")
        return first

    ensure(isinstance(env.num_actions, int) and env.num_actions >= 1, "num_actions must be >= 1")
    ensure(isinstance(env.max_steps, int) and env.max_steps >= 1, "max_steps must be >= 1")

    state = pure("reset", env.reset, rand(num_envs, env.reset_noise_dim))
    ensure(
        isinstance(state, tuple) and hasattr(state, "_fields"),
        "reset must return a NamedTuple of tensors",
    )
    layout = [(t.shape[1:], t.dtype) for t in state]
    obs = pure("observe", env.observe, state)
    features = pure("features", env.features, obs)
    ensure(obs.shape[0] == num_envs, f"observe must return [E, ...], got {tuple(obs.shape)}")
    ensure(
        features.dtype == torch.float32 and features.ndim == 2 and features.shape[0] == num_envs,
        f"features must be float32 [E, F], got {features.dtype} {tuple(features.shape)}",
    )
    stacked = env.features(obs.unflatten(0, (1, num_envs)))
    ensure(
        stacked.shape == (1, *features.shape) and torch.equal(stacked[0], features),
        "features must accept further leading axes",
    )

    vector = env.vector_reset(rand(num_envs, env.reset_noise_dim))
    for _ in range(num_steps):
        action = torch.randint(env.num_actions, (num_envs,), generator=generator)
        noise = rand(num_envs, env.step_noise_dim)
        reset_noise = rand(num_envs, env.reset_noise_dim)
        state, reward, terminated = pure("step", env.step, vector.env, action, noise)
        for tensor, (shape, dtype) in zip(state, layout, strict=True):
            ensure(
                tensor.shape == (num_envs, *shape) and tensor.dtype == dtype,
                f"step must keep the state's shapes and dtypes, {dtype} {(num_envs, *shape)} "
                f"became {tensor.dtype} {tuple(tensor.shape)}",
            )
        ensure(
            reward.dtype == torch.float32 and reward.shape == (num_envs,),
            f"reward must be float32 [E], got {reward.dtype} {tuple(reward.shape)}",
        )
        ensure(
            terminated.dtype == torch.bool and terminated.shape == (num_envs,),
            f"terminated must be bool [E], got {terminated.dtype} {tuple(terminated.shape)}",
        )
        ensure(reward.isfinite().all(), "reward must be finite")
        half = type(vector.env)(*(t[: num_envs // 2] for t in vector.env))
        alone = env.step(half, action[: num_envs // 2], noise[: num_envs // 2])
        ensure(
            torch.equal(alone[1], reward[: num_envs // 2])
            and _equal(alone[0], type(state)(*(t[: num_envs // 2] for t in state))),
            "a copy's step must not depend on the other copies",
        )

        previous = vector
        vector, outcome = env.vector_step(vector, action, noise, reset_noise)
        done = outcome.done
        ensure(
            torch.equal(outcome.next_obs, env.observe(state)),
            "next_obs must be the true successor, not the observation after a reset",
        )
        ensure(
            vector.obs.shape == obs.shape and vector.obs.dtype == obs.dtype,
            f"observations must keep shape and dtype, got {vector.obs.dtype} "
            f"{tuple(vector.obs.shape)}",
        )
        ensure(env.features(vector.obs).isfinite().all(), "features must be finite")
        ensure(
            torch.equal(vector.obs[done], env.observe(env.reset(reset_noise))[done]),
            "a finished copy must go on from a fresh reset",
        )
        ensure(
            torch.equal(vector.obs[~done], outcome.next_obs[~done]),
            "an unfinished copy must go on from its successor",
        )
        ensure(
            torch.equal(outcome.truncated, previous.elapsed + 1 >= env.max_steps),
            "truncated must be true exactly at the time limit",
        )
        ensure((vector.elapsed < env.max_steps).all(), "no episode may pass the time limit")


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]


def _equal(a: Any, b: Any) -> bool:
    """Whether nested tuples or lists hold equal tensors; NaN equals NaN."""
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.allclose(x, y, 0.0, 0.0, equal_nan=True)
        if x.is_floating_point()
        else torch.equal(x, y)
        for x, y in pairs
    )
