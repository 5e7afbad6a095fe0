"""Trees of tensors: one order, memory of their own, and what a checkpoint holds of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dqn_fast import tree


class Pair(NamedTuple):
    first: Any
    second: Any


def example(num_members: int = 2) -> Pair:
    """Nested NamedTuples, lists and dicts, [M, ...] and [M * 3, ...], with a place left empty."""
    m = num_members
    return Pair(
        first=[torch.arange(4.0 * m).view(m, 4).requires_grad_(), torch.arange(m)],
        second=Pair({"b": torch.arange(6 * m).view(3 * m, 2), "a": torch.ones(3 * m)}, None),
    )


def test_leaves_come_in_the_order_of_the_fields():
    """Depth first; None is no leaf."""
    state = example()
    expected = [*state.first, state.second.first["b"], state.second.first["a"]]
    assert len(tree.leaves(state)) == 4
    assert all(a is b for a, b in zip(tree.leaves(state), expected, strict=True))


def test_paths_name_the_leaves():
    """In their order, by field, key and place; one tensor alone has no path."""
    assert tree.paths(example()) == [
        "first[0]",
        "first[1]",
        "second.first['b']",
        "second.first['a']",
    ]
    assert tree.paths(torch.zeros(1)) == [""]


def test_replace_puts_other_tensors_in_the_same_places():
    """In the order of `leaves`; everything else stays."""
    state = example()
    new = [torch.tensor(float(i)) for i in range(4)]
    replaced = tree.replace(state, new)
    assert type(replaced) is type(replaced.second) is Pair
    assert [t.item() for t in replaced.first] == [0.0, 1.0]
    assert replaced.second.first["b"].item() == 2.0
    assert replaced.second.second is None
    assert all(a is b for a, b in zip(tree.leaves(replaced), new, strict=True))


def test_a_clone_has_memory_of_its_own():
    """Also where one tensor stands in two places, and where a tensor is expanded."""
    shared = torch.zeros(3)
    state = [shared, shared, torch.ones(1).expand(3)]
    ours = tree.clone(state)
    for i, leaf in enumerate(ours):
        leaf.fill_(i + 5)
    assert [leaf.tolist() for leaf in ours] == [[5.0] * 3, [6.0] * 3, [7.0] * 3]
    assert state[0].tolist() == [0.0] * 3
    assert state[2].tolist() == [1.0] * 3


def test_copy_overwrites_values_and_keeps_addresses():
    """Tensors that ask for gradients too; a tree of another length is refused."""
    target, source = tree.clone(example()), example()
    before = [leaf.data_ptr() for leaf in tree.leaves(target)]
    with torch.no_grad():
        for leaf in tree.leaves(target):
            leaf.zero_()
    tree.copy_(target, source)
    assert all(map(torch.equal, tree.leaves(target), tree.leaves(source)))
    assert [leaf.data_ptr() for leaf in tree.leaves(target)] == before
    with pytest.raises(ValueError, match="longer"):
        tree.copy_([torch.zeros(1)], [torch.zeros(1)] * 2)


def test_num_bytes_counts_every_tensor():
    """8 floats, 2 and 12 int64, 6 floats."""
    assert tree.num_bytes(example()) == 8 * 4 + 2 * 8 + 12 * 8 + 6 * 4


def test_member_gives_each_members_part():
    """Of [M, ...] one row, of [M * rows, ...] its rows, without a copy; the parts make up the
    whole."""
    state = example(3)
    parts = [tree.member(state, i, 3) for i in range(3)]
    assert parts[1].first[0].tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert parts[1].second.first["b"].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert parts[1].second.second is None
    for leaf, *own in zip(*map(tree.leaves, (state, *parts)), strict=True):
        assert torch.equal(torch.cat(own), leaf)
        assert own[0].data_ptr() == leaf.data_ptr()


def test_what_is_plain_comes_back():
    """Through a file that runs no code: NamedTuples, dicts, lists, None and numbers."""
    state = Pair(example(), {"count": 3, "name": "text"})
    plain = tree.plain(state)
    assert type(plain) is type(plain["first"]["second"]) is dict
    assert plain["first"]["second"]["second"] is None
    assert plain["second"] == {"count": 3, "name": "text"}
    assert not any(leaf.requires_grad for leaf in tree.leaves(plain))
    target = tree.clone(state)
    leaves = tree.leaves(target)
    with torch.no_grad():
        for leaf in leaves:
            leaf.zero_()
    tree.load_(target, plain)
    assert all(map(torch.equal, leaves, tree.leaves(state)))


def test_what_is_plain_fits_into_a_checkpoint(tmp_path):
    """`torch.load` reads it with `weights_only`."""
    state = example()
    torch.save(tree.plain(state), tmp_path / "state.pt")
    target = tree.clone(state)
    with torch.no_grad():
        for leaf in tree.leaves(target):
            leaf.zero_()
    tree.load_(target, torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(map(torch.equal, tree.leaves(target), tree.leaves(state)))


def saved(place: str, value: Any) -> Any:
    """What `plain` makes of the example, with another value in one place."""
    plain = tree.plain(example())
    *path, last = [int(name) if name.isdigit() else name for name in place.split("/")]
    inner = plain
    for name in path:
        inner = inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return plain


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("first/0", torch.zeros(2, 5), r"^first/0: must be torch.float32 \(2, 4\)$"),
        ("first/1", torch.zeros(2), r"^first/1: must be torch.int64 \(2,\)$"),
        ("first/0", None, r"^first/0: must be torch.float32"),
        ("first", [torch.zeros(2, 4)], r"^first: must hold 2 values$"),
        ("first", {"0": 1}, r"^first: must hold 2 values$"),
        ("second/first/a", torch.ones(7), r"^second/first/a: must be torch.float32 \(6,\)$"),
        ("second/first/a", KeyError, r"^second/first: must hold b, a$"),
        ("second/second", torch.zeros(1), r"^second/second: must be None$"),
        ("second/second", 0, r"^second/second: must be None$"),
        ("more", torch.zeros(1), r"^state: must hold first, second$"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(place, value, message):
    """Shape, dtype, number, name, and something where nothing is."""
    with pytest.raises(ValueError, match=message):
        tree.load_(example(), saved(place, value))


def test_a_tree_that_is_one_tensor():
    """A tree of one leaf; wrong ones are called a tensor."""
    x: Tensor = torch.zeros(2)
    tree.load_(x, torch.ones(2))
    assert x.tolist() == [1.0, 1.0]
    assert tree.plain(x).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"^tensor: must be"):
        tree.load_(x, torch.ones(3))
