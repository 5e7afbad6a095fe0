"""Vectorised environments of other libraries, as Gymnasium's VectorEnv.

Each library has its own rules for seeds, ends of episodes and last observations. They are known by
the library's name and written down here; no library is imported. `as_vector_env` is the only entry.

| library | what becomes of it |
| --- | --- |
| Stable-Baselines3's VecEnv | SAME_STEP: last observations and time limits from its infos |
| envpool | NEXT_STEP; it takes no seed, and a warning says so |
| SuperSuit, of PettingZoo | SAME_STEP: the agents are the copies, and end together |
| ale-py's AtariVectorEnv | as it is, with the autoreset mode that it has itself |
| `_WAYS_OUT` | one sentence that says what to pass instead |
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

_WAYS_OUT = {
    "torchrl": "TorchRL's environments pass TensorDicts; pass what they are made from: an id, or a "
    "callable that makes the gymnasium.Env or the VectorEnv inside",
    "pettingzoo": "PettingZoo's environments have several agents; SuperSuit makes their agents the "
    "copies of one environment: pass supersuit.pettingzoo_env_to_vec_env_v1(parallel_env)",
    "gym": "Gym is no longer maintained, and its interface is not Gymnasium's; wrap it: "
    'gymnasium.make("GymV26Environment-v0", env=env), of the package shimmy',
    "dm_env": "dm_env's interface is not Gymnasium's; wrap it with the package shimmy",
    "dm_control": "dm_control's interface is not Gymnasium's; wrap it with the package shimmy",
    "tianshou": "Tianshou's vector environments do not show their spaces; pass the callable that "
    "makes one copy",
    "brax": "Brax's environments pass JAX arrays; wrap one with brax.envs.wrappers.gym and pass a "
    "callable that makes it as a gymnasium.Env",
    "gymnax": "gymnax's environments are functions of JAX arrays; pass a callable that makes a "
    "gymnasium.Env, such as gymnax.wrappers.GymnaxToGymWrapper(env, params)",
    "jumanji": "Jumanji's environments are functions of JAX arrays; pass a callable that makes "
    "jumanji.wrappers.JumanjiToGymWrapper(env) as a gymnasium.Env",
}
"""What to do about environments whose interface is another one, by package."""


_RUNNING_STATISTICS = {"VecNormalize", "NormalizeObservation", "NormalizeReward"}


def as_vector_env(source: Any) -> Any:
    """A vectorised environment of another library as a VectorEnv; anything else as it is.

    Raises:
        ValueError: the environment has an interface that cannot be adapted; the message names the
            library and what to pass instead.
    """
    packages = _packages(source)
    if "stable_baselines3" in packages:
        return StableBaselinesVectorEnv(source)
    if "envpool" in packages:
        return EnvpoolVectorEnv(source)
    if "supersuit" in packages and isinstance(source, VectorEnv):
        return SuperSuitVectorEnv(source)
    if isinstance(source, VectorEnv):
        base: Any = source.unwrapped
        if "ale_py" in _packages(base):
            _own_autoreset_mode(base)
        if not hasattr(source, "single_observation_space"):
            raise ValueError(
                f"from_gymnasium: {type(base).__name__}: a VectorEnv must have "
                "single_observation_space and single_action_space, the spaces of one copy"
            )
        return source
    if isinstance(source, gymnasium.Env):
        return source
    for package, way_out in _WAYS_OUT.items():
        if package in packages:
            raise ValueError(f"from_gymnasium: {type(source).__name__}: {way_out}")
    return source


def _packages(env: Any) -> set[str]:
    """Names of the packages of an object's classes."""
    return {kind.__module__.partition(".")[0] for kind in type(env).__mro__}


def _own_autoreset_mode(env: Any) -> None:
    """Give an AtariVectorEnv metadata of its own: it writes its mode into those of all VectorEnvs.

    Raises:
        ValueError: its steps are of some of its copies only.
    """
    if env.batch_size != env.num_envs:
        raise ValueError(
            f"from_gymnasium: ale-py's AtariVectorEnv steps {env.batch_size} of its {env.num_envs} "
            "copies at a time; make it without batch_size"
        )
    env.metadata = {**env.metadata, "autoreset_mode": env.autoreset_mode}


