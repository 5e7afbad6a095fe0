"""Films: their moments and episodes, the pictures and the words below them, the files."""

from __future__ import annotations

import base64
import html
import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch

from dqn_fast import film
from dqn_fast.agent import Agent
from dqn_fast.dqn import QFunction
from dqn_fast.envs import LineWorld, TensorEnv, make_env
from dqn_fast.envs.from_gymnasium import from_gymnasium
from dqn_fast.envs.render import headless
from dqn_fast.evaluate import main, play_episodes
from dqn_fast.film import (
    EVALUATION_EPOCH,
    Moment,
    Shot,
    annotate,
    encode_gif,
    play,
    ready,
    record,
)
from dqn_fast.heads import ScalarHead
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.train import Args, train

Image = pytest.importorskip("PIL.Image")
SMALL = {"total_timesteps": 2_000, "eval_episodes": 5, "quiet": True}


def agent(env: TensorEnv, *bias: float, members: int = 1, member: int = 0) -> Agent:
    """An agent whose values are `bias` in every state."""
    obs = env.vector_reset(torch.zeros(1, env.reset_noise_dim)).obs
    network = QNetwork((env.features(obs).shape[-1], env.num_actions))
    params = network.init(Noise(0, members))
    with torch.no_grad():
        params[0].zero_()
        params[1].copy_(torch.tensor(bias).expand_as(params[1]))
    q_net = QFunction(network, ScalarHead(), params)
    return Agent(env, q_net, member, [0] * members, [0.0] * members)


def decoded(content: bytes | Path) -> list[Any]:
    """The pictures of a GIF as arrays."""
    from PIL import Image, ImageSequence

    with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as film:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]


def shot(picture: Any, *q_values: float, step: int = 0, ending: str = "") -> Shot:
    return Shot(picture, Moment(None, np.array(q_values, np.float32), step, 1.0, ending))


# ------------------------------------------------------------------------------------- moments


def test_every_step_and_the_end():
    """15 states on the way to the goal: returns add up, and the last one is the goal itself."""
    right = agent(LineWorld(), 0.0, 1.0)
    moments = list(play(right, right.env, 0, 0, 500))
    assert [int(m.state.position) for m in moments] == list(range(15))
    assert [m.step for m in moments] == list(range(15))
    assert [m.ending for m in moments] == [""] * 14 + ["terminated"]
    assert moments[-2].episode_return == pytest.approx(-0.13)
    assert moments[-1].episode_return == pytest.approx(0.86)
    assert moments[3].q_values.tolist() == [0.0, 1.0]


def test_time_limit_and_cut():
    """An agent that never arrives is stopped by the environment, or earlier by the film."""
    left = agent(LineWorld(max_steps=20), 1.0, 0.0)
    assert [m.ending for m in play(left, left.env, 0, 0, 500)] == [""] * 20 + ["truncated"]
    assert [m.ending for m in play(left, left.env, 0, 0, 20)] == [""] * 20 + ["truncated"]
    assert [m.ending for m in play(left, left.env, 0, 0, 7)] == [""] * 7 + ["cut"]


@pytest.mark.parametrize("env", [LineWorld(slip_prob=0.3), make_env("CartPole-v1")], ids=str)
def test_the_film_shows_the_evaluation(env):
    """Episodes 0, 1, 2 of each member are those of `play_episodes` with the same seed."""
    bias = (0.0, 1.0)
    two = agent(env, *bias, members=2)
    result = play_episodes(env, two.q_net, 5, Noise(4, 2), EVALUATION_EPOCH)
    lengths = set()
    for member in (0, 1):
        for episode in range(3):
            player = agent(env, *bias, members=2, member=member)
            *_, last = play(player, env, episode, 4, 500)
            assert last.step == result.episode_length[member, episode]
            assert last.episode_return == pytest.approx(
                float(result.episode_return[member, episode]), abs=1e-5
            )
            lengths.add(last.step)
    assert len(lengths) > 1


