"""Files of a run that are written whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dqn_fast import __version__, tree
from dqn_fast.dqn import DQN, QFunction, State
from dqn_fast.record.archive import check_archive


def temporary_name(name: str) -> str:
    """Name under which this process writes the file `name` before it replaces it."""
    return f".{name}.{os.getpid()}"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that ended while they wrote."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_whole(
    path: Path,
    write: Callable[[IO[bytes]], object],
    before_replace: Callable[[], object] = lambda: None,
) -> None:
    """Write a file atomically: a reader, or a crash, sees either the old content or the new.

    Args:
        path: the file; its folder exists.
        write: writes the content into the open binary file that is its argument.
        before_replace: called when the new content is on the disk and not yet under its name.

    Raises:
        OSError: the file could not be written; `path` is unchanged and no other file is left.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before_replace()
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


FORMAT = 2
"""Format of checkpoints. Those of format 1 say neither their format nor their digest."""


def save_checkpoint(path: Path, content: Mapping[str, Any], keep: int = 1) -> None:
    """Write tensors and plain values, their format and their digest, whole or not at all.

    Args:
        path: of the newest checkpoint, `name.pt`.
        content: loadable with `weights_only=True`.
        keep: checkpoints to keep, >= 1: the one before becomes `name.1.pt`, and so on.

    Raises:
        OSError: the file could not be written; the earlier checkpoints are as before.
    """
    whole = {**content, "format": FORMAT, "program": __version__}
    whole = tree.replace(whole, map(_alone, tree.leaves(whole)))
    whole["digest"] = digest_of(whole)

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(whole, file)
        except RuntimeError as error:  # torch closes its archive again after a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_whole(path, write, before_replace=lambda: _shift(path, keep))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own size, for torch.save writes whole storages."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
        return torch.from_numpy(tensor.detach().numpy())  # a copy of replay may not fit
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def kept_paths(path: Path) -> Iterator[Path]:
    """The newest checkpoint `name.pt`, then the ones before, `name.1.pt`, ...; all may be missing
    but the last."""
    yield path
    for number in itertools.count(1):
        older = path.with_suffix(f".{number}{path.suffix}")
        if not os.path.lexists(older):
            return
        yield older


def _shift(path: Path, keep: int) -> None:
    """Rename the older checkpoints, so that `path` may be replaced; there is always one of them."""
    paths = [path, *(path.with_suffix(f".{i}{path.suffix}") for i in range(1, keep))]
    for older in [*kept_paths(path)][keep:]:
        older.unlink()
    for older, newer in reversed([*zip(paths[2:], paths[1:], strict=False)]):
        if newer.exists():
            newer.replace(older)
    if keep > 1 and path.exists():
        try:
            link = path.with_name(temporary_name(paths[1].name))
            link.unlink(missing_ok=True)
            os.link(path, link)
            link.replace(paths[1])
        except OSError:  # no links on this file system
            path.replace(paths[1])


def digest_of(value: Any) -> str:
    """SHA-256 of plain values and tensors: types, names, order, shapes and bytes."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}\0".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(value, Mapping):
            sha.update(f"dict {len(value)}\0".encode())
            for name, item in value.items():
                sha.update(f"{name!r}\0".encode())
                feed(item)
        elif isinstance(value, (list, tuple)):
            sha.update(f"list {len(value)}\0".encode())
            for item in value:
                feed(item)
        else:
            sha.update(f"{type(value).__name__} {value!r}\0".encode(errors="surrogatepass"))

    feed(value)
    return sha.hexdigest()


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read the result of `save_checkpoint`, without running code from the file.

    Raises:
        ValueError: the file cannot be opened, it is not a checkpoint, or it is damaged.
    """
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError:
        raise
    except Exception as error:  # torch raises several types for a file that is not a checkpoint
        raise ValueError(f"{path}: not a checkpoint of this program") from error
    if not isinstance(content, dict) or "q_net" not in content or not _is_bounded(content, path):
        raise ValueError(f"{path}: not a checkpoint of this program")
    if (version := content.get("format", 1)) != 1:
        if version != FORMAT:
            by = content.get("program")
            raise ValueError(f"{path}: was written by version {by} of this program")
        digest = content.pop("digest", None)
        if digest != digest_of(content):
            raise ValueError(f"{path}: is damaged, its digest differs")
    return tree.replace(content, [tensor.to(device) for tensor in tree.leaves(content)])


