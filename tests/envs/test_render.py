"""Pictures show the state: with Gymnasium's own pixels, and as grids."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.envs import Acrobot, CartPole, LineWorld, MountainCar, TensorEnv, make_env
from dqn_fast.envs.render import MissingLibraryError, Renderer, headless

with headless():
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("pygame")


class DotState(NamedTuple):
    place: Tensor
    heat: Tensor


@dataclass(frozen=True)
class Dot(TensorEnv):
    """A dot that goes right along five places and draws nothing."""

    max_steps: int = 9
    num_actions: ClassVar[int] = 2

    def reset(self, noise: Tensor) -> DotState:
        return DotState(torch.zeros(len(noise)).long(), torch.zeros(len(noise), 2))

    def step(self, state: DotState, action: Tensor, noise: Tensor) -> Any:
        place = state.place + 1
        return DotState(place, state.heat + 1), torch.ones(len(place)), place >= 4

    def observe(self, state: DotState) -> Tensor:
        return state.place[:, None].float()


@dataclass(frozen=True)
class DrawnDot(Dot):
    """The same with a picture of 1 x 5 pixels."""

    render_fps: ClassVar[float] = 7.0

    def render(self, state: DotState) -> NDArray[np.uint8]:
        assert state.place.shape == ()
        assert state.heat.shape == (2,)
        picture = np.zeros((1, 5, 3), np.uint8)
        picture[0, state.place] = 255
        return picture


def original(env_id: str, **arguments: Any) -> Any:
    with headless():
        return gymnasium.make(env_id, render_mode="rgb_array", **arguments)


def picture(env: Any) -> NDArray[np.uint8]:
    with headless():
        return np.array(env.unwrapped.render())


@pytest.mark.parametrize(
    "env", [CartPole(), MountainCar(), Acrobot()], ids=lambda e: e.gymnasium_id
)
def test_pixels_are_gymnasiums(env):
    """Copy i of a batch looks exactly as the original does in the same state, along a walk."""
    theirs = original(env.gymnasium_id)
    theirs.reset(seed=1)
    ours = Renderer(env)
    assert ours.fps == theirs.metadata["render_fps"]
    kind = type(env.reset(torch.zeros(1, 4)))
    pictures = []
    for _ in range(8):
        state = np.array(theirs.unwrapped.state, np.float32)
        batch = torch.from_numpy(np.stack([state + 9, state, state - 9]))
        theirs.unwrapped.state = state.astype(np.float64)
        pictures.append(picture(theirs))
        np.testing.assert_array_equal(ours.frame(kind(batch), 1), pictures[-1])
        theirs.step(env.num_actions - 1)
    assert len({drawn.tobytes() for drawn in pictures}) > 4
    ours.close()
    theirs.close()


def cart_column(env: CartPole, x: float) -> float:
    """Where the middle of the cart is drawn, from its black pixels below the axle."""
    drawn = Renderer(env).frame(type(env.reset(torch.zeros(1, 4)))(torch.tensor([[x, 0, 0, 0.0]])))
    (columns,) = np.nonzero((drawn[310] == 0).all(-1))
    return columns.mean()


def test_parameters_reach_the_picture():
    """The cart stands where x says, on a track as wide as x_threshold; longer poles are longer."""
    assert cart_column(CartPole(), 1.2) == pytest.approx(450, abs=1)
    assert cart_column(CartPole(x_threshold=4.8), 1.2) == pytest.approx(375, abs=1)
    poles = []
    for env in (CartPole(), CartPole(length=0.8)):
        drawn = Renderer(env).frame(env.reset(torch.full((1, 4), 0.5)))
        poles.append((drawn == (202, 152, 101)).all(-1).any(1).sum())
    assert poles[1] / poles[0] == pytest.approx(1.6, abs=0.1)
    env = Acrobot(link_length_1=0.5)
    drawn = Renderer(env).frame(env.reset(torch.full((1, 4), 0.5)))
    assert not np.array_equal(drawn, Renderer(Acrobot()).frame(env.reset(torch.full((1, 4), 0.5))))


@pytest.mark.parametrize(
    ("env_id", "arguments"),
    [
        ("FrozenLake-v1", {"is_slippery": False}),
        ("FrozenLake8x8-v1", {}),
        ("CliffWalking-v1", {}),
        ("Taxi-v4" if "Taxi-v4" in gymnasium.registry else "Taxi-v3", {}),
    ],
)
def test_tables_look_as_in_gymnasium(env_id, arguments):
    """A state of the table is drawn as the original draws it, at any place of a batch."""
    theirs = original(env_id, **arguments)
    theirs.reset(seed=3)
    env = make_env(env_id, arguments)
    ours = Renderer(env)
    kind = type(env.states())
    shown = []
    for step in range(8):
        state = int(theirs.unwrapped.s)
        theirs.unwrapped.lastaction = None
        shown.append(picture(theirs))
        np.testing.assert_array_equal(ours.frame(kind(torch.tensor([0, state])), 1), shown[-1])
        theirs.step(step % env.num_actions)
    assert len({drawn.tobytes() for drawn in shown}) > 2
    ours.close()
    theirs.close()


def filled(drawn: NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[float, float]:
    """Middle of all pixels of a colour: row, column."""
    rows, columns = np.nonzero((drawn == colour).all(-1))
    return rows.mean(), columns.mean()


def test_line_world_is_a_row_of_cells():
    """The agent is in the middle of its own cell, the goal in the last, and nothing else moves."""
    env = LineWorld(n_states=7)
    draws = Renderer(env)
    size = Renderer.CELL
    pictures = [draws.frame(env.states(), i) for i in range(7)]
    assert pictures[0].shape == (size + 1, 7 * size + 1, 3)
    assert pictures[0].dtype == np.uint8
    for i, drawn in enumerate(pictures):
        assert filled(drawn, Renderer.AGENT) == (size / 2, (i + 0.5) * size)
        away = drawn.reshape(-1, 3)[(drawn == pictures[i - 1]).all(-1).flatten()]
        assert len(away) > 0.8 * drawn[..., 0].size
    assert filled(pictures[0], Renderer.TERMINAL) == (size / 2, 6.5 * size)
    np.testing.assert_array_equal(pictures[2], draws.frame(env.states(), 2))


def test_states_fill_rows():
    """Many states wrap; an environment that knows its shape is drawn in it."""
    env = LineWorld(n_states=40)
    size = Renderer.CELL
    assert Renderer(env).frame(env.states(), 0).shape == (2 * size + 1, 32 * size + 1, 3)
    assert filled(Renderer(env).frame(env.states(), 33), Renderer.AGENT) == (
        1.5 * size,
        1.5 * size,
    )

    class Grid(LineWorld):
        grid_shape = (5, 8)

    drawn = Renderer(Grid(n_states=40)).frame(env.states(), 19)
    assert drawn.shape == (5 * size + 1, 8 * size + 1, 3)
    assert filled(drawn, Renderer.AGENT) == (2.5 * size, 3.5 * size)


def test_an_own_method_draws_one_copy():
    """`render` gets one copy's state without the leading axis; `render_fps` is how fast it is."""
    draws = Renderer(DrawnDot())
    state = DotState(torch.tensor([0, 3]), torch.zeros(2, 2))
    assert draws.frame(state, 1)[0, :, 0].tolist() == [0, 0, 0, 255, 0]
    assert draws.fps == 7.0
    with pytest.raises(ValueError, match=r"Dot cannot be drawn; give it a method render"):
        Renderer(Dot())


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_an_own_picture_is_checked(wrong):
    """The message names any dtype and shape but uint8 [H, W, 3]."""

    class Wrong(Dot):
        def render(self, state: DotState) -> Any:
            return wrong

    env = Wrong()
    with pytest.raises(ValueError, match=r"Wrong\.render must give uint8 \[H, W, 3\], got"):
        Renderer(env).frame(env.reset(torch.zeros(1, 0)))


