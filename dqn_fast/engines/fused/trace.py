"""Traces functions of an algorithm for one member, as graphs of plain operations."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fast import tree


class Graph(NamedTuple):
    """A traced function.

    Attributes:
        module: takes the tensors of the state, of the inputs and of the results, which it writes,
            then the constants.
        results: stand-ins in the shapes of the results, a tree.
        constants: tensors of the function itself, such as an environment's tables.
    """

    module: torch.fx.GraphModule
    results: Any
    constants: list[Tensor]


def trace(function: Callable[..., Any], state: Any, inputs: tuple[Any, ...]) -> Graph:
    """Trace a function, gradients included.

    Args:
        function: takes the state and the inputs; returns a tree of tensors.
        state: tree of the tensors of one member; only shapes, strides and dtypes are read.
        inputs: trees of tensors, likewise.

    Raises:
        Exception: the function cannot be traced as a whole.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    learns = [tensor.requires_grad for tensor in tree.leaves(state)]
    num_state, num_inputs = len(learns), len(tree.leaves(inputs))

    def call(tensors: Any) -> Any:
        given = iter(tensors)
        carried = [
            tensor.detach().requires_grad_() if learning else tensor
            for learning, tensor in zip(learns, given, strict=False)
        ]
        return function(tree.replace(state, carried), *tree.replace(inputs, given))

    def flat(*tensors: Tensor) -> list[Tensor]:
        with _source_lines():
            made = tree.leaves(call(tensors[: num_state + num_inputs]))
        for result, tensor in zip(tensors[num_state + num_inputs :], made, strict=True):
            result.copy_(tensor.detach())
        return []

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about names it deprecated
        # Clones: a tensor that is given twice would be taken for one input.
        example: list[Tensor] = [mode.from_tensor(t.detach()) for t in tree.leaves(state)]
        example += [mode.from_tensor(t).clone() for t in tree.leaves(inputs)]
        made = call(example)
        results = [t.detach().new_empty(t.shape) for t in tree.leaves(made)]
        module = make_fx(flat, _decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True)(
            *example, *results
        )
    return Graph(module, tree.replace(made, results), lift_constants(module))


def _source_lines() -> AbstractContextManager[Any]:
    """A context in which each node of the graph being traced gets meta "source", such as
    "dqn.py:234": the innermost line outside of torch that called it."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.utils._python_dispatch import TorchDispatchMode

    proxy_mode = get_proxy_mode()
    assert proxy_mode is not None
    graph = proxy_mode.tracer.graph
    skipped = os.path.dirname(torch.__file__), __file__, "<"  # "<string>": of a NamedTuple

    class Lines(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = function(*args, **(kwargs or {}))
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename.startswith(skipped):
                frame = frame.f_back
            if frame is not None:
                line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                for node in reversed(graph.nodes):  # all that this call made
                    if node.op == "placeholder" or "source" in node.meta:
                        break
                    node.meta["source"] = line
            return made

    return Lines()


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


def lift_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its last inputs; return the tensors."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    last = placeholders[-1] if placeholders else None
    lifted: dict[str, torch.fx.Node] = {}
    constants: list[Tensor] = []
    for node in list(graph.graph.nodes):
        name = str(node.target)
        if node.op != "get_attr" or not isinstance(value := getattr(graph, name), Tensor):
            continue
        if name not in lifted:
            constants.append(value.detach())
            with graph.graph.inserting_after(last):
                last = lifted[name] = graph.graph.placeholder(f"constant_{len(constants)}")
            last.meta["val"] = value.detach()
        node.replace_all_uses_with(lifted[name])
        graph.graph.erase_node(node)
    for name in lifted:
        delattr(graph, name)
    return constants
