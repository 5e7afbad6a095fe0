"""Tensor environments for other libraries: as a Gymnasium vector environment or a single one.

    import dqn_fast, gymnasium
    gymnasium.make("dqn_fast/LineWorld-v0", slip_prob=0.1)
    gymnasium.make_vec("dqn_fast/CartPole-v1", num_envs=64, output="torch", device="cuda")

`TensorVectorEnv` steps all copies at once and supports all three autoreset modes; `TensorSingleEnv`
is one copy without autoreset. Copy i of a vector environment with the seed s plays the episodes of
the single environment with the seed s + i, in every mode and on every device, but for rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast import tree
from dqn_fast.ambient import in_standard_state
from dqn_fast.code import digest_of
from dqn_fast.device import upload
from dqn_fast.envs import TENSOR_ENVS
from dqn_fast.envs.core import TabularEnv, TensorEnv, VectorState
from dqn_fast.noise import Stream, stream_key, uniform_of, words_at

if TYPE_CHECKING:
    from dqn_fast.engines.fused.calls import CallProgram
    from dqn_fast.envs.render import Renderer

_METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}


class TensorVectorEnv(VectorEnv[Any, Any, Any]):
    """N copies of a tensor environment behind Gymnasium's vector interface.

    Observations are `env.shown(obs)`, float32 [N, F], or the numbers of the states, int64 [N],
    where `env.observation_space` is Discrete. All three autoreset modes behave as those of
    Gymnasium's SyncVectorEnv over N single environments do, seeds and infos included.

    With `output="torch"` observations, rewards (float32), flags and final observations are tensors
    on `device`, and `step` reads nothing back: `final_obs` and `_final_obs` are in every info of
    SAME_STEP, full size. Otherwise they are NumPy arrays, rewards float64, and `final_obs` is an
    object array that is there when an episode ended, as Gymnasium's wrappers expect.

    Args:
        env: the environment, or its id with its parameters as further keyword arguments.
        num_envs: N, >= 1.
        device: of the copies.
        output: "numpy" or "torch".
        autoreset_mode: of `gymnasium.vector`; with DISABLED, finished copies are reset by
            `reset(options={"reset_mask": mask})`, mask bool [N], NumPy or torch.
        render_mode: "rgb_array": `render` draws every copy; see `dqn_fast.envs.render`.
        max_episode_steps: for an id only: a time limit up to its `max_steps`, like that of
            `gymnasium.make`.

    Raises:
        ValueError: an argument is out of range or unknown, or nothing can draw the environment.
        TypeError: the environment is on the host, or its observation space is Discrete although it
            is no TabularEnv.
    """

    _renderer: Renderer | None = None

    @in_standard_state
    def __init__(
        self,
        env: TensorEnv | str,
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        output: Literal["numpy", "torch"] = "numpy",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **params: Any,
    ) -> None:
        given, env = env, _make_tensor_env(env, params)
        if max_episode_steps is not None:
            if not isinstance(given, str):
                raise ValueError("max_episode_steps: goes with an id, not with an environment")
            if not 1 <= max_episode_steps <= env.max_steps:
                raise ValueError(
                    f"max_episode_steps {max_episode_steps}: must be in 1 .. {env.max_steps}; "
                    "max_steps sets a longer time limit"
                )
            env = _make_tensor_env(given, {**params, "max_steps": max_episode_steps})
        if num_envs < 1:
            raise ValueError(f"num_envs {num_envs}: must be at least 1")
        if output not in ("numpy", "torch"):
            raise ValueError(f"output {output}: must be numpy or torch")
        _check_render_mode(render_mode)
        self.tensor_env, self.num_envs = env, num_envs
        # With its index, where it has one, as the devices of tensors are.
        self.device, self.output = torch.empty(0, device=device).device, output
        self.autoreset_mode, self.render_mode = AutoresetMode(autoreset_mode), render_mode
        self.metadata = {**_METADATA, "autoreset_mode": self.autoreset_mode}
        if render_mode is not None:
            self.metadata["render_fps"] = self._get_renderer().fps

        self.single_observation_space = env.observation_space
        self.single_action_space = Discrete(env.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._step_draws = _Draws(Stream.ENV_STEP, env.step_noise_dim, num_envs, self.device)
        self._reset_draws = _Draws(Stream.ENV_RESET, env.reset_noise_dim, num_envs, self.device)
        self._all = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        # In every mode the base environment starts the next episode of a finished copy in the same
        # step; NEXT_STEP and DISABLED only show that start later.
        self._vector: VectorState | None = None
        self._arguments: tuple[Any, Tensor, Tensor] | None = None  # of the last `env.step`
        self._obs = torch.empty(0)  # as last shown, before `features`
        self._ended = ~self._all  # copies whose last step ended an episode

    @in_standard_state
    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode in every copy, or in those of `options["reset_mask"]`.

        Args:
            seed: copy i is seeded with seed + i, or with the i-th of a sequence. None continues the
                copy's random numbers, which are first seeded from the system's entropy.
            options: "reset_mask", bool [N]: which copies to reset; the others keep their state and
                their last observation.

        Returns:
            The observations and an empty info.

        Raises:
            ValueError, TypeError: seed or mask do not fit.
            ResetNeeded: a mask before the first reset of all.
        """
        mask = self._read_mask(options)
        seeds = self._list_seeds(seed)
        super().reset(seed=None if isinstance(seed, Sequence | np.ndarray) else seed)
        if self._vector is None:
            if mask is not self._all:
                raise ResetNeeded("reset_mask: all copies have to be reset once before some are")
            entropy = _draw_entropy(self)
            seeds = [entropy + i if given is None else given for i, given in enumerate(seeds)]
        if any(given is not None for given in seeds):
            self._step_draws.seed_(seeds, mask)
            self._reset_draws.seed_(seeds, mask)

        fresh = self.tensor_env.vector_reset(self._reset_draws.peek())
        self._reset_draws.advance_(mask)
        if self._vector is None:
            self._vector, self._obs = fresh, fresh.obs
        else:
            self._vector = _choose(mask, fresh, self._vector)
            self._obs = _where(mask, fresh.obs, self._obs)
        self._ended = self._ended & ~mask
        return self._export(self._to_space(self._obs)), {}

    @in_standard_state
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every copy.

        Args:
            actions: integers [N] in 0 .. num_actions - 1, NumPy or torch. With NEXT_STEP those of
                copies that finished in the step before are not read.

        Returns:
            Observations, rewards, terminated, truncated (each [N]) and infos.

        Raises:
            ValueError: an action of the wrong shape or type, or out of range. With torch output
                from a CUDA device the range is asserted on the device, as PyTorch does for an
                index, so that the step does not wait.
            ResetNeeded: before the first reset; with DISABLED, a copy that finished was not reset.
        """
        before, ended = self._vector, self._ended
        if before is None:
            raise ResetNeeded("step: call reset first")
        if self.autoreset_mode is AutoresetMode.DISABLED:
            message = "step: an episode has ended and was not reset"
            if not self._check_all(~ended, message):
                raise ResetNeeded(message)
        action = self._check_actions(actions, ended)
        noise = self._step_draws.peek()
        vector, outcome = self.tensor_env.vector_step(
            before, action, noise, self._reset_draws.peek()
        )
        reward, terminated, truncated = outcome.reward, outcome.terminated, outcome.truncated
        done, infos = outcome.done, {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            obs, stepped, started = vector.obs, self._all, done
            infos = self._final_infos(outcome.next_obs, done)
        elif self.autoreset_mode is AutoresetMode.NEXT_STEP:
            obs, stepped, started = _where(ended, before.obs, outcome.next_obs), ~ended, ended
            vector = _choose(ended, before, vector)
            reward = reward.masked_fill(ended, 0.0)
            terminated, truncated = terminated & ~ended, truncated & ~ended
            done = done & ~ended
        else:
            obs, stepped, started = outcome.next_obs, self._all, ~self._all
        self._step_draws.advance_(stepped)
        self._reset_draws.advance_(started)
        self._vector, self._obs, self._ended = vector, obs, done
        self._arguments = before.env, action, noise
        if self.output == "numpy":
            reward = reward.double()
        return (
            self._export(self._to_space(obs)),
            self._export(reward),
            self._export(terminated),
            self._export(truncated),
            infos,
        )

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """Pictures of the copies, uint8 [H, W, 3] each; None without a render mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            return None
        if self._vector is None:
            raise ResetNeeded("render: call reset first")
        state = self._vector.env
        if self.autoreset_mode is not AutoresetMode.SAME_STEP and self._arguments is not None:
            # After the end of an episode the state is already that of the next one: step again.
            last, _, _ = self.tensor_env.step(*self._arguments)
            state = type(state)(
                *(_where(self._ended, a, b) for a, b in zip(last, state, strict=True))
            )
        renderer = self._get_renderer()
        return tuple(renderer.frame(state, i) for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Close the renderer."""
        if self._renderer is not None:
            self._renderer.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_renderer": None}  # a picture's surface cannot be copied

    def _get_renderer(self) -> Renderer:
        """The renderer, made at its first use."""
        if self._renderer is None:
            self._renderer = _make_renderer(self.tensor_env)
        return self._renderer

    def _to_space(self, obs: Tensor) -> Tensor:
        return _shown(self.tensor_env, self.single_observation_space, obs)

    def _export(self, tensor: Tensor) -> Any:
        """A copy of `tensor` for the caller, in the form that `output` names."""
        copy = tensor.clone()
        return copy if self.output == "torch" else copy.cpu().numpy()

    def _final_infos(self, next_obs: Tensor, done: Tensor) -> dict[str, Any]:
        """Infos of a step with SAME_STEP: the last observations of the episodes that ended."""
        if self.output == "torch":
            final = {"final_obs": self._export(self._to_space(next_obs)), "final_info": {}}
            return {**final, "_final_obs": done.clone(), "_final_info": done.clone()}
        copies = done.nonzero()[:, 0].tolist()
        if not copies:
            return {}
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i, row in zip(copies, self._export(self._to_space(next_obs[done])), strict=True):
            final_obs[i] = row
        mask = self._export(done)
        return {
            "final_obs": final_obs,
            "_final_obs": mask,
            "final_info": {},
            "_final_info": mask.copy(),
        }

    def _check_actions(self, actions: Any, ended: Tensor) -> Tensor:
        """Actions as int64 [N] on the device."""
        if not isinstance(actions, Tensor):
            actions = torch.tensor(np.asarray(actions))
        if actions.is_floating_point() or actions.is_complex() or actions.dtype == torch.bool:
            raise ValueError(f"actions: must be integers, got {actions.dtype}")
        if actions.shape != (self.num_envs,):
            raise ValueError(
                f"actions: must have shape ({self.num_envs},), got {tuple(actions.shape)}"
            )
        action = self._to_device(actions.long())
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            action = action.masked_fill(ended, 0)
        most = self.tensor_env.num_actions - 1
        if not self._check_all(
            (action >= 0) & (action <= most), f"actions: must be in 0 .. {most}"
        ):
            value = next(value for value in action.tolist() if not 0 <= value <= most)
            raise ValueError(f"action {value}: must be in 0 .. {most}")
        return action

    def _check_all(self, ok: Tensor, message: str) -> bool:
        """Whether `ok` [N] is true everywhere; asserted on the device if reading would wait."""
        if self.output == "torch" and self.device.type not in ("cpu", "mps"):  # MPS asserts nothing
            torch._assert_async(ok.all(), message)
            return True
        return bool(ok.all())

    def _to_device(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, without waiting for it."""
        if tensor.device == self.device:
            return tensor
        return (
            upload(tensor, self.device) if tensor.device.type == "cpu" else tensor.to(self.device)
        )

    def _read_mask(self, options: dict[str, Any] | None) -> Tensor:
        """Which copies to reset, bool [N] on the device; the object `_all` if there is no mask."""
        mask = (options or {}).get("reset_mask")
        if mask is None:
            return self._all
        if not isinstance(mask, np.ndarray | Tensor) or mask.dtype not in (np.bool_, torch.bool):
            raise TypeError(f"reset_mask: must be a bool array, got {mask!r}")
        if mask.shape != (self.num_envs,):
            raise ValueError(
                f"reset_mask: must have shape ({self.num_envs},), got {tuple(mask.shape)}"
            )
        if isinstance(mask, np.ndarray):
            if not mask.any():
                raise ValueError("reset_mask: must be true for at least one copy")
            mask = torch.tensor(mask)
        return self._to_device(mask)

    def _list_seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        """A seed or None for every copy."""
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, Sequence | np.ndarray):
            if len(seed) != self.num_envs:
                raise ValueError(f"seed: {self.num_envs} copies need as many, got {len(seed)}")
            seeds = [None if given is None else operator.index(given) for given in seed]
        else:
            seeds = [operator.index(seed) + i for i in range(self.num_envs)]
        for given in seeds:
            if given is not None and given < 0:
                raise ValueError(f"seed {given}: must be at least 0")
        return seeds


