"""Films of the greedy agent at play, as a .gif or an .mp4.

    python -m dqn_fast.evaluate RUN_DIR --video agent.gif

Below each picture are the step, the return so far and the value of every action, the chosen one in
blue. The libraries come with the extra: pip install -e ".[video]". `envs/render.py` draws the
environments.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dqn_fast.agent import Agent, AgentFile, load_agent
from dqn_fast.envs import TensorEnv
from dqn_fast.envs.render import (
    INSTALL,
    MissingLibraryError,
    Picture,
    Renderer,
    UndrawableError,
)
from dqn_fast.noise import Noise, Stream
from dqn_fast.record.checkpoint import write_whole

if TYPE_CHECKING:
    from PIL import Image

LIBRARIES = {".gif": ("PIL",), ".mp4": ("PIL", "imageio_ffmpeg")}
"""Libraries for a film, by the suffix of its file."""
RUN_FILM = "agent.gif"
"""File in the directory of a run."""
RUN_STEPS, RUN_FRAMES, RUN_WIDTH = 500, 80, 320
"""Most steps, pictures and pixels across in the film of a finished run, which must be cheap and
small."""

EVALUATION_EPOCH = 2**32 - 1
"""Epoch of the evaluation from the command line; evaluations of a training run count from 0."""
HOLD_S = 1.0
"""Seconds for which the last picture of an episode stays."""
SLOWEST_S = 0.1
"""Most seconds between two pictures if some are left out: more would not look like motion."""
SMALLEST = 160
"""Pictures whose sides are shorter, in pixels, are enlarged."""
_INK, _SOFT, _CHOSEN = (36, 41, 47), (175, 184, 193), (0, 114, 178)
_LINE, _FONT, _MARGIN, _ROWS = 14, 11, 6, 6


class Moment(NamedTuple):
    """An agent between two steps of an episode.

    Attributes:
        state: of the environment, for `Renderer.frame`.
        q_values: float32 [A].
        step: steps taken in the episode.
        episode_return: undiscounted sum of their rewards; at the end of the episode as an
            evaluation reports it.
        ending: "" while the episode goes on; "terminated" or "truncated" at its end, "cut" if
            the film stops before it.
    """

    state: Any
    q_values: NDArray[np.float32]
    step: int
    episode_return: float
    ending: str


class Shot(NamedTuple):
    """A picture and the moment that it shows."""

    picture: Picture
    moment: Moment


def ready(agent: Agent, path: Path) -> Renderer:
    """Check that a film of `agent` can be made at `path`, before any work is done.

    Raises:
        MissingLibraryError: a library is not installed.
        ValueError: unknown suffix, no such folder, or nothing can draw the environment.
    """
    if path.suffix not in LIBRARIES:
        raise ValueError(f"--video {path}: must end in {' or '.join(LIBRARIES)}")
    if not path.parent.is_dir():
        raise ValueError(f"--video {path}: its folder must exist")
    for library in LIBRARIES[path.suffix]:
        try:
            importlib.import_module(library)
        except ImportError:
            raise MissingLibraryError(
                f"--video {path}: {library} is not installed: {INSTALL}"
            ) from None
    try:
        return Renderer(agent.env)
    except ValueError as error:
        raise type(error)(f"--video {path}: {error}") from None


def record(
    agent: Agent,
    draws: Renderer,
    path: Path,
    episodes: int = 1,
    seed: int = 0,
    max_steps: int = 500,
    max_frames: int | None = None,
    max_width: int | None = None,
) -> int:
    """Film the greedy agent's first episodes of `evaluate` with the same seed.

    Args:
        agent: the agent; its `member` plays.
        draws: from `ready`.
        path: file to write, whole or not at all.
        episodes: how many, one after the other, >= 1.
        seed: of the episodes' randomness.
        max_steps: steps shown of each episode at most, >= 1.
        max_frames: about the most pictures; of more, evenly spaced ones are left out. The end of
            each episode is always kept. None: every step is shown.
        max_width: in pixels; larger pictures are made smaller. None: as they are drawn.

    Returns:
        Number of pictures in the film.

    Raises:
        OSError: the file cannot be written.
    """
    kept: list[tuple[Moment, Picture | None]] = []
    stride = 1
    for episode in range(episodes):
        for moment in play(agent, draws.env, episode, seed, max_steps):
            if moment.step % stride == 0 or moment.ending:
                kept.append((moment, draws.frame(moment.state) if draws.live else None))
            if max_frames is not None and len(kept) > max_frames:
                stride *= 2
                kept = [(m, p) for m, p in kept if m.step % stride == 0 or m.ending]
    shots = [Shot(draws.frame(m.state) if p is None else p, m) for m, p in kept]
    seconds = min(stride / draws.fps, max(1.0 / draws.fps, SLOWEST_S))
    images = annotate(shots, max_width)
    encode = encode_gif if path.suffix == ".gif" else encode_mp4
    content = encode(images, seconds, [bool(shot.moment.ending) for shot in shots])
    write_whole(path, lambda file: file.write(content))
    return len(shots)


def film_run(run_dir: Path, env: TensorEnv, seed: int) -> None:
    """Write RUN_FILM, a short film of the run's best agent, or of its last one if there was no
    evaluation; if that is impossible, write nothing.

    Raises:
        UndrawableError: an environment that declares render modes gives no pictures.
    """
    path = run_dir / RUN_FILM
    which: AgentFile = "best" if (run_dir / "best.pt").exists() else "last"
    agent = load_agent(run_dir, which, env=env, device="cpu")
    try:
        draws = ready(agent, path)
    except MissingLibraryError:
        return
    except UndrawableError as error:
        if getattr(env, "render_modes", ()):
            raise UndrawableError(str(error).removeprefix(f"--video {path}: ")) from error
        return
    except ValueError:  # nothing draws it
        return
    with contextlib.closing(draws):
        record(agent, draws, path, 1, seed, RUN_STEPS, RUN_FRAMES, RUN_WIDTH)


@torch.no_grad()
def play(agent: Agent, env: TensorEnv, episode: int, seed: int, max_steps: int) -> Iterator[Moment]:
    """The moments of an episode: one before each step, and its end.

    Args:
        agent: plays greedily.
        env: the environment. On the host a moment has no state: it must be drawn before the next
            one is asked for.
        episode: its number in the evaluation; both draw the same noise.
        seed: of that evaluation.
        max_steps: steps after which the film is cut, >= 1.
    """
    device = agent.q_net.device
    noise = Noise(seed + agent.member, 1, device)

    def draw(stream: Stream, step: int, dim: int) -> torch.Tensor:
        shape = (episode + 1, dim)
        return noise.uniform(stream, step, 1, shape, EVALUATION_EPOCH)[0, :, episode]

    start = env.vector_reset(draw(Stream.EVALUATION_RESET, 0, env.reset_noise_dim))
    state, obs, episode_return, ending = start.env, start.obs, 0.0, ""
    for step in range(max_steps + 1):
        if not ending and step == max_steps:
            ending = "cut"
        q_values = agent.values(env.features(obs))
        yield Moment(state, q_values[0].cpu().numpy(), step, episode_return, ending)
        if ending:
            return
        action, step_noise = (
            q_values.argmax(-1),
            draw(Stream.EVALUATION_STEP, step, env.step_noise_dim),
        )
        if env.on_host:
            _, outcome = env.vector_step(start, action, step_noise, step_noise)
            obs, reward, terminated = outcome.next_obs, outcome.reward, outcome.terminated
            truncated = bool(outcome.truncated)
        else:  # `vector_step` would replace the last state
            state, reward, terminated = env.step(state, action, step_noise)
            obs, truncated = env.observe(state), step + 1 == env.max_steps
        episode_return += float(reward)
        if env.on_host and bool(outcome.done):  # in the environment's own units
            episode_return = float(outcome.episode_return)
        if bool(terminated):
            ending = "terminated"
        elif truncated:
            ending = "truncated"


# ---------------------------------------------------------------------------------- the pictures


def annotate(shots: Sequence[Shot], max_width: int | None = None) -> list[Image.Image]:
    """Write each moment below its picture; all results have one size.

    Values are drawn as bars between the lowest and the highest of the film. At the end of an
    episode no action is chosen; after a termination there are no values.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    height, width = np.max([shot.picture.shape[:2] for shot in shots], axis=0).tolist()
    scale = max(1, SMALLEST // max(height, width))
    shrink = 1 if max_width is None else max(1, -(-width * scale // max_width))
    height, width = -(-height * scale // shrink), -(-width * scale // shrink)

    num_actions = len(shots[0].moment.q_values)
    columns = -(-num_actions // _ROWS)
    rows = -(-num_actions // columns)
    full = (max(width, 200, 150 * columns), height + (rows + 1) * _LINE + 2 * _MARGIN)
    full = (full[0] + full[0] % 2, full[1] + full[1] % 2)  # video codecs want even sides
    column = (full[0] - _MARGIN) // columns
    values = np.array([s.moment.q_values for s in shots if s.moment.ending != "terminated"])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    unit = (column - 84) / max(high - low, 1e-9)

    images = []
    for picture, (_, q_values, step, episode_return, ending) in shots:
        drawn = Image.fromarray(picture)
        if scale > 1:
            size = (drawn.width * scale, drawn.height * scale)
            drawn = drawn.resize(size, Image.Resampling.NEAREST)
        drawn = drawn.reduce(shrink) if shrink > 1 else drawn
        image = Image.new("RGB", full, "white")
        image.paste(drawn, ((full[0] - drawn.width) // 2, 0))
        draw = ImageDraw.Draw(image)
        y = height + _MARGIN
        draw.text((_MARGIN, y), f"step {step}", _INK, font)
        draw.text((_MARGIN + 66, y), f"return {episode_return:.5g}", _INK, font)
        draw.text((full[0] - _MARGIN, y), ending, _INK, font, anchor="ra")
        chosen = None if ending else int(q_values.argmax())
        for action, value in enumerate(q_values.tolist()):
            x = _MARGIN + action // rows * column
            top = y + (action % rows + 1) * _LINE
            colour = _CHOSEN if action == chosen else _SOFT
            draw.text((x, top), f"Q({action})", _INK, font)
            if ending == "terminated":
                continue
            end = x + 30 + round((value - low) * unit)
            draw.rectangle((x + 28, top + 2, end, top + _LINE - 4), colour)
            draw.text((x + column - _MARGIN, top), f"{value:.4g}", _INK, font, anchor="ra")
        images.append(image)
    return images


def encode_gif(images: Sequence[Image.Image], seconds: float, holds: Sequence[bool]) -> bytes:
    """Encode an endless GIF.

    Args:
        images: of one size.
        seconds: between two pictures; GIF counts hundredths, and browsers want at least two.
        holds: which pictures stay for HOLD_S.
    """
    frames = share_palette(images)
    pace = max(20, round(100 * seconds) * 10)
    durations = [round(1000 * HOLD_S) if hold else pace for hold in holds]
    content = io.BytesIO()
    frames[0].save(
        content, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return content.getvalue()


def share_palette(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Convert images to one palette.

    It has their most frequent colours unchanged, which suits drawings, or a median cut if there are
    too many colours, as in photographs.
    """
    from PIL import Image

    def quantize(palette: Image.Image) -> list[Image.Image]:
        return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]

    sample = [np.asarray(images[i]) for i in np.linspace(0, len(images) - 1, 8).astype(int)]
    montage = Image.fromarray(np.concatenate(sample))
    colours: list[Any] = montage.getcolors(2**14) or []
    # Pillow compares only the upper six bits of a colour and takes the others as zero. So it gets a
    # palette of such colours, and the true colours replace them afterwards.
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    covered = 0
    for count, colour in sorted(colours, reverse=True):
        seen = tuple(part & 0b11111100 for part in colour)
        if seen in found or len(found) < 256:
            found.setdefault(seen, colour)
            covered += count
    if covered < 0.98 * montage.width * montage.height:
        return quantize(montage.quantize(256, dither=Image.Dither.NONE))
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for seen in found for part in seen])
    frames = quantize(palette)
    for frame in frames:
        frame.putpalette([part for colour in found.values() for part in colour])
    return frames


def encode_mp4(images: Sequence[Image.Image], seconds: float, holds: Sequence[bool]) -> bytes:
    """Encode an H.264 film for browsers; arguments as `encode_gif`."""
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path),
            images[0].size,
            fps=1.0 / seconds,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-movflags", "+faststart"],
        )
        writer.send(None)
        for image, hold in zip(images, holds, strict=True):
            for _ in range(max(1, round(HOLD_S / seconds)) if hold else 1):
                writer.send(image.tobytes())
        writer.close()
        return path.read_bytes()