class ForeignVectorEnv(VectorEnv[Any, Any, Any]):
    """A vectorised environment of another library.

    Attributes:
        together: copies that exist only together, such as the agents of one game.
    """

    together = 1

    def __init__(
        self,
        env: Any,
        num_envs: int,
        mode: AutoresetMode,
        name: str,
        max_steps: int | None = None,
    ) -> None:
        """Adapt an environment with spaces of one copy.

        Args:
            env: the environment.
            num_envs: number of its copies.
            mode: when it resets a copy whose episode has ended.
            name: for messages and records.
            max_steps: its time limit, if it says.
        """
        self.foreign, self.num_envs = env, num_envs
        self.metadata = {"autoreset_mode": mode}
        self.spec = EnvSpec(name, max_episode_steps=max_steps)
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def source(self) -> Callable[..., Any] | Sequence[Callable[[], Any]]:
        """A source of further copies like these.

        Raises:
            ValueError: the library does not show how they are made.
        """
        raise ValueError(
            self._no_source("an id, or a callable that makes such copies from num_envs")
        )

    def _no_source(self, wanted: str) -> str:
        needs = "evaluation needs copies of its own; pass eval_source:"
        return f"from_gymnasium: {type(self.foreign).__name__}: {needs} {wanted}"

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment, if it can be closed."""
        close = getattr(self.foreign, "close", None)
        if close is not None:
            close()


class StableBaselinesVectorEnv(ForeignVectorEnv):
    """A VecEnv of Stable-Baselines3."""

    def __init__(self, env: Any) -> None:
        """Adapt a VecEnv.

        Raises:
            ValueError: it normalises by running statistics, or comes from SuperSuit, whose infos
                lack the time limits.
        """
        if "supersuit" in _packages(env):
            raise ValueError(
                "from_gymnasium: SuperSuit's SB3VecEnvWrapper does not tell time limits from ends; "
                'pass the vector environment made with base_class="gymnasium"'
            )
        self._layers = [env]
        while hasattr(self._layers[-1], "venv"):
            self._layers.append(self._layers[-1].venv)
        try:
            specs = env.get_attr("spec")
        except Exception:  # a copy without one, or one that no process can send
            specs = []
        self._specs = [spec for spec in specs if isinstance(spec, EnvSpec)]
        wrappers = {type(layer).__name__ for layer in self._layers}
        wrappers |= {wrapper.name for spec in self._specs for wrapper in spec.additional_wrappers}
        for wrapper in sorted(wrappers & _RUNNING_STATISTICS):
            raise ValueError(
                f"from_gymnasium: {type(env.unwrapped).__name__} of Stable-Baselines3: {wrapper} "
                "keeps running statistics, which a saved agent would not have; leave it out, or "
                "scale with fixed numbers"
            )
        # Around the copies; a VecMonitor only watches.
        self._others = [k for k in self._layers[:-1] if type(k).__name__ != "VecMonitor"]
        self.envs = getattr(env.unwrapped, "envs", None)  # of a DummyVecEnv
        name, limit = type(env).__name__, None
        if len(self._specs) == env.num_envs:
            limit = self._specs[0].max_episode_steps
            name = name if self._others else self._specs[0].id
        super().__init__(env, env.num_envs, AutoresetMode.SAME_STEP, name, limit)

    def source(self) -> Callable[..., Any] | Sequence[Callable[[], Any]]:
        """The copies' specs, if nothing else was put around them but monitors."""
        makers = list(map(_maker_of, self._specs))
        if self._others or len(makers) != self.num_envs or None in makers:
            wanted = (
                "an id, a callable that makes one gymnasium.Env, or, for Stable-Baselines3, "
                "lambda num_envs: make_vec_env(..., n_envs=num_envs)"
            )
            raise ValueError(self._no_source(wanted))
        return [maker for maker in makers if maker is not None]

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.foreign.seed(seed)
        return self.foreign.reset(), {}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        obs, rewards, done, infos = self.foreign.step(actions)
        done = np.asarray(done, np.bool_)
        copies = np.flatnonzero(done).tolist()
        cut = np.zeros_like(done)
        for i in copies:
            if "TimeLimit.truncated" not in infos[i]:
                raise RuntimeError(
                    f"the info of copy {i}, whose episode has ended, lacks 'TimeLimit.truncated', "
                    "by which Stable-Baselines3 tells time limits from ends"
                )
            cut[i] = infos[i]["TimeLimit.truncated"]
        merged = _merge_ends(infos, done) if copies else {}
        return obs, rewards, done & ~cut, done & cut, merged