class TensorSingleEnv(gymnasium.Env[Any, Any]):
    """One copy of a tensor environment behind Gymnasium's interface, with NumPy observations.

    The time limit is the environment's own `max_steps`; after its end, `step` raises ResetNeeded.

    The first reset generates and compiles a program from the functions of `env`. It takes about a
    second, or 20 ms if the cache of compiled programs has it. Without a C++ compiler, on another
    device than the CPU, and for functions that cannot be generated, torch runs them, about 20 times
    slower. The two differ only by rounding: in sines, exponentials and the like, and in sums.

    Args:
        env: the environment, or its id with its parameters as further keyword arguments.
        device: where it is computed; a GPU is slower for one copy.
        render_mode: "rgb_array": `render` draws the state; see `dqn_fast.envs.render`.
        compiled: False: torch runs the functions, with exactly the numbers of `TensorVectorEnv`.

    Raises:
        ValueError, TypeError: as `TensorVectorEnv`.
    """

    metadata: dict[str, Any] = _METADATA
    _renderer: Renderer | None = None

    @in_standard_state
    def __init__(
        self,
        env: TensorEnv | str,
        *,
        device: torch.device | str = "cpu",
        render_mode: str | None = None,
        compiled: bool = True,
        **params: Any,
    ) -> None:
        self.tensor_env = _make_tensor_env(env, params)
        _check_render_mode(render_mode)
        self.render_mode, self.metadata = render_mode, dict(_METADATA)
        if render_mode is not None:
            self._renderer = _make_renderer(self.tensor_env)
            self.metadata["render_fps"] = self._renderer.fps
        self.observation_space = self.tensor_env.observation_space
        self.action_space = Discrete(self.tensor_env.num_actions)
        self._copy = _OneCopy(self.tensor_env, torch.empty(0, device=device).device, compiled)
        self._started = self._playing = False
        self._elapsed = 0

    @in_standard_state
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; `options` are not read.

        Args:
            seed: of all episodes from here on. None continues the random numbers of the last seed,
                which at first is `np_random_seed`, from the system's entropy.

        Returns:
            The observation, float32 [F] or the number of the state, and an empty info.
        """
        super().reset(seed=seed)
        if seed is None and not self._started:
            seed = _draw_entropy(self)
        if seed is not None:
            self._copy.seed_(seed)
        self._started = self._playing = True
        self._elapsed = 0
        return self._copy.start(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step.

        Args:
            action: an integer in 0 .. num_actions - 1.

        Returns:
            The observation, reward, terminated, truncated and an empty info.

        Raises:
            ValueError: the action is not such an integer.
            ResetNeeded: the episode is over, or none was started.
        """
        if not self._playing:
            raise ResetNeeded(
                "step: an episode has ended and was not reset"
                if self._started
                else "step: call reset first"
            )
        obs, reward, terminated = self._copy.step(self._read_action(action))
        self._elapsed += 1
        truncated = self._elapsed >= self.tensor_env.max_steps
        self._playing = not (terminated or truncated)
        return obs, reward, terminated, truncated, {}

    def _read_action(self, action: Any) -> int:
        """The action as a number that is in range."""
        if type(action) is not int:
            array = np.asarray(action)
            if array.dtype.kind not in "iu":
                raise ValueError(f"action {action}: must be an integer, got {array.dtype}")
            if array.size != 1:
                raise ValueError(f"action {action}: must be one integer, got {array.size}")
            action = array.item()
        if not 0 <= action < self.tensor_env.num_actions:
            raise ValueError(f"action {action}: must be in 0 .. {self.tensor_env.num_actions - 1}")
        return int(action)

    def render(self) -> NDArray[np.uint8] | None:
        """Picture of the state, uint8 [H, W, 3]; None without a render mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            return None
        if not self._started:
            raise ResetNeeded("render: call reset first")
        if self._renderer is None:
            self._renderer = _make_renderer(self.tensor_env)
        return self._renderer.frame(self._copy.state, 0)

    def close(self) -> None:
        """Close the renderer."""
        if self._renderer is not None:
            self._renderer.close()

    def state_dict(self) -> dict[str, Any]:
        """State without `np_random`, as plain values and tensors, so that a run can be resumed."""
        flags = {"started": self._started, "playing": self._playing, "elapsed": self._elapsed}
        return {**flags, "tensors": [tensor.clone() for tensor in self._copy.tensors()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a result of `state_dict`.

        Raises:
            ValueError, RuntimeError: it is of another environment.
        """
        for own, saved in zip(self._copy.tensors(), state["tensors"], strict=True):
            if own.shape != saved.shape or own.dtype != saved.dtype:
                raise ValueError(f"a tensor is {saved.dtype} {list(saved.shape)}")
            own.copy_(saved)
        self._copy.forget_draws()
        self._started, self._playing = bool(state["started"]), bool(state["playing"])
        self._elapsed = int(state["elapsed"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_renderer": None}  # a picture's surface cannot be copied


class _OneCopy:
    """One copy in fixed memory, and its two functions, which read and write it.

    The generated program and torch run the same functions, `_start` and `_step`.

    Attributes:
        state: of the environment, [1, ...].
        is_generated: whether the generated program runs, once an episode has begun.
    """

    is_generated = False

    # Tensors made in the caller's inference mode could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, env: TensorEnv, device: torch.device, compiled: bool) -> None:
        self._env, self._space = env, env.observation_space
        self._compiled = compiled and device.type == "cpu"
        self._step_draws = _Draws(Stream.ENV_STEP, env.step_noise_dim, 1, device)
        self._reset_draws = _Draws(Stream.ENV_RESET, env.reset_noise_dim, 1, device)
        self._all = torch.ones(1, dtype=torch.bool, device=device)
        self._reset_noise = torch.zeros(1, env.reset_noise_dim, device=device)
        self._step_noise = torch.zeros(1, env.step_noise_dim, device=device)
        self._action = torch.zeros(1, dtype=torch.int64, device=device)
        self.state = _contiguous(env.reset(self._reset_noise))
        trial = self._step(tree.clone(self.state), self._action, self._step_noise)
        # On the CPU, where they are read.
        self._results = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in trial]
        self._run: dict[str, Callable[[], None]] = {}

    def _start(self, state: Any, noise: Tensor) -> list[Tensor]:
        """Overwrite the state with the first one of an episode; observation of that."""
        fresh = self._env.reset(noise)
        shown = _shown(self._env, self._space, self._env.observe(fresh))
        tree.copy_(state, fresh)
        return [shown]

    def _step(self, state: Any, action: Tensor, noise: Tensor) -> list[Tensor]:
        """Overwrite the state with the next one; observation of that, reward and terminated."""
        after, reward, terminated = self._env.step(state, action, noise)
        shown = _shown(self._env, self._space, self._env.observe(after))
        tree.copy_(state, after)
        return [shown, reward, terminated]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bind(self) -> None:
        """Make the calls, where the memory is new or a copy."""
        calls: dict[str, tuple[Callable[..., list[Tensor]], tuple[Tensor, ...]]] = {
            "start": (self._start, (self._reset_noise,)),
            "step": (self._step, (self._action, self._step_noise)),
        }
        program = _generate(self._env, self.state, calls) if self._compiled else None
        self.is_generated = program is not None
        for name, (function, inputs) in calls.items():
            results = self._results if name == "step" else self._results[:1]
            if program is None:
                self._run[name] = partial(_run_by_torch, function, self.state, inputs, results)
            else:
                tensors = [*tree.leaves(self.state), *inputs, *results]
                self._run[name] = program.bind(name, tensors)
        self._arrays = [result.numpy() for result in self._results]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": {}, "_arrays": []}  # they know where the memory is

    def tensors(self) -> list[Tensor]:
        """All that its future follows from."""
        draws = self._step_draws, self._reset_draws
        return [*tree.leaves(self.state), *(t for d in draws for t in (d.keys, d.index))]

    def forget_draws(self) -> None:
        """Draw again where keys and indices were overwritten."""
        self._step_draws._left = self._reset_draws._left = 0

    def seed_(self, seed: int) -> None:
        """Seed the episodes from here on."""
        self._step_draws.seed_([seed], self._all)
        self._reset_draws.seed_([seed], self._all)

    def start(self) -> Any:
        """Start an episode; its first observation."""
        if not self._run:
            self._bind()
        self._draw(self._reset_draws, self._reset_noise)
        self._run["start"]()
        return self._arrays[0][0].copy()

    def step(self, action: int) -> tuple[Any, float, bool]:
        """Observation, reward and terminated of a step."""
        if not self._run:
            self._bind()
        self._action.fill_(action)
        self._draw(self._step_draws, self._step_noise)
        self._run["step"]()
        obs, reward, terminated = self._arrays
        return obs[0].copy(), float(reward[0]), bool(terminated[0])

    def _draw(self, draws: _Draws, noise: Tensor) -> None:
        if draws.dim:
            noise.copy_(draws.peek())
            draws.advance_(self._all)


@torch.no_grad()
def _run_by_torch(
    function: Callable[..., list[Tensor]],
    state: Any,
    inputs: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:
    tree.copy_(results, function(state, *inputs))


def _generate(env: TensorEnv, state: Any, calls: Mapping[str, Any]) -> CallProgram | None:
    """A program of an environment's functions; None: they or this machine allow none."""
    from dqn_fast.engines.choice import EngineUnavailableError
    from dqn_fast.engines.fused.calls import Call, generate

    identity = env.identity()
    if identity is not None:
        modules = {kind.__module__ for kind in type(env).__mro__}
        own = {name for name in modules if name.startswith("dqn_fast.")}
        # A program may have replaced a method, as in `CartPole.step = mine`.
        identity = [identity, digest_of({*own, __name__, "dqn_fast.tree"})]
    try:
        return generate(
            {name: Call(function, state, inputs) for name, (function, inputs) in calls.items()},
            identity,
        )
    except EngineUnavailableError:
        return None


def _contiguous(state: Any) -> Any:
    """The same numbers, each tensor in memory of its own."""
    return tree.replace(
        state, [t.clone(memory_format=torch.contiguous_format) for t in tree.leaves(state)]
    )


class _Draws:
    """Uniform numbers of one stream for N copies, each with its own seed and index.

    Draw i of a copy equals the draw of `dqn_fast.noise.Noise` at index i for a member with that
    seed. Draws are generated in blocks, because one call of Philox for many draws is much cheaper.

    Attributes:
        keys: Philox keys, int64 [N, 2].
        index: each copy's next draw, int64 [N].
    """

    def __init__(self, stream: Stream, dim: int, num_envs: int, device: torch.device) -> None:
        self.stream, self.dim = stream, dim
        self.keys = torch.zeros(num_envs, 2, dtype=torch.int64, device=device)
        self.index = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._copies = torch.arange(num_envs, device=device)
        self._rows = max(1, min(256, 2**16 // num_envs))
        self._blocks = torch.arange(-(-dim // 4), device=device)
        self._first, self._block = self.index, torch.zeros(0, num_envs, dim, device=device)
        self._left = 0  # calls of `peek` that the block still serves

    def seed_(self, seeds: Sequence[int | None], mask: Tensor) -> None:
        """Start again with new seeds, in the copies of `mask` that are given one."""
        if self.dim == 0:
            return
        states = np.zeros((len(seeds), 2), np.int64)
        for i, seed in enumerate(seeds):
            if seed is not None:
                states[i] = stream_key(seed, self.stream)
        given = torch.tensor([seed is not None for seed in seeds])
        mask = mask & upload(given, mask.device)
        self.keys = _where(mask, upload(torch.from_numpy(states), mask.device), self.keys)
        self.index = self.index.masked_fill(mask, 0)
        self._left = 0

    def peek(self) -> Tensor:
        """Every copy's next draw, float32 [N, dim], uniform in [0, 1)."""
        if self.dim == 0:
            return self._block.new_empty(len(self.index), 0)
        if self._left == 0:
            self._fill()
        self._left -= 1
        return self._block[self.index - self._first, self._copies]

    def advance_(self, mask: Tensor) -> None:
        """Go on to the next draw in the copies of `mask`; at most once for each `peek`."""
        self.index = self.index + mask

    def _fill(self) -> None:
        index = self.index + torch.arange(self._rows, device=self.index.device)[:, None]
        self._block = uniform_of(words_at(self.keys, index, self._blocks), self.dim)
        self._first, self._left = self.index, self._rows


def _draw_entropy(env: TensorVectorEnv | TensorSingleEnv) -> int:
    """The seed of `env.np_random`, or a draw from it if the user has set that generator."""
    seed = env.np_random_seed
    return seed if seed is not None and seed >= 0 else int(env.np_random.integers(2**31))


def _make_tensor_env(env: TensorEnv | str, params: dict[str, Any]) -> TensorEnv:
    """The environment itself, or one made from an id and parameters."""
    if isinstance(env, str):
        if env not in TENSOR_ENVS:
            raise ValueError(f"env {env}: must be one of {', '.join(sorted(TENSOR_ENVS))}")
        env = TENSOR_ENVS[env](**params)
    elif params:
        raise ValueError(f"{', '.join(params)}: parameters go with an id, not with {env!r}")
    if type(env).vector_step is not TensorEnv.vector_step:
        raise TypeError(f"{type(env).__name__} lives on the host: use it with Gymnasium directly")
    if isinstance(env.observation_space, Discrete) and not isinstance(env, TabularEnv):
        raise TypeError(f"{type(env).__name__}: a Discrete observation space needs a TabularEnv")
    return env


def _shown(env: TensorEnv, space: gymnasium.Space[Any], obs: Tensor) -> Tensor:
    """Observations as elements of the space: features, or numbers of states."""
    if isinstance(space, Discrete):
        assert isinstance(env, TabularEnv)
        return env.state_index(obs)
    return env.shown(obs)


def _check_render_mode(render_mode: str | None) -> None:
    if render_mode not in (None, *_METADATA["render_modes"]):
        raise ValueError(f"render_mode {render_mode}: must be None or rgb_array")


def _make_renderer(env: TensorEnv) -> Renderer:
    from dqn_fast.envs.render import Renderer

    try:
        return Renderer(env)
    except ValueError as error:
        raise type(error)(f"render_mode rgb_array: {error}") from None


def _where(mask: Tensor, if_true: Tensor, if_false: Tensor) -> Tensor:
    """`torch.where` with the mask [N] spread over the trailing axes."""
    return torch.where(mask.view(-1, *[1] * (if_true.ndim - 1)), if_true, if_false)


def _choose(mask: Tensor, if_true: VectorState, if_false: VectorState) -> VectorState:
    """The copies of `mask` from one state, the others from the other."""
    pairs = zip(if_true.env, if_false.env, strict=True)
    return VectorState(
        type(if_true.env)(*(_where(mask, a, b) for a, b in pairs)),
        *(_where(mask, a, b) for a, b in zip(if_true[1:], if_false[1:], strict=True)),
    )