def _is_bounded(content: Any, path: Path, most_depth: int = 50) -> bool:
    """Whether content has no more parts than its file has bytes: a list that holds another one
    twice, and so on, has 2**n."""
    parts, budget = [(content, 0)], path.stat().st_size
    while parts:
        value, depth = parts.pop()
        budget -= 1
        if budget < 0 or depth > most_depth:
            return False
        items = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, (Mapping, list, tuple)):
            parts += [(item, depth + 1) for item in items]
    return True


def load_newest(
    path: Path,
    device: torch.device | str = "cpu",
    check: Callable[[Path, Mapping[str, Any]], object] = lambda *_: None,
) -> tuple[Path, dict[str, Any], list[str]]:
    """Read the newest checkpoint that is whole.

    Args:
        path: of the newest one.
        device: of its tensors.
        check: raises ValueError for content that cannot be used.

    Returns:
        The file, its content, and a line for each newer one that is damaged.

    Raises:
        ValueError: none is whole; the message is about the newest.
    """
    notes: list[str] = []
    first: ValueError | None = None
    for kept in kept_paths(path):
        try:
            content = load_checkpoint(kept, device)
            check(kept, content)
            return kept, content, notes
        except ValueError as error:
            first = first or error
            notes.append(f"{error}; used the one before")
    assert first is not None
    raise first


def write_weights(path: Path, content: Mapping[str, Any]) -> None:
    """Write the weights of `agent_content` alone as safetensors, for other tools.

    Its metadata have one text, "dqn_fast": the JSON of what else describes the network.
    """
    described = ("env_id", "network", "head", "members", "global_step", "eval_return_mean")
    metadata = {"dqn_fast": json.dumps({name: finite(content[name]) for name in described})}
    weights = {name: t.detach().cpu().contiguous() for name, t in content["q_net"].items()}
    data = safetensors.torch.save(weights, metadata)
    write_whole(path, lambda file: file.write(data))


def saved_part(state: State, dqn: DQN, replay_rows: int) -> State:
    """What a checkpoint holds of a state: as views, with the first rows of replay only.

    Args:
        state: of the run.
        dqn: the algorithm.
        replay_rows: rows of each member; 0: replay is left out.
    """
    replay = dqn.replay.first_rows(state.replay, replay_rows) if replay_rows else None
    return state._replace(replay=replay)  # type: ignore[arg-type]


def write_digests(
    path: Path, global_step: int, known: Mapping[str, tuple[int, str]], names: Sequence[str]
) -> None:
    """Write bytes and SHA-256 of text files in the same folder, by name.

    Args:
        path: of the file to write.
        global_step: of the run.
        known: bytes and digest of a file that grows: of what it has so far.
        names: files to read.
    """
    files = dict(known)
    for name in names:
        content = path.with_name(name).read_bytes()
        files[name] = len(content), hashlib.sha256(content).hexdigest()
    entries = {n: {"bytes": size, "sha256": sha} for n, (size, sha) in files.items()}
    write_json(path, {"global_step": global_step, "files": entries})


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

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for `load_`."""
        return {
            "return_mean": list(self.return_mean),
            "global_step": list(self.global_step),
            "weights": dict(self.weights),
        }

    def load_(self, saved: Mapping[str, Any], q_net: QFunction) -> None:
        """Continue from a `state`, with weights like those of `q_net`."""
        self.return_mean, self.global_step = [*saved["return_mean"]], [*saved["global_step"]]
        self.weights = {}
        if saved["weights"] != {}:
            self.weights = {name: t.detach().clone() for name, t in q_net.named().items()}
            tree.load_(self.weights, saved["weights"])


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
        "environment": config["environment"],
        "network": config["derived"]["network"],
        "head": config["derived"]["head"],
        "q_net": dict(weights),
        "members": [dict(member) for member in config["derived"]["members"]],
        "global_step": global_step,
        "eval_return_mean": eval_return_mean,
    }
