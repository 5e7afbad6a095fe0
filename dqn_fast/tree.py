"""Nested NamedTuples, lists and dicts of tensors: flatten, copy, save and load them.

The state of a run is one such tree, so no code lists its tensors by hand. A leaf is None if a
variant does not need that tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = TypeVar("Tree")


def leaves(tree: Any) -> list[Tensor]:
    """All tensors of a tree, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def paths(tree: Any) -> list[str]:
    """Where each tensor is in a tree, such as "params[0]", in the order of `leaves`."""
    found = pytree.tree_leaves_with_path(tree)
    return [pytree.keystr(path).lstrip(".") for path, leaf in found if isinstance(leaf, Tensor)]


def replace(tree: Tree, tensors: Iterable[Tensor]) -> Tree:
    """The tree with `tensors` in place of its own, in the order of `leaves`."""
    flat, spec = pytree.tree_flatten(tree)
    new = iter(tensors)
    filled: Tree = pytree.tree_unflatten(
        [next(new) if isinstance(leaf, Tensor) else leaf for leaf in flat], spec
    )
    return filled


def clone(tree: Tree) -> Tree:
    """A copy of the tree with its own memory."""
    return replace(tree, [leaf.clone() for leaf in leaves(tree)])


@torch.no_grad()
def copy_(target: Any, source: Any) -> None:
    """Overwrite every tensor of `target` with the corresponding tensor of `source`."""
    for old, new in zip(leaves(target), leaves(source), strict=True):
        old.copy_(new)


def num_bytes(tree: Any) -> int:
    """Bytes of all tensors."""
    return sum(leaf.nbytes for leaf in leaves(tree))


def member(tree: Tree, index: int, num_members: int) -> Tree:
    """One member's part of an algorithm's state: [1, ...] or [rows, ...] of each tensor [M, ...] or
    [M * rows, ...]."""
    return replace(tree, [leaf.chunk(num_members)[index] for leaf in leaves(tree)])


def plain(tree: Any) -> Any:
    """The tree as dicts and lists, for a checkpoint: a NamedTuple becomes a dict by field name, and
    tensors are detached."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {name: plain(value) for name, value in zip(tree._fields, tree, strict=True)}
    if isinstance(tree, Mapping):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    return tree


def load_(tree: Any, saved: Any) -> None:
    """Overwrite the tensors of `tree` from `saved`, the result of `plain` for such a tree.

    Raises:
        ValueError: the trees differ; the message has the path to the difference, and nothing was
            written.
    """
    pairs = list(_pairs(tree, saved, ""))
    with torch.no_grad():
        for tensor, new in pairs:
            tensor.copy_(new)


def _pairs(tree: Any, saved: Any, path: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of `tree` with the one that `saved` has for it."""
    expected = plain(tree)
    if isinstance(tree, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != tree.shape or saved.dtype != tree.dtype:
            raise ValueError(f"{path or 'tensor'}: must be {tree.dtype} {tuple(tree.shape)}")
        yield tree, saved
    elif isinstance(expected, dict):
        if not isinstance(saved, Mapping) or saved.keys() != expected.keys():
            raise ValueError(f"{path or 'state'}: must hold {', '.join(expected)}")
        values = tree if isinstance(tree, Mapping) else dict(zip(tree._fields, tree, strict=True))
        for name, value in values.items():
            yield from _pairs(value, saved[name], f"{path}/{name}" if path else name)
    elif isinstance(expected, list):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(expected):
            raise ValueError(f"{path}: must hold {len(expected)} values")
        for i, (value, new) in enumerate(zip(tree, saved, strict=True)):
            yield from _pairs(value, new, f"{path}/{i}")
    elif saved != expected:
        raise ValueError(f"{path}: must be {expected}")
