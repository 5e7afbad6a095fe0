"""Gymnasium's environments that have a table of transitions, such as FrozenLake, on the device.

Toy-text environments have a table `P[s][a] = [(probability, next state, reward, terminated), ...]`.
A table is played only if it is the whole environment: the registered entry point is a class, no
wrapper but those of `gymnasium.make` is around it, and its `step` and `reset` are those of
Gymnasium's toy-text classes or of a class that declares `plays_its_table = True`. Nothing else is
known to follow its `P`; it steps on the host.

    env = GymTable("FrozenLake8x8-v1", {"is_slippery": False})
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.spaces import Discrete
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from torch import Tensor

from dqn_fast.bellman import TabularMDP, ends_elsewhere
from dqn_fast.envs.core import TabularEnv
from dqn_fast.envs.imports import ImportFailed, import_module
from dqn_fast.envs.params import cast, freeze

DEFAULT_MAX_STEPS = 200
"""Time limit in steps if Gymnasium has none, as for CliffWalking."""

# Arguments with which a step depends on more than the state in `P`, and on what.
_BEYOND_THE_TABLE = {"fickle_passenger": "passengers who change their destination"}
_TRUSTED = "gymnasium.envs.toy_text."
"""Modules whose `step` and `reset` follow `P` and `initial_state_distrib`."""
_HARMLESS = (TimeLimit, OrderEnforcing, PassiveEnvChecker)
"""Wrappers of `gymnasium.make`; the time limit is `max_steps` here."""


class NoTableError(ValueError):
    """Gymnasium does not know the id, or its environment has no table of transitions."""


class TableState(NamedTuple):
    """number: of the state, as Gymnasium observes it, int32 [E]."""

    number: Tensor


@dataclass(frozen=True)
class GymTable(TabularEnv):
    """A Gymnasium environment played from its table: the same states, rewards and terminations.

    States are Gymnasium's 0 .. n - 1. If a step may terminate in a state in which other episodes
    continue, as in Taxi, the MDP has one more state, n: the end. Only `states` and `mdp` contain
    it; `observe` returns Gymnasium's state.

    Attributes:
        env_id: id registered with Gymnasium.
        arguments: of its constructor, by name, and "max_steps"; text is cast to the type that the
            constructor names. An argument that is not given has the registered value, else the
            constructor's default; the time limit has DEFAULT_MAX_STEPS if none is registered. The
            attribute holds all arguments, as pairs.
        max_steps: time limit in steps, >= 1.
        num_actions: Gymnasium's.
        num_states: n.
        grid_shape: rows and columns, if the environment says that its states form a grid.

    Raises:
        NoTableError: the id is unknown, or its environment is no table, whatever the arguments.
        ValueError: an argument is unknown, of another type or refused by the constructor; or the
            table is not one of probabilities.
    """

    env_id: str
    arguments: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    max_steps: int = field(init=False, compare=False, repr=False)
    num_actions: int = field(init=False, compare=False, repr=False)  # type: ignore[misc]
    num_states: int = field(init=False, compare=False, repr=False)
    grid_shape: tuple[int, int] | None = field(init=False, compare=False, repr=False)
    _table: _Table = field(init=False, compare=False, repr=False)

    reset_noise_dim: ClassVar[int] = 1
    step_noise_dim: ClassVar[int] = 1

    def __post_init__(self) -> None:
        spec, given = _find_spec(self.env_id), dict(self.arguments)
        try:
            arguments = _cast_arguments(spec, given)
            cells, start, grid_shape = _read_env(spec, arguments, given)
        except ValueError as error:
            if given and not isinstance(error, NoTableError):
                _ensure_table(self.env_id)
            raise
        table = _Table(cells, start)
        for name, value in (
            ("arguments", tuple(arguments.items())),
            ("max_steps", arguments["max_steps"]),
            ("num_actions", table.num_actions),
            ("num_states", table.num_states),
            ("grid_shape", grid_shape),
            ("_table", table),
        ):
            object.__setattr__(self, name, value)

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.arguments)

    def identity(self) -> Any:
        """The table itself: other sources made it."""
        digest = hashlib.sha256()
        for tensor in self._table.on(torch.device("cpu")):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        sizes = self.num_states, self.num_actions, self.max_steps, self._table.mdp_states
        return [type(self).__name__, sizes, digest.hexdigest()]

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        return Discrete(self.num_states)

    @property
    def obs_dtype(self) -> torch.dtype:
        """Smallest integer type that holds a state: the replay stores two per transition."""
        if self._table.mdp_states <= 2**8:
            return torch.uint8
        return torch.int16 if self._table.mdp_states <= 2**15 else torch.int32

    def reset(self, noise: Tensor) -> TableState:
        table = self._table.on(noise.device)
        which = torch.searchsorted(table.first_bounds, noise[:, 0].contiguous(), right=True)
        return TableState(table.first[which])

    def step(
        self, state: TableState, action: Tensor, noise: Tensor
    ) -> tuple[TableState, Tensor, Tensor]:
        table = self._table.on(action.device)
        row = state.number * self.num_actions + action
        outcome = row, (noise >= table.bounds[row]).sum(1)
        return (
            TableState(table.next_state[outcome]),
            table.reward[outcome],
            table.terminated[outcome],
        )

    def observe(self, state: TableState) -> Tensor:
        """The number of the state, [E]; the network reads it one-hot."""
        return state.number.to(self.obs_dtype)

    def features(self, obs: Tensor) -> Tensor:
        """One-hot state, float32 [..., num_states]; all 0 for the end."""
        states = torch.arange(self.num_states, device=obs.device, dtype=obs.dtype)
        return (obs.unsqueeze(-1) == states).float()

    def mdp(self) -> TabularMDP:
        """The table of n states, or of n + 1 with the end; see
        `TabularMDP.from_transition_table`."""
        cells, num_actions = self._table.cells, self.num_actions
        table = {
            s: dict(enumerate(cells[s * num_actions : (s + 1) * num_actions]))
            for s in range(self.num_states)
        }
        return TabularMDP.from_transition_table(table, self._table.start)

    def states(self) -> TableState:
        return TableState(torch.arange(self._table.mdp_states, dtype=torch.int32))

    def state_index(self, obs: Tensor) -> Tensor:
        """Row of the table, int64. A terminated successor has the row of the state that Gymnasium
        shows, although the MDP may be in the end."""
        return obs.long()


# ------------------------------------------------------------------------------- the table

Cell = list[tuple[float, int, float, bool]]
"""Outcomes of one action in one state: (probability > 0, next state, reward, terminated)."""


class _Tensors(NamedTuple):
    """The table on a device: R = (n + 1) * A rows of K outcomes, and S states to start in.

    Attributes:
        bounds: noise in [bounds[k - 1], bounds[k]) draws outcome k, float32 [R, K - 1].
        next_state: int32 [R, K].
        reward: float32 [R, K].
        terminated: bool [R, K].
        first: states in which episodes start, int32 [S].
        first_bounds: as `bounds`, for the states of `first`, float32 [S - 1].
    """

    bounds: Tensor
    next_state: Tensor
    reward: Tensor
    terminated: Tensor
    first: Tensor
    first_bounds: Tensor


class _Table:
    """A table of transitions and its tensors, cached for each device.

    Attributes:
        cells: outcomes in state s of action a, at s * num_actions + a.
        start: Pr(S_0 = s), float64 [n].
        num_states: n.
        num_actions: A.
        mdp_states: n, or n + 1 where the MDP needs the end.
    """

    def __init__(self, cells: list[Cell], start: Tensor) -> None:
        self.cells, self.start = cells, start
        self.num_states = len(start)
        self.num_actions = len(cells) // self.num_states
        width = max(map(len, cells))
        end: Cell = [(1.0, self.num_states, 0.0, True)]
        # Shorter rows repeat their last outcome with probability 0.
        rows = [
            cell + [(0.0, *cell[-1][1:])] * (width - len(cell))
            for cell in [*cells, *[end] * self.num_actions]
        ]
        columns = [[[outcome[i] for outcome in row] for row in rows] for i in range(4)]
        probability = torch.tensor(columns[0], dtype=torch.float64)
        first = (start > 0).nonzero()[:, 0]
        tensors = _Tensors(
            bounds=_noise_bounds(probability),
            next_state=torch.tensor(columns[1], dtype=torch.int32),
            reward=torch.tensor(columns[2], dtype=torch.float32),
            terminated=torch.tensor(columns[3], dtype=torch.bool),
            first=first.int(),
            first_bounds=_noise_bounds(start[first]),
        )
        self._tensors = {torch.device("cpu"): tensors}
        state = torch.arange(len(cells)).repeat_interleave(width) // self.num_actions
        next_state, terminated = (
            tensor[: len(cells)].flatten() for tensor in (tensors.next_state, tensors.terminated)
        )
        ends = ends_elsewhere(state, next_state.long(), terminated, start)
        self.mdp_states = self.num_states + int(ends.any())

    def on(self, device: torch.device) -> _Tensors:
        """The tensors on a device, moved there at the first use."""
        if device not in self._tensors:
            tensors = self._tensors[torch.device("cpu")]
            self._tensors[device] = _Tensors(*(tensor.to(device) for tensor in tensors))
        return self._tensors[device]


def _ensure_table(env_id: str) -> None:
    """Raise NoTableError if the environment made without arguments has no table."""
    try:
        GymTable(env_id)
    except NoTableError:
        raise
    except ValueError:
        return


def _noise_bounds(probability: Tensor) -> Tensor:
    """Thresholds of uniform noise between K outcomes: [..., K] to float32 [..., K - 1].

    Sums are rounded up, so that a float32 number draws the same outcome as from Gymnasium's float64
    sums.
    """
    total = np.cumsum(probability.numpy(), -1)[..., :-1]
    nearest = total.astype(np.float32)
    up = np.nextafter(nearest, np.float32(np.inf))
    return torch.from_numpy(np.where(nearest < total, up, nearest))


def _read_env(
    spec: EnvSpec, arguments: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[list[Cell], Tensor, tuple[int, int] | None]:
    """Cells, start distribution and grid of the environment made with `arguments`.

    Args:
        spec: Gymnasium's.
        arguments: all arguments.
        given: those that the user gave, for error messages.
    """
    asked = f"--env-id {spec.id}"
    if given:
        asked = "--env-params " + " ".join(f"{name} {value}" for name, value in given.items())
    kwargs = {name: value for name, value in arguments.items() if name != "max_steps"}
    try:
        with np.errstate(invalid="ignore"):  # a map without a start raises below
            envs = [spec.make(disable_env_checker=True, **kwargs) for _ in range(2)]
    except Exception as error:
        if not given:
            raise NoTableError(f"{asked}: cannot be made ({error})") from error
        raise ValueError(
            f"{asked}: {spec.id} cannot be made with that "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    grid_shape = _read_grid_shape(envs[0].unwrapped)
    try:
        if beyond := _beyond_the_table(spec, envs[0]):
            raise NoTableError(f"{asked}: has no table of transitions alone, but {beyond}")
        (cells, start), again = (_read_cells(env.unwrapped, asked) for env in envs)
        if cells != again[0] or not torch.equal(start, again[1]):
            raise ValueError(
                f"{asked}: {spec.id} has a different table each time that it is made; "
                f"use gym:{spec.id}"
            )
    finally:
        for env in envs:
            env.close()
    on_grid = grid_shape is not None and math.prod(grid_shape) == len(start)
    return cells, start, grid_shape if on_grid else None


def _read_grid_shape(env: Any) -> tuple[int, int] | None:
    """Rows and columns of toy-text grids, which name them in one of two ways."""
    if hasattr(env, "nrow"):
        return int(env.nrow), int(env.ncol)
    shape: tuple[int, ...] = getattr(env, "shape", ())
    return (int(shape[0]), int(shape[1])) if len(shape) == 2 else None


def _read_cells(env: Any, asked: str) -> tuple[list[Cell], Tensor]:
    """Table and start distribution of an unwrapped environment, checked."""
    spaces = (env.observation_space, env.action_space)
    try:
        if not all(isinstance(space, Discrete) and space.start == 0 for space in spaces):
            raise TypeError("not Discrete")
        n, num_actions = (int(space.n) for space in spaces)
        start = torch.tensor(np.asarray(env.initial_state_distrib, dtype=np.float64))
        cells = [
            [(float(p), int(s), float(r), bool(end)) for p, s, r, end in env.P[state][action] if p]
            for state in range(n)
            for action in range(num_actions)
        ]
        if len(env.P) != n or start.shape != (n,):
            raise TypeError("not a table of all states")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NoTableError(f"{asked}: has no table of transitions") from error

    for row, cell in enumerate(cells):
        probabilities = [outcome[0] for outcome in cell]
        where = f"{asked}: the table's state {row // num_actions}, action {row % num_actions}"
        if not (min(probabilities, default=-1) > 0 and abs(sum(probabilities) - 1) <= 1e-9):
            raise ValueError(
                f"{where} has probabilities {probabilities}; must be above 0 and sum to 1"
            )
        if not all(0 <= s < n and math.isfinite(r) for _, s, r, _ in cell):
            raise ValueError(f"{where} leads to {cell}; must be states 0 .. {n - 1}, finite reward")
    if not ((start >= 0).all() and abs(float(start.sum()) - 1) <= 1e-9):
        raise ValueError(f"{asked}: the start distribution sums to {float(start.sum())}, must be 1")
    return cells, start


def _beyond_the_table(spec: EnvSpec, env: gymnasium.Env[Any, Any]) -> str:
    """What of an environment its table does not describe, by structure; empty: nothing."""
    layer = env
    while isinstance(layer, gymnasium.Wrapper):
        if type(layer) not in _HARMLESS:
            return f"a wrapper {type(layer).__name__}"
        if type(layer) is TimeLimit and layer._max_episode_steps != spec.max_episode_steps:
            return "a time limit of its own"
        layer = layer.env
    if type(layer) is not _load_creator(spec):
        return "an entry point that is not its class"
    for name in ("step", "reset"):
        definer = next(cls for cls in type(layer).__mro__ if name in vars(cls))
        declared = vars(definer).get("plays_its_table") is True
        if name in vars(layer) or not (declared or definer.__module__.startswith(_TRUSTED)):
            return f"a `{name}` of its own"
    return ""


# --------------------------------------------------------------------------- its arguments


class _Argument(NamedTuple):
    """Type hint of a constructor's argument, or None, and its default."""

    hint: Any
    default: Any