def test_an_environment_on_the_host_is_filmed_to_its_end():
    """One picture for each state, the last one too, although a reset follows at once; the same
    episodes as in an evaluation."""

    class Counter(gymnasium.Env):
        """Ends after as many steps as its seed says; its picture is the number of steps."""

        metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 3}
        observation_space = gymnasium.spaces.Box(0, 100, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def __init__(self, render_mode: str | None = None, bonus: int = 0) -> None:
            self.render_mode, self.bonus = render_mode, bonus

        def reset(self, **options: Any) -> Any:
            super().reset(seed=options.get("seed"))
            self.count, self.end = 0, 5 + self.bonus + int(self.np_random.integers(9))
            return np.array([0.0], np.float32), {}

        def step(self, action: int) -> Any:
            self.count += 1
            return np.array([self.count], np.float32), 1.0, self.count == self.end, False, {}

        def render(self) -> Any:
            return np.full((4, 4, 3), self.count, np.uint8)

    gymnasium.register("Counter-v0", Counter)
    try:
        env = make_env("gym:Counter-v0", {"bonus": 2})
        player = agent(env, 0.0, 1.0)
        draws = ready(player, Path("x.gif"))
        expected = play_episodes(
            env.for_evaluation(), player.q_net, 4, Noise(1, 1), EVALUATION_EPOCH
        )
        seen = []
        for episode in range(4):
            moments = []
            for moment in play(player, draws.env, episode, 1, 500):
                moments.append(moment)
                seen.append(int(draws.frame()[0, 0, 0]))
            length = int(expected.episode_length[0, episode])
            assert seen[-length - 1 :] == list(range(length + 1))
            assert moments[-1][2:] == (length, float(length), "terminated")
        assert draws.fps == 3
        draws.close()
        env.close()
    finally:
        del gymnasium.registry["Counter-v0"]


# ------------------------------------------------------------------------------------ recording


def test_a_picture_of_each_step(tmp_path):
    """n steps make n + 1 pictures; the film runs for ever and rests at the end of an episode."""
    right = agent(LineWorld(), 0.0, 1.0)
    path = tmp_path / "film.gif"
    assert record(right, ready(right, path), path) == 15
    assert len(decoded(path)) == 15
    with Image.open(path) as film:
        assert film.is_animated
        assert film.info["loop"] == 0
        durations = []
        for i in range(15):
            film.seek(i)
            durations.append(film.info["duration"])
    assert durations == [100] * 14 + [1000]
    assert [p.name for p in tmp_path.iterdir()] == ["film.gif"]
    assert record(right, ready(right, path), path, episodes=3, max_steps=5) == 18
    assert len(decoded(path)) == 18


def test_pictures_are_left_out_evenly(tmp_path, monkeypatch):
    """Of two times 390 steps few are shown, evenly spaced, with the start and end of both."""
    left = agent(LineWorld(max_steps=390), 1.0, 0.0)
    kept: list[Shot] = []
    monkeypatch.setattr(film, "annotate", lambda shots, width: kept.extend(shots) or [width])
    monkeypatch.setattr(film, "encode_gif", lambda images, seconds, holds: b"")
    path = tmp_path / "film.gif"
    assert record(left, ready(left, path), path, episodes=2, max_frames=30) <= 31
    steps = [s.moment.step for s in kept]
    (second,) = np.flatnonzero(np.diff(steps) < 0) + 1
    assert len(steps) >= 15
    for part in (steps[:second], steps[second:]):
        assert (part[0], part[-1]) == (0, 390)
        assert set(np.diff(part)) <= {steps[1], 390 - part[-2]}


def test_a_film_is_written_whole_or_not_at_all(tmp_path):
    """If the file cannot be written, nothing is left behind."""
    path = tmp_path / "film.gif"
    path.mkdir()
    right = agent(LineWorld(), 0.0, 1.0)
    with pytest.raises(OSError):
        record(right, ready(right, path), path)
    assert [p.name for p in tmp_path.iterdir()] == ["film.gif"]


def test_mp4(tmp_path):
    """The film has all pictures, and the last one rests for a second."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    right = agent(LineWorld(), 0.0, 1.0)
    path = tmp_path / "film.mp4"
    assert record(right, ready(right, path), path) == 15
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert frames == 14 + 10
    assert seconds == pytest.approx(2.4, abs=0.11)


class Window(gymnasium.Env):
    """Its pictures come from a library that ends when any copy that has drawn is closed, as that of
    Blackjack; what `render` gives and which modes it has is set by the test."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human", "rgb_array"]}
    observation_space = gymnasium.spaces.Box(0, 100, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    is_open = False
    picture: ClassVar[Any] = None

    def __init__(self, render_mode: str | None = None) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise AssertionError
        self.render_mode, self.has_drawn = render_mode, False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.count = 0
        return np.array([0.0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return np.array([self.count], np.float32), 1.0, self.count == 3, False, {}

    def render(self) -> Any:
        if not self.has_drawn:
            Window.is_open = self.has_drawn = True
        if not Window.is_open:
            raise RuntimeError("font not initialized")
        return self.picture

    def close(self) -> None:
        if self.has_drawn:
            Window.is_open = False


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setattr(Window, "picture", np.zeros((5, 7, 3), np.uint8))
    gymnasium.register("Window-v0", Window)
    yield
    del gymnasium.registry["Window-v0"]


def run_of(env_id: str, folder: Path, **settings: Any) -> Any:
    few = {"num_envs": 2, "batch_size": 16, "learning_starts": 16, "total_timesteps": 64}
    args = Args(env_id=env_id, run_dir=folder, eval_episodes=3, quiet=True, **few, **settings)
    return train(args)


def evaluated(monkeypatch, *argv: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, argv)])
    return main()


def test_closing_one_copy_breaks_no_film(window, tmp_path, monkeypatch, capsys):
    """The film's copy stays open until the film is made, and is closed then."""
    run_of("Window-v0", tmp_path / "run", report=False)
    film_path = tmp_path / "x.gif"
    assert evaluated(monkeypatch, tmp_path / "run", "--episodes", 5, "--video", film_path) == 0
    assert len(decoded(film_path)) == 4
    assert not Window.is_open
    env = from_gymnasium(partial(Window, "rgb_array"))  # evaluation's copies can draw, too
    draws = ready(agent(env, 0.0, 1.0), film_path)
    play_episodes(env.for_evaluation(), agent(env, 0.0, 1.0).q_net, 2, Noise(0, 1))
    assert record(agent(env, 0.0, 1.0), draws, film_path) == 4
    draws.close()
    env.close()


def test_what_refuses_to_be_drawn_is_one_line(window, tmp_path, monkeypatch, capsys):
    """A bare assert against rgb_array: training warns, and --video is exit status 2 with the id and
    the modes that there are."""
    monkeypatch.setattr(Window, "metadata", {"render_modes": ["human"]})
    run_of("Window-v0", tmp_path / "run", report=True)
    text = "Window-v0 cannot be drawn; it needs the render mode rgb_array and has human "
    text += "(rgb_array: AssertionError)"
    assert capsys.readouterr().err == f"warning: no agent.gif: {text}\n"
    flags = ["--episodes", 1, "--video", tmp_path / "x.gif"]
    assert evaluated(monkeypatch, tmp_path / "run", *flags) == 2
    assert capsys.readouterr().err == f"error: --video {tmp_path / 'x.gif'}: {text}\n"


def test_a_film_that_breaks_off_is_one_line(window, tmp_path, monkeypatch, capsys):
    """After the figures; nothing is written."""
    run_of("Window-v0", tmp_path / "run", report=False)
    step = Window.step

    def lose_the_library(env: Any, action: Any) -> Any:
        Window.is_open = False
        return step(env, action)

    monkeypatch.setattr(Window, "step", lose_the_library)
    flags = ["--episodes", 1, "--video", tmp_path / "x.gif"]
    assert evaluated(monkeypatch, tmp_path / "run", *flags) == 2
    message = "render raised RuntimeError: font not initialized"
    assert capsys.readouterr().err == f"error: --video {tmp_path / 'x.gif'}: {message}\n"
    assert not (tmp_path / "x.gif").exists()


@pytest.mark.parametrize("kind", ["uint8", "float", "gray", "list", "channels first", "alpha"])
def test_odd_pictures_are_filmed(window, tmp_path, monkeypatch, kind):
    """Floats, one channel, a list of pictures, channels first, four channels; odd sides."""
    grey = np.full((5, 7, 3), 51, np.uint8)
    given = {
        "uint8": grey, "float": grey / 255.0, "gray": grey[..., 0], "list": [grey * 0, grey],
        "channels first": grey.transpose(2, 0, 1), "alpha": np.dstack([grey, grey[..., :1]]),
    }[kind]  # fmt: skip
    monkeypatch.setattr(Window, "picture", given)
    env = make_env("Window-v0")
    player = agent(env, 0.0, 1.0)
    draws = ready(player, tmp_path / "x.gif")
    assert record(player, draws, tmp_path / "x.gif") == 4
    np.testing.assert_array_equal(draws.frame(), grey)
    draws.close()
    env.close()


def test_without_an_evaluation_the_last_agent_is_filmed(tmp_path):
    """--eval-episodes 0 leaves no best agent."""
    args = Args(run_dir=tmp_path / "run", **(SMALL | {"eval_episodes": 0}))
    result = train(args)
    assert result.summary["eval_return_mean"] is None
    assert not (tmp_path / "run" / "best.pt").exists()
    assert len(decoded(tmp_path / "run" / "agent.gif")) >= 2
    assert (tmp_path / "run" / "report.html").exists()


# ------------------------------------------------------------------------------- single pictures


def pixels(image: Any, colour: tuple[int, int, int]) -> Any:
    """Rows that have the colour."""
    return np.flatnonzero((np.asarray(image) == colour).all(-1).any(1))


def test_values_stand_below_the_picture():
    """The greedy action's bar is blue and lies in its own row; at the end none is chosen."""
    picture = np.full((200, 300, 3), 255, np.uint8)
    shots = [shot(picture, 1.0, 3.0, 2.0), shot(picture, 3.0, 0.5, 2.0), shot(picture, 1, 2, 3)]
    shots += [shot(picture, 1, 2, 3, ending=ending) for ending in ("terminated", "cut")]
    images = annotate(shots)
    assert len({image.size for image in images}) == 1
    middles = [pixels(image, film._CHOSEN).mean() for image in images[:3]]
    assert 200 < middles[1] < middles[0] < middles[2] < images[0].height
    assert np.diff(sorted(middles)).tolist() == [film._LINE] * 2
    for image in images[3:]:
        assert not len(pixels(image, film._CHOSEN))
    assert not len(pixels(images[3], film._SOFT))
    assert len(pixels(images[4], film._SOFT))


def test_many_actions_fit():
    """18 actions, as in Atari games, stand in columns of six, all of them inside."""
    picture = np.zeros((210, 160, 3), np.uint8)
    (image,) = annotate([shot(picture, *np.arange(18.0))])
    assert image.width >= 450
    assert image.height <= 210 + 7 * film._LINE + 2 * film._MARGIN + 1
    assert pixels(image, film._SOFT)[-1] < image.height - 2


def test_pictures_are_scaled():
    """Tiny ones are enlarged in whole pixels, wide ones made smaller, odd sides made even."""
    tiny = np.zeros((10, 8, 3), np.uint8)
    tiny[3, 2] = 200
    (image,) = annotate([shot(tiny, 0.0, 1.0)])
    rows, _ = np.nonzero((np.asarray(image) == 200).all(-1))
    assert len(rows) == 16 * 16
    assert rows.min() == 3 * 16
    (image,) = annotate([shot(np.zeros((401, 599, 3), np.uint8), 0.0)], max_width=320)
    assert 300 <= image.width <= 320
    assert image.width % 2 == image.height % 2 == 0


def test_drawings_keep_their_colours():
    """A GIF has 256 colours: those of drawings are exact, those of photographs nearly."""
    right = agent(LineWorld(), 0.0, 1.0)
    draws = ready(right, Path("x.gif"))
    shots = [Shot(draws.frame(m.state), m) for m in play(right, draws.env, 0, 0, 500)]
    images = annotate(shots)
    for image, seen in zip(images, decoded(encode_gif(images, 0.1, [False] * 15)), strict=True):
        difference = np.abs(np.asarray(image).astype(int) - seen)
        assert difference.max() <= 3
        assert (difference == 0).mean() > 0.98
    smooth = np.indices((256, 256)).transpose(1, 2, 0).astype(np.uint8)
    colourful = [
        Image.fromarray(np.dstack([smooth, np.full((256, 256), blue, np.uint8)]))
        for blue in (0, 100)
    ]
    for image, seen in zip(
        colourful, decoded(encode_gif(colourful, 0.1, [False] * 2)), strict=True
    ):
        assert np.abs(np.asarray(image).astype(int) - seen).mean() < 12


# ------------------------------------------------------------------------- before any work is done


@dataclass(frozen=True)
class Undrawn(TensorEnv):
    """Two steps of nothing."""

    max_steps: int = 2
    num_actions: ClassVar[int] = 2

    def reset(self, noise: torch.Tensor) -> Any:
        return type(LineWorld().states())(torch.zeros(len(noise)))

    def step(self, state: Any, action: torch.Tensor, noise: torch.Tensor) -> Any:
        return state, state.position, torch.zeros(len(action), dtype=torch.bool)

    def observe(self, state: Any) -> torch.Tensor:
        return state.position[:, None]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("film.avi", r"--video .*film\.avi: must end in \.gif or \.mp4"),
        ("film", r"--video .*film: must end in \.gif or \.mp4"),
        ("nowhere/film.gif", r"--video .*nowhere/film\.gif: its folder must exist"),
    ],
)
def test_bad_paths(tmp_path, path, message):
    """One line that names the flag, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        ready(agent(LineWorld(), 0.0, 1.0), tmp_path / path)


def test_an_environment_that_cannot_be_drawn_names_the_method():
    """The message has the method's name, argument and result, or Gymnasium's requirement."""
    with pytest.raises(ValueError, match=r"Undrawn .*render\(self, state\).*uint8 \[H, W, 3\]"):
        ready(agent(Undrawn(), 0.0, 1.0), Path("film.gif"))
    env = from_gymnasium(lambda: gymnasium.make("CartPole-v1"))
    message = "CartPole-v1 cannot be drawn; it needs .* rgb_array and has human, rgb_array "
    with pytest.raises(ValueError, match=message + ".made with render_mode None: render gave None"):
        ready(agent(env, 0.0, 1.0), Path("film.gif"))
    env.close()


@pytest.mark.parametrize(
    ("library", "path"), [("PIL", "film.gif"), ("PIL", "film.mp4"), ("imageio_ffmpeg", "film.mp4")]
)
def test_missing_libraries_say_what_to_install(monkeypatch, library, path):
    """The line names the flag and the extra."""
    monkeypatch.setitem(sys.modules, library, None)
    message = rf'--video {path}: {library} is not installed: pip install -e "\.\[video\]"'
    with pytest.raises(ValueError, match=message):
        ready(agent(LineWorld(), 0.0, 1.0), Path(path))


def test_missing_pygame_names_the_flag(monkeypatch):
    """The library that draws the environment is checked, too."""
    with headless():
        pytest.importorskip("pygame")
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(
        ValueError, match=r"--video film\.gif: pygame is not installed: pip install"
    ):
        ready(agent(make_env("CartPole-v1"), 0.0, 1.0), Path("film.gif"))


# -------------------------------------------------------------------------------- at a run's end


def test_a_run_ends_with_a_film(tmp_path, capfd):
    """agent.gif is small, whole, and part of report.html."""
    train(Args(run_dir=tmp_path / "run", **SMALL))
    film = tmp_path / "run" / "agent.gif"
    assert len(decoded(film)) >= 2
    assert film.stat().st_size < 300_000
    page = (tmp_path / "run" / "report.html").read_text()
    assert base64.b64encode(film.read_bytes()).decode() in page
    assert capfd.readouterr() == ("", "")


def test_films_stay_small(tmp_path):
    """500 steps of CartPole: at most 80 pictures and 300 kB."""
    with headless():
        pytest.importorskip("pygame")
    env = make_env("CartPole-v1", {"theta_threshold_radians": 100.0, "x_threshold": 1e4})
    train(Args(run_dir=tmp_path / "run", **SMALL), env=env)
    film = tmp_path / "run" / "agent.gif"
    assert 40 <= len(decoded(film)) <= 81
    assert film.stat().st_size < 300_000


@pytest.mark.parametrize("without", ["the library", "a renderer", "a report"])
def test_no_film_is_no_trouble(tmp_path, monkeypatch, capfd, without):
    """Without a film the run is complete, and its report says how to make one."""
    if without == "the library":
        monkeypatch.setitem(sys.modules, "PIL", None)
    env = Undrawn() if without == "a renderer" else None
    report = without != "a report"
    result = train(Args(run_dir=tmp_path / "run", report=report, **SMALL), env=env)
    assert result.summary["status"] == "done"
    assert not (tmp_path / "run" / "agent.gif").exists()
    assert capfd.readouterr() == ("", "")
    if report:
        page = (tmp_path / "run" / "report.html").read_text()
        assert 'pip install -e ".[video]"' in html.unescape(page)


def test_a_method_that_fails_costs_one_warning(tmp_path, capfd):
    """An exception in a user's `render` is a warning; run and report are complete."""

    class Failing(Undrawn):
        def render(self, state: Any) -> Any:
            raise RuntimeError("no ink")

    result = train(Args(run_dir=tmp_path / "run", **SMALL), env=Failing())
    assert result.summary["status"] == "done"
    assert (tmp_path / "run" / "report.html").exists()
    assert capfd.readouterr().err == "warning: no agent.gif: RuntimeError: no ink\n"
