"""Pictures of what environments are doing, without a display.

`renderer` finds out how an environment can be drawn: by its own method `render`, by the renderer of
the Gymnasium environment that it is or whose dynamics it has, as a grid of states where it is
tabular.

A method is all that an environment of one's own needs:

    def render(self, state) -> NDArray[np.uint8]:
        # One copy's state, tensors on the CPU without the leading axis E; a picture [H, W, 3].
        picture = np.full((10, 10, 3), 255, np.uint8)
        picture[state.row, state.column] = 0
        return picture

Small pictures are enlarged. `render_fps`, a number beside it, says how many steps a second are.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from dqn_fast.envs.core import TabularEnv, TensorEnv
from dqn_fast.envs.from_gymnasium import from_gymnasium
from dqn_fast.envs.tabular import GymTable

Picture = NDArray[np.uint8]
"""Red, green and blue in 0 .. 255, [H, W, 3], the top row first."""

INSTALL = 'pip install -e ".[video]"'
DEFAULT_FPS = 10.0
GRID_COLUMNS = 32
"""Cells in a row of states that have no shape of their own."""


class MissingLibraryError(ValueError):
    """Pictures need a library that is not installed; the message says how to get it."""


class Renderer(Protocol):
    """Draws the copies of one environment.

    Attributes:
        fps: steps of the environment in a second of its own time.
        live: whether pictures can only be taken of what `env` is doing now; `frame` does not look
            at the state then.
    """

    fps: float
    live: bool

    @property
    def env(self) -> TensorEnv:
        """What has to be played to be seen: the environment itself, or one more with a camera of
        those that live on the host."""

    def frame(self, state: Any, i: int = 0) -> Picture:
        """Picture of copy `i` of an environment state, a NamedTuple of tensors [E, ...]."""

    def close(self) -> None:
        """Give back what the renderer holds."""


def renderer(env: TensorEnv) -> Renderer | None:
    """What draws `env`; None if nothing can.

    Raises:
        MissingLibraryError: it could be drawn if a library were there.
    """
    if callable(getattr(env, "render", None)):
        return OwnRenderer(env)
    if env.on_host:
        try:
            return HostRenderer(env)
        except (TypeError, ValueError) as error:
            if isinstance(error, MissingLibraryError):
                raise
            return None
    if isinstance(env, GymTable):
        # Without pygame, or of an environment that draws nothing, a grid of states is left.
        with contextlib.suppress(MissingLibraryError, TypeError, ValueError):
            return TableRenderer(env)
    elif hasattr(env, "gymnasium_id"):
        return ClassicRenderer(env)
    return GridRenderer(env) if isinstance(env, TabularEnv) else None


class OwnRenderer:
    """The pictures that an environment draws by itself, by a method `render`."""

    live = False

    def __init__(self, env: Any) -> None:
        self.env: TensorEnv = env
        self._render = env.render
        self.fps = float(getattr(env, "render_fps", DEFAULT_FPS))

    def frame(self, state: Any, i: int = 0) -> Picture:
        """See `Renderer`.

        Raises:
            ValueError: the method gave something else than a picture.
        """
        picture = np.asarray(self._render(type(state)(*(t[i].cpu() for t in state))))
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"{type(self.env).__name__}.render must give uint8 [H, W, 3], "
                f"got {picture.dtype} {list(picture.shape)}"
            )
        return picture

    def close(self) -> None:
        """Nothing is held."""


class ClassicRenderer:
    """Gymnasium's own pictures of an environment with the same dynamics and another state.

    The environment says in `gymnasium_id` which one that is, in `gymnasium_state` what its state is
    in Gymnasium's terms, and by its parameters how it differs from the standard.
    """

    live = False

    def __init__(self, env: Any) -> None:
        """Make the environment that draws.

        Raises:
            MissingLibraryError: pygame is not there.
        """
        self.env, self._drawn = env, _drawing(env.gymnasium_id, {})
        for name, value in env.params.items():
            for attribute in (name, name.upper()):  # Acrobot's lengths are constants of its class
                if hasattr(self._drawn, attribute):
                    setattr(self._drawn, attribute, value)
        self.fps = float(self._drawn.metadata.get("render_fps", DEFAULT_FPS))

    def frame(self, state: Any, i: int = 0) -> Picture:
        """See `Renderer`."""
        self._drawn.state = self.env.gymnasium_state(state)[i]
        with headless():
            return np.array(self._drawn.render())

    def close(self) -> None:
        """Close the environment that draws."""
        self._drawn.close()


class TableRenderer:
    """Gymnasium's own pictures of an environment that is played from its table."""

    live = False

    def __init__(self, env: GymTable) -> None:
        """Make the environment that draws.

        Raises:
            MissingLibraryError: pygame is not there.
            TypeError, ValueError: the environment draws nothing.
        """
        arguments = {name: value for name, value in env.params.items() if name != "max_steps"}
        self.env, self._drawn = env, _drawing(env.env_id, arguments)
        self.fps = float(self._drawn.metadata.get("render_fps", DEFAULT_FPS))

    def frame(self, state: Any, i: int = 0) -> Picture:
        """See `Renderer`; whoever can look into several directions looks into the first one."""
        self._drawn.s, self._drawn.lastaction = int(state.number[i]), None
        with headless():
            return np.array(self._drawn.render())

    def close(self) -> None:
        """Close the environment that draws."""
        self._drawn.close()


