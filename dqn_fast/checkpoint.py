"""Files of a run that are written whole or not at all, and agents read back from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.device import choose_device
from dqn_fast.envs import TensorEnv, UnknownEnvError, make_env
from dqn_fast.networks import QNetwork

AgentFile = Literal["best", "last"]
AGENT_FILES: dict[str, str] = {"best": "best.pt", "last": "checkpoint.pt"}


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, nothing between.

    Args:
        path: the file; its folder exists.
        write: writes the content into the open binary file that it is given.

    Raises:
        OSError: the file system refuses; `path` is as it was and no other file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def finite(value: Any) -> Any:
    """`value` as strict JSON can hold it: NaN and infinity become None, nested ones too."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values with torch.save; loads with `weights_only=True`."""

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:  # torch closes its archive once more over a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_whole(path, write)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, without running code from the file.

    Raises:
        ValueError: there is no such file, or it is not a checkpoint.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception as error:  # torch raises a handful of types for a file that is not its own
        raise ValueError(f"{path}: not a checkpoint of this program") from error
    if not isinstance(content, dict) or "q_net" not in content:
        raise ValueError(f"{path}: not a checkpoint of this program")
    return content


class BestAgent:
    """Each member's weights of its best evaluation so far.

    Attributes:
        return_mean: best mean return, [M]; -inf before the first evaluation.
        global_step: where it was reached, [M].
        weights: state of the network then.
    """

    def __init__(self, num_members: int) -> None:
        self.return_mean = [-math.inf] * num_members
        self.global_step = [0] * num_members
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def offer(self, q_net: QNetwork, return_mean: list[float], global_step: int) -> bool:
        """Take over the members that do better than ever; returns whether there were any."""
        better = [new > old for new, old in zip(return_mean, self.return_mean, strict=True)]
        if not self.weights:
            self.weights = {name: t.clone() for name, t in q_net.state_dict().items()}
        for name, tensor in q_net.state_dict().items():
            mask = torch.tensor(better, device=tensor.device).view(-1, *[1] * (tensor.ndim - 1))
            self.weights[name] = torch.where(mask, tensor, self.weights[name])
        for member in np.flatnonzero(better):
            self.return_mean[member], self.global_step[member] = return_mean[member], global_step
        return any(better)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "return_mean": self.return_mean,
            "global_step": self.global_step,
            "weights": self.weights,
        }


def agent_content(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    global_step: list[int],
    eval_return_mean: list[float],
) -> dict[str, Any]:
    """What `load_agent` reads: the network, where it comes from and how good it was.

    Args:
        config: content of `config.json`.
        weights: state of the network of all M members.
        global_step: transitions behind each member's weights, [M].
        eval_return_mean: each member's evaluation, [M].
    """
    return {
        "env_id": config["env_id"],
        "env_params": dict(config["env_params"]),
        "sizes": list(config["derived"]["sizes"]),
        "q_net": dict(weights),
        "global_step": global_step,
        "eval_return_mean": eval_return_mean,
    }


class Agent:
    """A trained greedy agent.

    Attributes:
        env: the environment that it was trained on.
        q_net: network of all M members.
        member: the one that `act` asks.
        global_step: transitions behind each member's weights, [M].
        eval_return_mean: each member's mean return when they were evaluated, [M]; NaN if never.
    """

    def __init__(
        self,
        env: TensorEnv,
        q_net: QNetwork,
        member: int,
        global_step: list[int],
        eval_return_mean: list[float],
    ) -> None:
        self.env, self.q_net, self.member = env, q_net, member
        self.global_step, self.eval_return_mean = global_step, eval_return_mean
        self._device = next(q_net.parameters()).device
        self._stored = env.example_obs()[0]

    @torch.no_grad()
    def q_values(self, obs: Tensor) -> Tensor:
        """Q-values [..., A] of one observation or a batch, of any leading shape.

        Args:
            obs: as the environment stores it, which `observe` gives; where that differs in kind
                or shape, also what the network reads (floats [..., F], of `features`).
        """
        obs = obs.to(self._device)
        is_float = obs.is_floating_point()
        if is_float:
            obs = obs.float()
        is_stored = (
            is_float == self._stored.is_floating_point()
            and obs.shape[obs.ndim - self._stored.ndim :] == self._stored.shape
        )
        if is_stored or not (is_float and obs.shape[-1:] == (self.q_net.sizes[0],)):
            obs = self.env.features(obs)
        rows = obs.reshape(-1, obs.shape[-1]).expand(self.q_net.num_members, -1, -1)
        return self.q_net(rows)[self.member].reshape(*obs.shape[:-1], -1)

    @overload
    def act(self, obs: Tensor) -> Tensor: ...
    @overload
    def act(self, obs: NDArray[Any] | float) -> NDArray[np.int64]: ...
    def act(self, obs: Tensor | NDArray[Any] | float) -> Tensor | NDArray[np.int64]:
        """Greedy action of one observation or each of a batch; int64, NumPy for NumPy."""
        if isinstance(obs, Tensor):
            return self.q_values(obs).argmax(-1)
        return self.q_values(torch.as_tensor(np.asarray(obs))).argmax(-1).cpu().numpy()


def load_agent(
    run_dir: Path | str,
    which: AgentFile = "best",
    member: int | None = None,
    env: TensorEnv | None = None,
    device: str = "auto",
) -> Agent:
    """Read a saved agent back.

    Args:
        run_dir: directory of the run.
        which: "best", of the best evaluation during training, or "last".
        member: of a run with several; None takes the one with the best evaluation.
        env: the environment; None makes it from the run's own settings.
        device: as the flag --device.

    Raises:
        ValueError: no such run, agent or member.
    """
    if which not in AGENT_FILES:
        raise ValueError(f"agent {which}: must be one of {', '.join(AGENT_FILES)}")
    path, last = (Path(run_dir) / AGENT_FILES[name] for name in (which, "last"))
    if not path.exists() and last.exists():
        raise ValueError(f"{path}: is not there, no evaluation was made; use --agent last")
    content = load_checkpoint(path, choose_device(device))
    try:
        env = env or make_env(content["env_id"], content["env_params"])
    except UnknownEnvError as error:
        raise ValueError(
            f"{path}: was trained on {content['env_id']}, which no id stands for here; give the "
            f"environment, load_agent(run_dir, env=...)"
        ) from error
    returns = content["eval_return_mean"]
    q_net = QNetwork(content["sizes"], len(returns), choose_device(device))
    q_net.load_state_dict(content["q_net"])
    if member is None:
        member = int(np.argmax(np.nan_to_num(returns, nan=-np.inf)))
    if not 0 <= member < len(returns):
        raise ValueError(f"member {member}: must be in 0 .. {len(returns) - 1}")
    return Agent(env, q_net, member, content["global_step"], returns)
