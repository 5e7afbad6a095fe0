"""Files of a run that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dqn_fast.dqn import QFunction


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: a reader, or a crash, sees either the old content or the new.

    Args:
        path: the file; its folder exists.
        write: writes the content into the open binary file that is its argument.

    Raises:
        OSError: the file could not be written; `path` is unchanged and no other file is left.
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
    """`value` for strict JSON: NaN and infinity become None, nested ones too."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values with torch.save; loadable with `weights_only=True`."""

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:  # torch closes its archive again after a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_whole(path, write)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read the result of `save_checkpoint`, without running code from the file.

    Raises:
        ValueError: the file cannot be opened, or it is not a checkpoint.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception as error:  # torch raises several types for a file that is not a checkpoint
        raise ValueError(f"{path}: not a checkpoint of this program") from error
    if not isinstance(content, dict) or "q_net" not in content:
        raise ValueError(f"{path}: not a checkpoint of this program")
    return content


class BestAgent:
    """Each member's weights at its best evaluation so far.

    Attributes:
        return_mean: best mean return, [M]; -inf before the first evaluation.
        global_step: of that evaluation, [M].
        weights: parameters of the network at that evaluation, by name.
    """

    def __init__(self, num_members: int) -> None:
        self.return_mean = [-math.inf] * num_members
        self.global_step = [0] * num_members
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def offer(self, q_net: QFunction, return_mean: list[float], global_step: int) -> bool:
        """Keep the weights of members with a new best return; returns whether there are any."""
        better = [new > old for new, old in zip(return_mean, self.return_mean, strict=True)]
        if not self.weights:
            self.weights = {name: t.clone() for name, t in q_net.named().items()}
        for name, tensor in q_net.named().items():
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
    """Content of a file for `load_agent`: network, environment, members and their evaluation.

    Args:
        config: content of `config.json`.
        weights: parameters of the network of all M members, by name.
        global_step: global_step of each member's weights, [M].
        eval_return_mean: mean return of each member's weights, [M].
    """
    return {
        "env_id": config["env_id"],
        "env_params": dict(config["env_params"]),
        "network": config["derived"]["network"],
        "head": config["derived"]["head"],
        "q_net": dict(weights),
        "members": [dict(member) for member in config["derived"]["members"]],
        "global_step": global_step,
        "eval_return_mean": eval_return_mean,
    }