def test_without_pygame(monkeypatch):
    """For Gymnasium's pictures the error names the library; tables and LineWorld become grids."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(MissingLibraryError, match=r'pip install -e "\.\[video\]"'):
        Renderer(CartPole())
    with pytest.raises(MissingLibraryError, match="pygame"):
        Renderer(make_env("gym:CartPole-v1"))
    for env in (make_env("FrozenLake-v1"), LineWorld(n_states=16)):
        drawn = Renderer(env).frame(env.states())
        assert filled(drawn, Renderer.AGENT) == (Renderer.CELL / 2, Renderer.CELL / 2)


def test_silent_without_display():
    """Needs no display, prints nothing, imports late and leaves os.environ as it was."""
    code = """
import os, sys
import dqn_fast.film
from dqn_fast.envs import CartPole
from dqn_fast.envs.render import Renderer
heavy = {"pygame", "PIL", "imageio_ffmpeg"} & set(sys.modules)
assert not heavy, heavy
import torch
draws = Renderer(CartPole())
assert draws.frame(CartPole().reset(torch.zeros(1, 4))).shape == (400, 600, 3)
draws.close()
assert os.environ["SDL_VIDEODRIVER"] == "nonsense"
"""
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR", "PYGAME_HIDE_SUPPORT_PROMPT")
    surroundings = {name: value for name, value in os.environ.items() if name not in hidden}
    surroundings["SDL_VIDEODRIVER"] = "nonsense"
    done = subprocess.run(
        [sys.executable, "-c", code], env=surroundings, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
