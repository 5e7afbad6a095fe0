"""Traces functions of an algorithm for one member, as graphs of plain operations.

The functions run once, on stand-ins for copies of the state, whose every operation is recorded and
whose numbers nobody can read. torch has tracers too, but importing them takes a second, a third of
what a run needs to begin.
"""

from __future__ import annotations

import functools
import mmap
import operator
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dqn_fast import tree


class Graph(NamedTuple):
    """A traced function.

    Attributes:
        graph: its placeholders are the tensors of the state, of the inputs and of the results,
            which it writes, then the constants; `meta["val"]` of each node has the shape, strides
            and dtype of its value.
        num_arguments: placeholders before the constants.
        results: stand-ins in the shapes of the results, a tree.
        constants: tensors of the function itself, such as an environment's tables.
    """

    graph: torch.fx.Graph
    num_arguments: int
    results: Any
    constants: list[Tensor]


class UntraceableError(Exception):
    """A function depends on numbers that no trace has; the message names the operation."""


class StandIn(Tensor):
    """A tensor whose numbers cannot be read.

    Attributes:
        like: the tensor that it stands for.
        node: of the graph, that makes it.
    """

    like: Tensor
    node: torch.fx.Node

    @staticmethod
    def __new__(cls, like: Tensor, node: torch.fx.Node, device: torch.device) -> StandIn:
        made = Tensor._make_wrapper_subclass(
            cls,
            like.size(),
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=device,
        )
        made.like, made.node = like, node
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        raise UntraceableError(f"{func} outside a trace")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch reads the numbers
        return f"StandIn({tuple(self.shape)}, {self.dtype})"


class _Recorder(TorchDispatchMode):
    """Records every operation in a graph.

    Attributes:
        graph: so far.
        constants: tensors with memory that operations read, by identity, with their nodes.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, in a second, to keep it out of here

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.graph = torch.fx.Graph()
        self.constants: dict[int, tuple[Tensor, torch.fx.Node]] = {}
        self._device = device
        self._last: torch.fx.Node | None = None

    def argument(self, tensor: Tensor) -> StandIn:
        """A stand-in for an argument of the function."""
        like = _copy(tensor.detach())
        return StandIn(like, self._placeholder("argument", like), self._device)

    def _placeholder(self, name: str, like: Tensor) -> torch.fx.Node:
        after = self.graph.inserting_after(self._last) if self._last else None
        if after is None:
            node = self.graph.placeholder(name)
        else:
            with after:
                node = self.graph.placeholder(name)
        node.meta["val"], self._last = _layout(like), node
        return node

    def _constant(self, tensor: Tensor) -> torch.fx.Node:
        """The node of a tensor with memory."""
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = tensor, self._placeholder("constant", tensor)
        return self.constants[id(tensor)][1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        flat, spec = pytree.tree_flatten((args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default:
            raise UntraceableError(f"a number of a tensor is read {source_line()}".strip())
        if func.overloadpacket.__name__ in DECOMPOSED:
            with self:
                return _decompositions()[func](*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):  # called by a decomposition
            with self:
                return func.decompose(*args, **kwargs)
        nodes, likes = [], []
        for each in flat:
            if isinstance(each, StandIn):
                nodes.append(each.node)
                likes.append(each.like)
            elif isinstance(each, Tensor):
                nodes.append(self._constant(each))
                likes.append(each)
            else:
                nodes.append(each)
                likes.append(each)
        like_args, like_kwargs = pytree.tree_unflatten(likes, spec)
        made = func(*like_args, **like_kwargs)
        node_args, node_kwargs = pytree.tree_unflatten(nodes, spec)
        node = self.graph.call_function(func, node_args, node_kwargs)
        node.meta["source"] = source_line()
        return self._wrap(func, made, node, args, like_args)

    def _wrap(
        self, func: Any, made: Any, node: torch.fx.Node, args: Sequence[Any], likes: Sequence[Any]
    ) -> Any:
        """Stand-ins for what an operation made; what it wrote in place is its argument."""
        if isinstance(made, Tensor):
            node.meta["val"] = _layout(made)
            if func._schema.is_mutable:
                written = args[0]
                if isinstance(written, StandIn) and made is likes[0]:
                    written.node = node
                    return written
                raise UntraceableError(f"{func} writes what is no part of the state")
            return StandIn(made, node, self._device)
        if isinstance(made, (list, tuple)) and all(isinstance(each, Tensor) for each in made):
            node.meta["val"] = [_layout(each) for each in made]
            parts = []
            for i, each in enumerate(made):
                part = self.graph.call_function(operator.getitem, (node, i))
                part.meta["val"] = _layout(each)
                parts.append(StandIn(each, part, self._device))
            return type(made)(parts)
        if made is None:  # a list written in place
            return None
        raise UntraceableError(f"{func} gives {type(made).__name__}, no tensor {source_line()}")


MOST_COPIED = 2**20
"""Bytes of a tensor up to which a trace copies it; a larger one, such as replay, is empty."""


def _copy(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, or zeros that take none until they are written."""
    if tensor.nbytes <= MOST_COPIED or tensor.device.type != "cpu":
        return torch.zeros_like(tensor).copy_(tensor)
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    flags |= 0x4000 if sys.platform == "linux" else 0  # nothing reserves what this could grow to
    memory = mmap.mmap(-1, size * tensor.itemsize, flags)
    zeros = torch.frombuffer(memory, dtype=tensor.dtype)
    return zeros.as_strided(tensor.size(), tensor.stride())


