"""Pictures of environments, without a display.

`Renderer(env)` finds out how an environment can be drawn: by its own method `render`, by the
Gymnasium environment that it is or whose dynamics it has, or as a grid of states if it is tabular.

A method is all that an environment of your own needs:

    def render(self, state) -> NDArray[np.uint8]:
        # One copy's state, tensors on the CPU without the leading axis E; a picture [H, W, 3].
        picture = np.full((10, 10, 3), 255, np.uint8)
        picture[state.row, state.column] = 0
        return picture

Small pictures are enlarged in films. The attribute `render_fps`, a number, says how many steps of
the environment make a second.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from dqn_fast.envs.core import TabularEnv, TensorEnv
from dqn_fast.envs.from_gymnasium import from_gymnasium
from dqn_fast.envs.spaces import describe_error, describe_value, shorten
from dqn_fast.envs.tabular import GymTable

Picture = NDArray[np.uint8]
"""Red, green and blue in 0 .. 255, [H, W, 3], the top row first."""

INSTALL = 'pip install -e ".[video]"'
DEFAULT_FPS = 10.0
GRID_COLUMNS = 32
"""Cells in a row of states, unless the environment has a `grid_shape`."""


class MissingLibraryError(ValueError):
    """Pictures need a library that is not installed; the message says how to install it."""


class UndrawableError(ValueError):
    """An environment gives no pictures; the message names it and what was tried."""


class Renderer:
    """Draws the copies of one environment.

    Attributes:
        env: the environment to play. On the host it is one more copy, with a camera.
        fps: steps of the environment in a second of its own time.
        live: pictures show what `env` does now; `frame` does not read the state then.

    Raises:
        MissingLibraryError: a library is not installed.
        ValueError: nothing can draw the environment; the message says what is needed.
    """

    WHITE, LINE, AGENT, TERMINAL = (255, 255, 255), (208, 215, 222), (0, 114, 178), (0, 158, 115)
    CELL: ClassVar[int] = 20
    """Side of a grid's cell in pixels, with the line on its left."""

    def __init__(self, env: TensorEnv) -> None:
        self.env, self.fps, self.live = env, DEFAULT_FPS, False
        self._drawn: Any = None  # Gymnasium's environment that draws
        draw: Callable[[Any, int], Picture] | None = None
        if callable(getattr(env, "render", None)):
            draw, self.fps = self._draw_own, float(getattr(env, "render_fps", DEFAULT_FPS))
        elif env.on_host:
            draw, self.live = self._draw_camera, True
            self._drawn = camera = _open_camera(env)
            self.env = from_gymnasium(lambda: camera)
        elif isinstance(env, GymTable):
            arguments = {name: value for name, value in env.params.items() if name != "max_steps"}
            # Without pygame, or if the environment draws nothing, it becomes a grid.
            with contextlib.suppress(MissingLibraryError, TypeError, ValueError):
                self._drawn = _make_drawing(env.env_id, arguments)
                draw = self._draw_table
        elif hasattr(env, "gymnasium_id"):
            draw, self._drawn = self._draw_classic, _make_drawing(env.gymnasium_id, {})
            for name, value in env.params.items():
                for attribute in (name, name.upper()):  # Acrobot's lengths are class constants
                    if hasattr(self._drawn, attribute):
                        setattr(self._drawn, attribute, value)
        if draw is None and isinstance(env, TabularEnv):
            draw = self._draw_grid
            self._make_grid(env)
        if draw is None:
            raise ValueError(
                f"{type(env).__name__} cannot be drawn; give it a method render(self, state) that "
                "returns a picture, uint8 [H, W, 3], of one copy's state"
            )
        if self._drawn is not None:
            fps = self._drawn.metadata.get("render_fps")
            is_number = isinstance(fps, int | float | np.number) and 0 < fps < math.inf
            self.fps = float(fps) if is_number else DEFAULT_FPS
        self._draw = draw

    def frame(self, state: Any = None, i: int = 0) -> Picture:
        """Picture of copy `i` of an environment state, a NamedTuple of tensors [E, ...].

        Raises:
            ValueError: the environment returns no picture.
        """
        return self._draw(state, i)

    def close(self) -> None:
        """Close the environment that draws."""
        if isinstance(self._drawn, _Camera):
            self._drawn.may_close = True
        if self.live:
            self.env.close()
        if self._drawn is not None:
            with contextlib.suppress(Exception):  # the film is made
                self._drawn.close()

    def _draw_own(self, state: Any, i: int) -> Picture:
        """By the environment's method `render`."""
        env: Any = self.env
        picture = np.asarray(env.render(type(state)(*(t[i].cpu() for t in state))))
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"{type(env).__name__}.render must give uint8 [H, W, 3], "
                f"got {picture.dtype} {list(picture.shape)}"
            )
        return picture

    def _draw_camera(self, state: Any, i: int) -> Picture:
        """By the environment itself; after the end of an episode, its last picture."""
        last = self._drawn.last
        return self._picture() if last is None else last

    def _draw_classic(self, state: Any, i: int) -> Picture:
        """By Gymnasium's environment with the same dynamics, set to the same state.

        `gymnasium_id` names it, `gymnasium_state` converts the state, and the parameters say how
        the environment differs from the standard.
        """
        env: Any = self.env
        self._drawn.state = env.gymnasium_state(state)[i]
        return self._picture()

    def _draw_table(self, state: Any, i: int) -> Picture:
        """By Gymnasium's environment that the table is of. An agent that can face several
        directions is drawn facing the first."""
        self._drawn.s, self._drawn.lastaction = int(state.number[i]), None
        return self._picture()

    def _picture(self) -> Picture:
        return _picture_of(self._drawn)

    def _draw_grid(self, state: Any, i: int) -> Picture:
        """By a grid of states in the order of the table: the agent is a disc, terminal states are
        filled."""
        env: Any = self.env
        one = type(state)(*(tensor[i : i + 1] for tensor in state))
        y, x = self._corner(int(env.state_index(env.observe(one))))
        picture = self._grid.copy()
        picture[y + 1 : y + self.CELL, x + 1 : x + self.CELL][self._disc] = self.AGENT
        return picture

    def _make_grid(self, env: TabularEnv) -> None:
        """Draw the grid without the agent; its rows are as in `grid_shape`."""
        terminal = env.mdp().terminal.cpu().numpy()
        shape = env.grid_shape
        self._columns = shape[1] if shape else min(len(terminal), GRID_COLUMNS)
        rows = -(-len(terminal) // self._columns)
        size = (rows * self.CELL + 1, self._columns * self.CELL + 1, 3)
        self._grid = np.full(size, self.WHITE, np.uint8)
        for cell in range(len(terminal)):
            y, x = self._corner(cell)
            self._grid[y : y + self.CELL + 1, x : x + self.CELL + 1] = self.LINE
            inside = self.TERMINAL if terminal[cell] else self.WHITE
            self._grid[y + 1 : y + self.CELL, x + 1 : x + self.CELL] = inside
        offset = np.arange(1, self.CELL) - self.CELL / 2
        self._disc = np.hypot(offset[:, None], offset) <= self.CELL / 3

    def _corner(self, cell: int) -> tuple[int, int]:
        """Top and left of a cell in pixels."""
        return cell // self._columns * self.CELL, cell % self._columns * self.CELL


class _Camera(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps the last picture of an episode, because a reset follows at once.

    It stays open until the film is made: to close one copy may end the library that draws others.
    """

    is_over, last, may_close = False, None, False

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self.is_over = result[2] or result[3]
        return result

    def reset(self, **options: Any) -> Any:
        self.last = _picture_of(self.env) if self.is_over else None
        self.is_over = False
        return super().reset(**options)

    def close(self) -> None:
        if self.may_close:
            super().close()


def _open_camera(env: Any) -> _Camera:
    """One more copy of an environment on the host, which gives pictures."""
    tried = []
    for mode, make in env.cameras():
        made = None
        try:
            with headless():
                made = make()
                camera = _Camera(made)
                camera.reset(seed=0)
                _picture_of(camera)
                return camera
        except gymnasium.error.DependencyNotInstalled as missing:
            raise MissingLibraryError(shorten(str(missing))) from None
        except Exception as error:
            why = str(error) if isinstance(error, UndrawableError) else describe_error(error)
            tried.append(f"{mode}: {why}")
            if made is not None:
                with contextlib.suppress(Exception):
                    made.close()
    has = ", ".join(env.render_modes) or "none"
    raise UndrawableError(
        f"{env.name} cannot be drawn; it needs the render mode rgb_array and has {has} "
        f"({'; '.join(tried) or 'no single environment without a window can be made'})"
    )


def _picture_of(env: Any) -> Picture:
    """What an environment's `render` gives, as a picture."""
    with headless():
        try:
            given = env.render()
        except gymnasium.error.DependencyNotInstalled:
            raise
        except Exception as error:
            raise UndrawableError(f"render raised {describe_error(error)}") from error
    return as_picture(given)


def as_picture(given: Any) -> Picture:
    """A picture as environments give it, as uint8 [H, W, 3].

    Args:
        given: uint8, bool, other whole numbers in 0 .. 255, or floats, in 0 .. 1 if none is larger;
            [H, W], or [H, W, C] or [C, H, W] with 1, 3 or 4 channels. Of a list, its last picture.

    Raises:
        UndrawableError: it is something else.
    """
    value = given[-1] if isinstance(given, list | tuple) and given else given
    array = np.asarray(value) if hasattr(value, "__array__") else np.empty(0, object)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    array = array[..., None] if array.ndim == 2 else array
    is_picture = array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.size > 0
    if not is_picture or array.dtype.kind not in "biuf":
        raise UndrawableError(f"render gave {describe_value(value)}, no picture [H, W, 3]")
    array = np.broadcast_to(array[..., :3], (*array.shape[:2], 3))
    if array.dtype.kind == "f":
        array = np.nan_to_num(array, nan=0.0)
        array = np.rint(array * 255.0 if array.max() <= 1.0 else array)
    elif array.dtype == np.bool_:
        array = array * np.uint8(255)
    return np.array(np.clip(array, 0, 255), np.uint8)


def _make_drawing(env_id: str, arguments: Mapping[str, Any]) -> Any:
    """Gymnasium's environment, unwrapped, which gives its pictures as arrays."""
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


@contextlib.contextmanager
def headless() -> Iterator[None]:
    """Keep pygame from opening a display and from warnings; Gymnasium hides its banner."""
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