_MISSING = inspect.Parameter.empty


def _find_spec(env_id: str) -> EnvSpec:
    """Gymnasium's entry of an id; of "module:id", after the import of the module."""

    module, _, name = env_id.rpartition(":")
    try:
        if module:
            import_module(f"--env-id {env_id}", module)
        spec = gymnasium.spec(name)
    except ImportFailed as error:
        raise NoTableError(str(error)) from error
    except gymnasium.error.Error as error:
        raise NoTableError(f"--env-id {env_id}: {error}") from error
    if spec.additional_wrappers or spec.entry_point is None:
        raise NoTableError(f"--env-id {env_id}: has wrappers, which a table does not describe")
    return spec


def _cast_arguments(spec: EnvSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name: the given ones cast, the others as registered or by default."""
    known = _list_arguments(spec)
    values = {name: argument.default for name, argument in known.items()}
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"--env-params {name} {value}: {spec.id} has no such parameter; "
                f"it has {', '.join(known)}"
            )
        values[name] = cast(name, value, *_choose_hints(known[name]))
        if name in _BEYOND_THE_TABLE and values[name]:
            raise ValueError(
                f"--env-params {name} {value}: must be false: the table `P` does not describe "
                f"{_BEYOND_THE_TABLE[name]}; use gym:{spec.id}"
            )
    if values["max_steps"] < 1:
        raise ValueError(f"--env-params max_steps {values['max_steps']}: must be at least 1")
    if missing := [name for name, value in values.items() if value is _MISSING]:
        raise ValueError(f"--env-params: {spec.id} needs {' and '.join(missing)}")
    return values


def _load_creator(spec: EnvSpec) -> Any:
    """The class or function that an id's entry point names."""
    entry_point = spec.entry_point
    return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point


def _list_arguments(spec: EnvSpec) -> dict[str, _Argument]:
    """Arguments of the constructor that a file can hold, and "max_steps"."""
    try:
        create = _load_creator(spec)
        parameters = inspect.signature(create).parameters
    except Exception as error:  # of the module that is imported, such as a missing dependency
        raise NoTableError(f"--env-id {spec.id}: cannot be made ({error})") from error
    with contextlib.suppress(NameError):  # a hint for type checkers only
        parameters = inspect.signature(create, eval_str=True).parameters
    known = {
        name: _Argument(p.annotation, spec.kwargs.get(name, p.default))
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name != "render_mode"
    }
    for name, value in spec.kwargs.items():
        known.setdefault(name, _Argument(_MISSING, value))
    plain: dict[str, _Argument] = {}
    for name, argument in known.items():
        if argument.default is not _MISSING:
            try:
                argument = argument._replace(default=freeze(argument.default))
            except TypeError:
                continue
        plain[name] = argument
    max_steps = spec.max_episode_steps or DEFAULT_MAX_STEPS
    return {**plain, "max_steps": _Argument(int, max_steps)}


def _choose_hints(argument: _Argument) -> list[Any]:
    """Types for `cast`: those of the hint that a file can hold, else the type of the default."""
    hint, default = argument
    union = get_origin(hint) in (Union, UnionType)
    known = (bool, int, float, str, list, tuple, Literal)
    named = [h for h in (get_args(hint) if union else (hint,)) if (get_origin(h) or h) in known]
    if not named:
        named = [type(default) if type(default) in known else Any]
        if isinstance(default, tuple) and {type(item) for item in default} <= {int, float}:
            named = [tuple[int, ...]]
    return [*named, NoneType] if default is None or NoneType in get_args(hint) else named