class EnvpoolVectorEnv(ForeignVectorEnv):
    """An environment of envpool, in which all copies step at once."""

    def __init__(self, env: Any) -> None:
        """Adapt an environment of envpool; warn that its seed is not the run's.

        Raises:
            ValueError: it has another interface than Gymnasium's, steps some copies at a time, or
                has several players.
        """
        name, config = type(env).__name__, env.config
        if "Gymnasium" not in name:
            raise ValueError(
                f'from_gymnasium: envpool\'s {name}: make it with env_type="gymnasium"'
            )
        num_envs = int(config["num_envs"])
        if config["batch_size"] not in (0, num_envs):
            raise ValueError(
                f"from_gymnasium: envpool's {name} steps {config['batch_size']} of its {num_envs} "
                "copies at a time; make it without batch_size"
            )
        if config.get("max_num_players", 1) != 1:
            raise ValueError(f"from_gymnasium: envpool's {name} has several players, not one")
        warnings.warn(
            f"envpool's {name} takes no seed from a run: it plays those of envpool.make(..., seed="
            f"{config.get('seed')}), whatever --seed is",
            stacklevel=3,
        )
        label = f"envpool/{name.removesuffix('GymnasiumEnvPool') or name}"
        limit = config.get("max_episode_steps")
        super().__init__(env, num_envs, AutoresetMode.NEXT_STEP, label, limit)

    def source(self) -> Callable[..., Any]:
        """None: an environment of envpool does not know its task's id."""
        wanted = "lambda num_envs: envpool.make(task_id, env_type='gymnasium', num_envs=num_envs)"
        raise ValueError(self._no_source(wanted))

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        obs, _ = self.foreign.reset()
        return obs, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = self.foreign.step(np.asarray(actions))
        return obs, reward, terminated, truncated, {}


class SuperSuitVectorEnv(ForeignVectorEnv):
    """A vector environment of SuperSuit: the agents of PettingZoo's environments are the copies."""

    def __init__(self, env: Any) -> None:
        first = env
        while getattr(first, "vec_envs", None):
            first = first.vec_envs[0]
        game = getattr(first, "par_env", None)
        name = (env.metadata or {}).get("name") or type(env).__name__
        super().__init__(env, env.num_envs, AutoresetMode.SAME_STEP, f"supersuit/{name}")
        self.together = int(first.num_envs) if game is not None else 1

    def source(self) -> Callable[..., Any]:
        """SuperSuit's own copies of this environment, rounded up to whole games."""
        if getattr(self.foreign, "vec_envs", None) is None and self.together == 1:
            wanted = "a callable that makes such a vector environment from num_envs"
            raise ValueError(self._no_source(f"{wanted}; this one has processes of its own"))
        copies = importlib.import_module("supersuit").concat_vec_envs_v1

        def make(num_envs: int) -> Any:
            return copies(self.foreign, -(-num_envs // self.num_envs))

        return make

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        obs, _ = self.foreign.reset(seed=seed)
        return obs, {}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        obs, reward, terminated, truncated, infos = self.foreign.step(actions)
        terminated, truncated = np.asarray(terminated) != 0, np.asarray(truncated) != 0
        done = terminated | truncated
        if not done.any():
            return obs, reward, terminated, truncated, {}
        alone = [i for i in np.flatnonzero(done) if "terminal_observation" not in infos[i]]
        if alone:
            raise RuntimeError(
                f"agent {alone[0]} has ended before the others; SuperSuit resets all agents "
                "together, so agents that end alone are not supported (black_death)"
            )
        return obs, reward, terminated, truncated, _merge_ends(infos, done)


def _merge_ends(infos: Sequence[Any], done: NDArray[np.bool_]) -> dict[str, Any]:
    """Gymnasium's infos of a SAME_STEP step, from those of each copy."""
    final = np.full(len(done), None, dtype=object)
    returns, reported = np.zeros(len(done)), np.zeros_like(done)
    for i in np.flatnonzero(done).tolist():
        final[i] = infos[i].get("terminal_observation")
        if "episode" in infos[i]:
            returns[i], reported[i] = infos[i]["episode"]["r"], True
    merged: dict[str, Any] = {"final_obs": final, "_final_obs": done}
    if reported.any():
        merged |= {"episode": {"r": returns, "_r": reported}, "_episode": reported}
    return merged


def _maker_of(spec: EnvSpec) -> Callable[[], gymnasium.Env[Any, Any]] | None:
    """What makes another such copy, without monitors; None: a wrapper hides its arguments."""
    wrappers = tuple(w for w in spec.additional_wrappers if w.name != "Monitor")
    if spec.entry_point is None or any(wrapper.kwargs is None for wrapper in wrappers):
        return None
    spec = copy.deepcopy(spec)
    spec.additional_wrappers = wrappers
    return partial(gymnasium.make, spec)