def _layout(tensor: Tensor) -> Tensor:
    """A tensor without memory."""
    size, stride = tensor.size(), tensor.stride()
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")


_TORCH = os.path.dirname(torch.__file__)
_OWN = {__file__, tree.__file__}


def source_line() -> str:
    """File and line of the innermost call outside torch, such as "dqn.py:234"; "" if `trace` itself
    calls."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not trace.__code__:
        path = frame.f_code.co_filename
        if not path.startswith(_TORCH) and path not in _OWN and path[:1] != "<":
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


DECOMPOSED = (
    "nan_to_num", "softplus", "softplus_backward", "leaky_relu", "leaky_relu_backward", "elu",
    "elu_backward", "hardtanh", "hardtanh_backward", "silu", "gelu", "hardsigmoid", "linspace",
    "tril", "triu", "_softmax", "_softmax_backward_data", "_log_softmax",
    "_log_softmax_backward_data", "logsumexp", "heaviside", "xlogy",
    "logit", "huber_loss", "sigmoid_backward", "tanh_backward", "select_backward",
    "slice_backward", "aminmax", "sinc", "log_sigmoid_forward", "count_nonzero", "trace",
)  # fmt: skip
"""Operations that are traced as torch's own compositions of simpler ones."""


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import get_decompositions

    return dict(get_decompositions([getattr(torch.ops.aten, name) for name in DECOMPOSED]))


def trace(function: Callable[..., Any], state: Any, inputs: tuple[Any, ...]) -> Graph:
    """Trace a function, gradients included.

    Args:
        function: takes the state and the inputs; returns a tree of tensors.
        state: tree of the tensors of one member; only shapes, strides and dtypes are read.
        inputs: trees of tensors, likewise.

    Raises:
        UntraceableError: the function reads numbers.
        Exception: it fails.
    """
    leaves = tree.leaves(state)
    recorder = _Recorder(leaves[0].device)
    carried = [recorder.argument(tensor).requires_grad_(tensor.requires_grad) for tensor in leaves]
    given = [recorder.argument(tensor) for tensor in tree.leaves(inputs)]
    with recorder:
        made = function(tree.replace(state, carried), *tree.replace(inputs, given))
    tensors = tree.leaves(made)
    results = [recorder.argument(torch.zeros(t.shape, dtype=t.dtype)) for t in tensors]
    with recorder:
        for result, tensor in zip(results, tensors, strict=True):
            result.copy_(tensor.detach())
    num_arguments = len(carried) + len(given) + len(results)
    # Constants were found before the last arguments were made.
    constants = [tensor for tensor, _ in recorder.constants.values()]
    _constants_last(recorder.graph)
    shapes = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors]
    return Graph(recorder.graph, num_arguments, tree.replace(made, shapes), constants)


def _constants_last(graph: torch.fx.Graph) -> None:
    """Move the placeholders of constants behind those of arguments."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    last = [node for node in placeholders if node.name.startswith("argument")][-1]
    for node in placeholders:
        if node.name.startswith("constant"):
            last.append(node)
            last = node
