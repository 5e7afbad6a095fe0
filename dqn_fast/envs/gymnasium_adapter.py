"""Any Gymnasium environment with discrete actions, as an environment on the host.

    env = from_gymnasium("LunarLander-v3", {"enable_wind": True}, "async")
    env = from_gymnasium(lambda: MyEnv(level=3))
    train(Args(num_envs=16), env=env)

Its copies step in one `gymnasium.vector.VectorEnv`. What comes out of it is the same whatever the
autoreset mode: true successors, and no transition that is only a reset. Nothing that a copy returns
is trusted: what breaks training is an EnvError that names the environment, the copy and the step.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, get_args

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.device import upload
from dqn_fast.envs.core import EnvError, Outcome, TensorEnv, VectorState
from dqn_fast.envs.gymnasium_copies import Copies, close_all
from dqn_fast.envs.gymnasium_sources import (
    Maker,
    Source,
    VectorizationMode,
    maker_for_evaluation,
    maker_like,
    maker_of,
    need_one_of,
)
from dqn_fast.envs.gymnasium_spaces import Broken, Observations
from dqn_fast.envs.params import plain

ENDLESS = 100_000
"""Steps after which an evaluation gives up on an episode that has no time limit."""


class HostState(NamedTuple):
    """No tensors: the state of an environment on the host is inside of it."""


def from_gymnasium(
    source: Source,
    params: Mapping[str, Any] | None = None,
    vectorization_mode: VectorizationMode = "sync",
    eval_source: Source | None = None,
    max_steps: int | None = None,
) -> GymnasiumEnv:
    """Take in an environment of Gymnasium's interface.

    Args:
        source: what the copies are made from:
            an id, "CartPole-v1", or "module:Name-v0" to import the module that registers it first;
            a callable without arguments that makes one `gymnasium.Env`;
            a callable with an argument `num_envs` that makes a `gymnasium.vector.VectorEnv`;
            a VectorEnv, taken as it is and closed with this environment. In SAME_STEP mode its
            environments must not write into an observation after they have returned it, for
            Gymnasium hands out that same array as the last one of the episode.
        params: arguments of the environment's constructor, of an id only; text is cast to the
            number, truth value or list that it reads as, unless the constructor's default is text.
            "max_episode_steps" is the time limit (and "max_steps", where the constructor knows
            no such argument).
        vectorization_mode: how copies of an id or of single environments are stepped; see
            `VectorizationMode`.
        eval_source: a source for evaluation, other than a VectorEnv. None: made like `source`, in
            one process; needed where a VectorEnv does not tell how its copies are made.
        max_steps: time limit in steps, >= 1, instead of the registered one. Of a VectorEnv, which
            keeps its own: the length that no episode exceeds. None with an environment that has no
            limit either is a continuing task: training goes on, and an evaluation gives up on
            episodes of more than ENDLESS steps.

    Raises:
        ValueError: it cannot be made, its observations have no fixed size, its actions are not
            Discrete, or evaluation has no copies of its own.
    """
    need_one_of(
        vectorization_mode in get_args(VectorizationMode),
        "--vectorization-mode",
        vectorization_mode,
        VectorizationMode,
    )
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps {max_steps}: must be at least 1")
    maker = maker_of(source, params or {}, vectorization_mode, max_steps)
    if eval_source is not None:
        evaluation = maker_for_evaluation(eval_source, maker, max_steps)
    elif isinstance(source, VectorEnv):
        evaluation = maker_like(source, max_steps)
        maker = dataclasses.replace(maker, name=evaluation.name)
    elif vectorization_mode == "async":
        evaluation = maker_of(source, params or {}, "sync", max_steps)
    else:
        evaluation = maker
    return GymnasiumEnv(maker, evaluation)


class GymnasiumEnv(TensorEnv):
    """Copies of a Gymnasium environment; made by `from_gymnasium`.

    The copies exist from `vector_reset` on, which tells how many there are, and their states are
    inside of them: `vector_step` goes on from where they are, whatever `vector` it is given.

    Randomness is the environments' own: `vector_reset` seeds every copy from its two uniform
    numbers, later episodes continue its generator. A VectorEnv other than Gymnasium's SyncVectorEnv
    and AsyncVectorEnv takes one seed for all, that of the first copy.

    Attributes:
        name: id, or name of the class.
        num_actions: n of the Discrete action space; action 0 is sent as its `start`.
        max_steps: time limit in steps; ENDLESS where there is none.
        single_observation_space: what one copy observes, in Gymnasium's terms.
        background: steps run in worker processes, between `send` and `vector_step`.
    """

    on_host: ClassVar[bool] = True
    reset_noise_dim: ClassVar[int] = 2

    def __init__(self, maker: Maker, evaluation: Maker | None) -> None:
        self.name = maker.name
        self.num_actions = int(maker.action_space.n)  # type: ignore[misc]
        self.max_steps = maker.max_steps or ENDLESS
        self.single_observation_space = maker.observation_space
        self.background = maker.background
        self._maker, self._evaluation = maker, evaluation
        self._observations = Observations(maker.observation_space)
        self._sibling: GymnasiumEnv | None = None
        self._copies: Copies | None = None
        # Closed with this object, so a mutable that does not hold it.
        self._open: list[Copies] = [] if maker.ready is None else [Copies(maker.ready)]
        weakref.finalize(self, close_all, self._open)

        # Of each copy, [E]; set by vector_reset.
        self._step = 0
        self._elapsed = np.zeros(0, np.int32)
        self._return = np.zeros(0, np.float64)
        self._ended = np.zeros(0, np.bool_)  # NEXT_STEP: the next call only resets it
        self._first = np.zeros(0, np.bool_)  # its first episode has not ended

    # ------------------------------------------------------------------ what the base asks for

    @property
    def params(self) -> dict[str, Any]:
        """Arguments of an id's constructor, as JSON can hold them; empty for other sources."""
        return {name: plain(value) for name, value in self._maker.params.items()}

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        if isinstance(self.single_observation_space, spaces.Discrete):
            return self.single_observation_space
        return spaces.Box(-math.inf, math.inf, (self._observations.num_features,), np.float32)

    def example_obs(self) -> Tensor:
        stored = self._observations
        return torch.from_numpy(np.zeros((1, *stored.shape), stored.dtype))

    def features(self, obs: Tensor) -> Tensor:
        """What `gymnasium.spaces.flatten` makes of observations, float32 [..., F]: numbers as they
        are, Discrete and MultiDiscrete one-hot, Tuple and Dict one part after the other. Bytes that
        use their whole range, 0 to 255, are divided by 255."""
        return self._observations.features(obs)

    def reset(self, noise: Tensor) -> Any:
        raise self._no_state()

    def step(self, state: Any, action: Tensor, noise: Tensor) -> tuple[Any, Tensor, Tensor]:
        raise self._no_state()

    def observe(self, state: Any) -> Tensor:
        raise self._no_state()

    def _no_state(self) -> TypeError:
        return TypeError(f"{self.name} keeps its state inside: use vector_reset and vector_step")

    def for_evaluation(self) -> GymnasiumEnv:
        """Copies for evaluation, in this process; always the same object. They raise EnvError when
        a copy's first episode is longer than `max_steps`."""
        if self._evaluation is None:
            return self
        if self._sibling is None:
            self._sibling = GymnasiumEnv(self._evaluation, None)
        return self._sibling

    def close(self) -> None:
        """Close all copies, those for evaluation too, and end their processes. May be called again;
        `vector_reset` makes new copies, unless they came as a VectorEnv."""
        close_all(self._open)
        self._copies = None
        if self._sibling is not None:
            self._sibling.close()

    # ------------------------------------------------------------------------------- stepping

    def vector_reset(self, noise: Tensor) -> VectorState:
        """Start E episodes, seeded from noise [E, 2].

        Raises:
            ValueError: a VectorEnv has another number of copies.
            EnvError: a copy breaks the contract.
        """
        num_envs, self._step = noise.shape[0], 0
        try:
            copies = self._copies_for(num_envs)
            obs = copies.reset(_seeds(noise))
            stored = self._observations.encode(self._observations.parts(obs), num_envs)
        except Broken as broken:
            raise self._error(broken) from broken.__cause__
        self._elapsed = np.zeros(num_envs, np.int32)
        self._return = np.zeros(num_envs)
        self._ended = np.zeros(num_envs, np.bool_)
        self._first = np.ones(num_envs, np.bool_)
        zeros = torch.zeros(num_envs, device=noise.device)
        return VectorState(HostState(), _upload([stored], noise.device)[0], zeros.int(), zeros)

    def send(self, action: Tensor) -> None:
        copies = self._started()
        if not self.background:
            super().send(action)
        try:
            copies.send(self._outside(action))
        except Broken as broken:
            self._step += 1
            raise self._error(broken) from broken.__cause__

    def vector_step(
        self, vector: VectorState, action: Tensor, step_noise: Tensor, reset_noise: Tensor
    ) -> tuple[VectorState, Outcome]:
        """One step of all copies, or the end of the one that `send` began; noise is not read.

        Raises:
            EnvError: a copy breaks the contract.
        """
        copies = self._started()
        self._step += 1
        try:
            if not copies.pending:
                copies.send(self._outside(action))
            return self._finish_step(copies, action.device)
        except Broken as broken:
            raise self._error(broken) from broken.__cause__

    def _finish_step(self, copies: Copies, device: torch.device) -> tuple[VectorState, Outcome]:
        """Receive what the copies did, and carry the episodes over."""
        obs, reward, terminated, truncated, infos = copies.receive()
        late = copies.mode is AutoresetMode.NEXT_STEP
        elapsed = self._elapsed + 1
        if late:  # the copies whose episodes had ended took no step
            stepped = ~self._ended
            elapsed[self._ended] = 0
            reward = np.where(stepped, reward, 0.0)
            terminated, truncated = terminated & stepped, truncated & stepped
        done = terminated | truncated
        episode_return = self._return + reward
        # What was reached, and what the copies go on from, are one array until an episode ends.
        reached = shown = self._observations.encode(self._observations.parts(obs), len(done))
        self._elapsed, self._return = elapsed, episode_return
        if done.any():
            self._elapsed, self._return = elapsed.copy(), episode_return.copy()
            self._elapsed[done], self._return[done] = 0, 0.0
            if copies.mode is AutoresetMode.SAME_STEP:
                reached = shown.copy()
                reached[done] = self._final_obs(infos, done)
            elif copies.mode is AutoresetMode.DISABLED:
                fresh = self._observations.parts(copies.reset_only(done))
                shown = reached.copy()
                shown[done] = self._observations.encode(fresh, len(done))[done]
        if late:
            self._ended = done
        if self._evaluation is None:
            self._first &= ~done
            self._check_endless()

        sums = np.empty((3, len(done)), np.float32)
        with np.errstate(over="ignore"):
            sums[0], sums[1], sums[2] = reward, episode_return, self._return
        if not np.isfinite(sums[0]).all():
            which = int(np.flatnonzero(~np.isfinite(sums[0]))[0])
            raise Broken(f"its reward is {reward[which]}, not a finite float32", which)
        counts = np.array([elapsed, self._elapsed])
        flags = np.array([terminated, truncated, stepped] if late else [terminated, truncated])
        arrays = (
            [sums, counts, flags, shown]
            if reached is shown
            else [sums, counts, flags, shown, reached]
        )
        floats, ints, bools, obs, *ahead = _upload(arrays, device)
        rewards, returns, next_returns = floats.unbind()
        lengths, next_elapsed = ints.unbind()
        is_terminated, is_truncated, *valid = bools.unbind()
        return (
            VectorState(HostState(), obs, next_elapsed, next_returns),
            Outcome(
                reward=rewards,
                next_obs=ahead[0] if ahead else obs,
                terminated=is_terminated,
                truncated=is_truncated,
                episode_return=returns,
                episode_length=lengths,
                valid=valid[0] if late else None,
            ),
        )

    def _final_obs(self, infos: Mapping[str, Any], done: NDArray[np.bool_]) -> NDArray[Any]:
        """Successors of the copies that finished, as SAME_STEP hands them out, [sum(done), ...]."""
        final = infos.get("final_obs")
        if isinstance(final, np.ndarray) and final.dtype == object:
            items = final[done].tolist()
            lacking: Any = [item is None for item in items]
            parts = None if any(lacking) else self._observations.parts_of(items)
        else:
            lacking = ~np.asarray(infos.get("_final_obs", done))[done] | (final is None)
            parts = None
            if not lacking.any():
                parts = [np.asarray(part)[done] for part in self._observations.parts(final)]
        copies = np.flatnonzero(done)
        if parts is None:
            which = int(copies[lacking][0])
            raise Broken("it finished, and infos['final_obs'] lacks its last observation", which)
        return self._observations.encode(parts, len(copies), copies)

    def _check_endless(self) -> None:
        """Give up on an evaluation whose episodes do not end."""
        if self._step >= self.max_steps and self._first.any():
            raise Broken(
                f"its first episode is not over after {self.max_steps:,} steps, so it cannot be "
                "evaluated; set a time limit: --env-params max_episode_steps N, or max_steps of "
                "from_gymnasium",
                int(np.flatnonzero(self._first)[0]),
            )

    def _outside(self, action: Tensor) -> NDArray[Any]:
        """Actions as the environment numbers them; waits for the device."""
        space = self._maker.action_space
        return action.cpu().numpy().astype(space.dtype) + space.start

    def _copies_for(self, num_envs: int) -> Copies:
        """The open copies if they are as many, else new ones; evaluation keeps all that it made."""
        for copies in self._open:
            if copies.num_envs == num_envs:
                self._copies = copies
                return copies
        if self._evaluation is not None and self._maker.ready is None:
            close_all(self._open)
        self._copies = Copies(self._maker.make(num_envs))
        self._open.append(self._copies)
        return self._copies

    def _started(self) -> Copies:
        if self._copies is None:
            raise RuntimeError(f"{self.name}: call vector_reset first")
        return self._copies

    def _error(self, broken: Broken) -> EnvError:
        """What a copy did wrong, with the names of all that took part."""
        where = self.name if broken.copy is None else f"{self.name}, copy {broken.copy}"
        return EnvError(f"{where}, step {self._step:,}: {broken.text}")


def _seeds(noise: Tensor) -> list[int]:
    """A seed in [0, 2**31) for each copy from uniform numbers [E, 2] of 24 bits each."""
    high, low = (noise.cpu().double() * torch.tensor([2.0**16, 2.0**15])).long().unbind(1)
    return ((high << 15) | low).tolist()


def _upload(arrays: list[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on `device`, in one copy; on the CPU they share the arrays' memory."""
    tensors = list(map(torch.from_numpy, arrays))
    if device.type == "cpu":
        return tensors
    return _unpack(upload(_pack(tensors), device), tensors)


def _pack(tensors: list[Tensor]) -> Tensor:
    """The bytes of all, uint8 [size]; each starts at a multiple of 8, as its type wants it."""
    packed = torch.zeros(sum(map(_room, tensors)), dtype=torch.uint8)
    for part, tensor in zip(packed.split(list(map(_room, tensors))), tensors, strict=True):
        part[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
    return packed


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of what `_pack` made of tensors like these."""
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(packed.split(list(map(_room, like))), like, strict=True)
    ]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // 8) * 8