class HostRenderer:
    """Pictures of an environment on the host: `env` is one more of them, that draws."""

    live = True

    def __init__(self, env: Any) -> None:
        """Make the environment and see that it gives pictures.

        Raises:
            MissingLibraryError: what it draws with is not there.
            TypeError, ValueError: it was not made from a registered id, or draws nothing.
        """
        options = {"disable_env_checker": True, **env.params, "render_mode": "rgb_array"}
        try:
            with headless():
                self._camera = _Camera(gymnasium.make(env.name, **options))
                self._camera.reset(seed=0)
                first = self._camera.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise MissingLibraryError(str(error)) from None
        except gymnasium.error.Error as error:
            raise ValueError(str(error)) from None
        if not isinstance(first, np.ndarray):
            raise ValueError(f"{env.name} draws no pictures")
        self.env = from_gymnasium(lambda: self._camera)
        self.fps = float(self._camera.metadata.get("render_fps", DEFAULT_FPS))

    def frame(self, state: Any = None, i: int = 0) -> Picture:
        """What the camera sees; where an episode has just ended, its end."""
        with headless():
            seen = self._camera.render() if self._camera.last is None else self._camera.last
        return np.array(seen)

    def close(self) -> None:
        """Close the environment that draws."""
        self.env.close()
        self._camera.close()


class _Camera(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps the last picture of an episode: its end is followed by a reset at once."""

    over, last = False, None

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self.over = result[2] or result[3]
        return result

    def reset(self, **options: Any) -> Any:
        self.last = self.env.render() if self.over else None
        self.over = False
        return super().reset(**options)


def _drawing(env_id: str, arguments: Mapping[str, Any]) -> Any:
    """Gymnasium's environment, unwrapped, that gives its pictures as arrays."""
    with headless():
        try:
            import pygame  # noqa: F401
        except ImportError:
            raise MissingLibraryError(f"pygame is not installed: {INSTALL}") from None
        env = gymnasium.make(
            env_id, render_mode="rgb_array", disable_env_checker=True, **arguments
        ).unwrapped
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        raise ValueError(f"{env_id} draws no pictures")
    return env


class GridRenderer:
    """A tabular environment as a grid of states: the agent a disc, terminal states filled.

    The states stand in the order of the table, in rows as `grid_shape` of the environment says, or
    of GRID_COLUMNS.
    """

    fps, live = DEFAULT_FPS, False
    WHITE, LINE, AGENT, TERMINAL = (255, 255, 255), (208, 215, 222), (0, 114, 178), (0, 158, 115)
    CELL = 20
    """Side of a cell in pixels, with the line on its left."""

    def __init__(self, env: TabularEnv) -> None:
        self.env = env
        terminal = env.mdp().terminal.cpu().numpy()
        shape: tuple[int, int] | None = getattr(env, "grid_shape", None)
        columns = shape[1] if shape else min(len(terminal), GRID_COLUMNS)
        rows = -(-len(terminal) // columns)
        self._columns = columns
        self._empty = np.full((rows * self.CELL + 1, columns * self.CELL + 1, 3), self.WHITE, "u1")
        for cell in range(len(terminal)):
            y, x = self._corner(cell)
            self._empty[y : y + self.CELL + 1, x : x + self.CELL + 1] = self.LINE
            inside = self.TERMINAL if terminal[cell] else self.WHITE
            self._empty[y + 1 : y + self.CELL, x + 1 : x + self.CELL] = inside
        offset = np.arange(1, self.CELL) - self.CELL / 2
        self._disc = np.hypot(offset[:, None], offset) <= self.CELL / 3

    def _corner(self, cell: int) -> tuple[int, int]:
        """Top and left of a cell."""
        return cell // self._columns * self.CELL, cell % self._columns * self.CELL

    def frame(self, state: Any, i: int = 0) -> Picture:
        """See `Renderer`."""
        one = type(state)(*(tensor[i : i + 1] for tensor in state))
        y, x = self._corner(int(self.env.state_index(self.env.observe(one))))
        picture = self._empty.copy()
        picture[y + 1 : y + self.CELL, x + 1 : x + self.CELL][self._disc] = self.AGENT
        return picture

    def close(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def headless() -> Iterator[None]:
    """Let pygame, in here, ask for no display and warn of nothing. Gymnasium hides its banner."""
    before = os.environ.get("SDL_VIDEODRIVER")
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ["SDL_VIDEODRIVER"]
        else:
            os.environ["SDL_VIDEODRIVER"] = before
