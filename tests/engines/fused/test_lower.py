"""Each operation, alone, against torch: integers, bools and moves exactly, as is whatever is
rounded once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fast.engines.fused import lower
from dqn_fast.engines.fused.elementwise import POINTWISE
from dqn_fast.engines.fused.lower import UnknownOperationError
from dqn_fast.engines.fused.toolchains import sanitizer_preload
from dqn_fast.engines.fused.trace import UntraceableError
from tests.engines.fused.programs import (
    MEMBERS,
    Case,
    Compiled,
    Spec,
    build_plan,
    compile_cases,
    flags,
    floats,
    indices,
    integers,
)

SIZES = (1, 4, 8, 9, 16, 17, 64)

uint8, int32, int64, float32 = torch.uint8, torch.int32, torch.int64, torch.float32


def bytes_(*shape: int) -> Spec:
    return Spec(shape, uint8, 0, 256)


def positive(*shape: int, scale: int = 2) -> Spec:
    """Integers from 1, for divisors."""
    return Spec(shape, int64, 1, 1 + scale, nasty=False)


# Torch computes these functions by SLEEF in vectors and by libm at their ends, and the program by
# libm, so both are wrong by up to one unit in the last place.
TRANSCENDENTAL = {
    "exp", "log", "sin", "cos", "tan", "tanh", "asin", "acos", "atan", "log2", "log10", "log1p",
    "exp2", "expm1", "sinh", "cosh",
}  # fmt: skip
ROUNDED_ONCE = {
    "neg", "abs", "floor", "ceil", "round", "trunc", "sign", "reciprocal", "square",
    "relu", "isfinite", "isnan", "isinf", "isposinf", "isneginf", "logical_not",
    "frac", "positive", "signbit",
}  # fmt: skip

UNARY = [
    *(Case(f"unary_{n}", getattr(torch, n), [floats(17)], ulp=2) for n in sorted(TRANSCENDENTAL)),
    *(
        Case(f"unary_{n}", getattr(torch, n), [floats(17)], any_zero=n == "relu")
        for n in sorted(ROUNDED_ONCE)
    ),
    # Correctly rounded here; torch's vectors are not.
    Case("unary_sqrt", torch.sqrt, [floats(17)], ulp=1),
    # 1 / (1 + exp(-x)): torch's exponential is wrong by one unit and its sum and quotient add some.
    Case("unary_sigmoid", torch.sigmoid, [floats(17)], ulp=3),
    Case("unary_rsqrt", torch.rsqrt, [floats(17)], ulp=2),
    *(
        Case(f"unary_{n}_{str(t)[6:]}", getattr(torch, n), [integers(17, dtype=t)])
        for n in ("neg", "abs", "sign", "square", "logical_not", "bitwise_not", "isfinite")
        for t in (int64, int32, uint8)
    ),
    *(
        Case(f"unary_{n}_int64", getattr(torch, n), [integers(17)])
        for n in ("relu", "floor", "ceil", "trunc", "round", "isnan", "isinf")
    ),
    Case("unary_sqrt_int64", torch.sqrt, [integers(17)]),
    Case("unary_exp_int64", torch.exp, [integers(17)], ulp=2),
    Case("unary_not_bool", lambda x: (~x, torch.logical_not(x)), [flags(9)]),
]

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
EXACT_BINARY = (
    "add", "sub", "mul", "div", "maximum", "minimum", "fmod", "remainder", "floor_divide",
    *COMPARISONS,
)  # fmt: skip

BINARY = [
    *(
        Case(f"binary_{n}", getattr(torch, n), [floats(65), floats(65)], any_zero=n == "remainder")
        for n in EXACT_BINARY
    ),
    *(
        Case(
            f"binary_{n}_scalar",
            lambda x, n=n: getattr(torch, n)(x, -1.5),
            [floats(17)],
            any_zero=n == "remainder",
        )
        for n in ("add", "sub", "mul", "div", "fmod", "remainder", "floor_divide", *COMPARISONS)
    ),
    *(
        Case(f"binary_{n}_{str(t)[6:]}", getattr(torch, n), [integers(33, dtype=t)] * 2)
        for n in ("add", "sub", "mul", "div", "maximum", "minimum", *COMPARISONS)
        for t in (int64, int32, uint8)
    ),
    *(
        Case(f"binary_{n}_integers", getattr(torch, n), [integers(33), positive(33, scale=5)])
        for n in ("fmod", "remainder", "floor_divide")
    ),
    *(
        Case(
            f"binary_{n}_by_negative",
            lambda x, n=n: (getattr(torch, n)(x, -3), getattr(torch, n)(x, -1)),
            [Spec((17,), int64, -50, 50, nasty=False)],
        )
        for n in ("fmod", "remainder", "floor_divide")
    ),
    *(
        Case(
            f"binary_{n}_uint8",
            lambda x, y, n=n: getattr(torch, n)(x, y.clamp(min=1)),
            [bytes_(17), bytes_(17)],
        )
        for n in ("fmod", "remainder", "floor_divide")
    ),
    *(
        Case(f"binary_{n}_bool", getattr(torch, n), [flags(9), flags(9)])
        for n in (
            "add",
            "mul",
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
            "logical_and",
            "logical_or",
            "logical_xor",
            "eq",
            "ne",
            "lt",
            "maximum",
            "minimum",
        )
    ),
    *(
        Case(f"binary_{n}_int64", getattr(torch, n), [integers(9), integers(9)])
        for n in ("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or")
    ),
    *(
        Case(
            f"binary_{n}_{str(t)[6:]}",
            getattr(torch, n),
            [integers(9, dtype=t), Spec((9,), t, 0, 7, nasty=False)],
        )
        for n in ("bitwise_left_shift", "bitwise_right_shift")
        for t in (int64, int32, uint8)
    ),
    Case("binary_shift_operators", lambda x: (x << 3, x >> 2, 3 - x), [integers(9)]),
    Case("binary_logical_floats", lambda x, y: torch.logical_and(x, y), [floats(9), floats(9)]),
    Case("binary_atan2", torch.atan2, [floats(17), floats(17)], ulp=2),
    Case("binary_rsub", lambda x: (1 - x, torch.rsub(x, x, alpha=3)), [floats(17)]),
    Case("binary_add_alpha", lambda x, y: torch.add(x, y, alpha=0.3), [floats(17), floats(17)]),
    Case("binary_sub_alpha", lambda x, y: torch.sub(x, y, alpha=0.3), [floats(17), floats(17)]),
    Case("binary_add_alpha_int", lambda x, y: torch.add(x, y, alpha=-3), [integers(9)] * 2),
    Case(
        "binary_div_modes",
        lambda x, y: [torch.div(x, y, rounding_mode=mode) for mode in ("floor", "trunc")],
        [floats(33), floats(33)],
    ),
    Case(
        "binary_div_modes_int",
        lambda x, y: [torch.div(x, y, rounding_mode=mode) for mode in ("floor", "trunc")],
        [integers(33), positive(33)],
    ),
    Case("binary_pow_small", lambda x: (x**2, x**3, x**0.5, x**1, x**0), [floats(17)], ulp=1),
    Case("binary_pow_inverse", lambda x: (x**-1, x**-2, x**-0.5), [floats(17)], ulp=2),
    Case("binary_pow", lambda x, y: (x**y, 2.0**y, x**2.7), [floats(17), floats(17)], ulp=2),
    Case("binary_pow_int", lambda x: (x**2, x**3, x**5, x**0), [integers(17)]),
    Case("binary_pow_ints", torch.pow, [integers(17), Spec((17,), int64, 0, 9, nasty=False)]),
    Case("binary_xlogy", lambda x, y: (torch.hypot(x, y),), [floats(17), floats(17)], ulp=2),
]

MORE = [
    Case("where", torch.where, [flags(17), floats(17), floats(17)]),
    Case("where_scalars", lambda c, x: (torch.where(c, x, 0), torch.where(c, 1, x)),
         [flags(9), floats(9)]),
    Case("where_promotes", torch.where, [flags(9), integers(9), floats(9)]),
    Case("where_broadcasts", torch.where, [flags(3, 1), floats(1, 9), floats()]),
    Case("clamp", lambda x: (x.clamp(-1, 1), x.clamp(min=0.5), x.clamp(max=0.5)), [floats(17)],
         any_zero=True),
    Case("clamp_names", lambda x: (x.clamp_min(0.5), x.clamp_max(0.5), x.clip(0, 1)), [floats(9)],
         any_zero=True),
    Case("clamp_tensors", lambda x, a, b: (x.clamp(a, b), x.clamp(min=a), x.clamp(max=b)),
         [floats(17), floats(17), floats(17)], any_zero=True),
    Case("clamp_ints", lambda x: (x.clamp(-1, 4), x.clamp(min=0)), [integers(17)]),
    Case("clamp_int_by_float", lambda x: x.clamp(-1.5, 2.5), [integers(17)]),
    # The product is rounded, then the sum; torch fuses both in vectors and not at their ends.
    Case("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.3), [floats(17)] * 3, ulp=2,
         atol=1e-5),
    Case("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.3), [floats(17)] * 3, ulp=2,
         atol=1e-5),
    Case("lerp", lambda x, y: (torch.lerp(x, y, 0.3), torch.lerp(x, y, 0.7)), [floats(16)] * 2),
    Case("lerp_tensor", lambda x, y, z: torch.lerp(x, y, z), [floats(16)] * 3),
    Case("masked_fill", lambda x, c: (x.masked_fill(c, -1.0), x.masked_fill(c, float("-inf"))),
         [floats(9), flags(9)]),
    Case("smooth_l1", lambda x, y: F.smooth_l1_loss(x, y, reduction="none"), [floats(16)] * 2,
         ulp=1),
    Case("mse", lambda x, y: F.mse_loss(x, y, reduction="none"), [floats(16)] * 2),
    Case("gradient_smooth_l1",
         lambda x, y: torch.autograd.grad(F.smooth_l1_loss(x, y, reduction="none").sum(), x),
         [floats(16, learns=True), floats(16)], ulp=1),
    Case("gradient_mse",
         lambda x, y: torch.autograd.grad(F.mse_loss(x, y, reduction="none").sum(), x),
         [floats(16, learns=True), floats(16)], ulp=1),
    Case("gradient_relu", lambda x: torch.autograd.grad(F.relu(x).sum(), x),
         [floats(16, learns=True)]),
    Case("nan_to_num", lambda x: torch.nan_to_num(x, 0.0, 1.0, -1.0), [floats(17)]),
    Case("copysign", torch.copysign, [floats(17)] * 2),
    Case("heaviside", lambda x: (x > 0).float() * 2 - 1, [floats(17)]),
    Case("softplus", lambda x: F.softplus(x), [floats(16)], ulp=4, atol=1e-6),
    Case("leaky_relu", lambda x: (F.leaky_relu(x), F.elu(x)), [floats(16)], ulp=4, atol=1e-6),
    Case("hardtanh", lambda x: F.hardtanh(x, -0.5, 0.5), [floats(16)], any_zero=True),
]  # fmt: skip

# Casts of numbers that the target cannot hold are undefined, in torch as in C++.
TAME = floats(9, nasty=False)
TYPES = [
    Case("cast_from_float", lambda x: (x.long(), x.int(), x.bool(), x.float()), [TAME]),
    Case("cast_float_nasty_to_bool", lambda x: x.bool(), [floats(17)]),
    Case("cast_from_int", lambda x: (x.float(), x.int(), x.bool(), x.to(uint8)), [integers(9)]),
    Case("cast_from_byte", lambda x: (x.float(), x.int(), x.bool(), x.long()), [bytes_(9)]),
    Case("cast_from_bool", lambda x: (x.float(), x.int(), x.to(uint8), x.long()), [flags(9)]),
    Case("type_as", lambda x, y: (x.to(y), y.type_as(x)), [integers(9), TAME]),
    Case("promote_int_float", lambda x: (x + 0.5, x * 2.5, x / 2, x - 1), [integers(9)]),
    Case("promote_zero_dim", lambda x, y, z: (x + y, z * x, x * y), [integers(9), floats(), TAME]),
    Case("promote_compare", lambda x, y: (x < y, x == 2.5, x >= y), [integers(9), TAME]),
    Case("promote_bytes", lambda x: (x + x, x * 3, x - 200, x + 0.5, x // 7), [bytes_(17)]),
    Case("promote_byte_int", lambda x, y: (x + y, x < y), [bytes_(9), integers(9)]),
    Case("promote_byte_int_zero_dim", lambda x, y: (x + y, x < y), [bytes_(9), integers()]),
    Case("promote_bools", lambda x, y: (x + y, x * y, x + 1, x * 2.5, x & y), [flags(9), flags(9)]),
    Case("promote_int32", lambda x, y: (x + y, x * 2, x + 1.5), [integers(9, dtype=int32),
                                                               integers(9)]),
    Case("in_place_keeps_type", lambda x, y: x.add_(y).mul_(2), [integers(9, dtype=int32),
                                                               integers(9)]),
    Case("in_place_compare", lambda x: x.lt_(0.5), [floats(9)]),
]  # fmt: skip


def _created(x: Tensor) -> list[Tensor]:
    return [
        torch.arange(5), torch.arange(2, 11, 3), torch.arange(5, dtype=float32),
        torch.arange(0, 1, 0.25), torch.arange(5, 0, -2), torch.zeros(3), torch.ones(2, 3),
        torch.full((3,), -0.5), torch.full((2,), 7), torch.zeros_like(x), torch.ones_like(x),
        torch.full_like(x, 3), x.new_zeros(2), x.new_ones(2, 2), x.new_full((3,), 0.1),
        torch.tensor([1, 2, 3]) + x[0].long() * 0, torch.eye(3), torch.linspace(0, 1, 5),
        torch.empty_like(x).fill_(2), x.new_empty(3).zero_(), torch.empty(2).fill_(1),
        torch.scalar_tensor(2.5), torch.tensor(True), torch.zeros(2, dtype=torch.bool),
        torch.full((2,), True), torch.zeros(0), torch.ones((), dtype=int64),
    ]  # fmt: skip


CREATED = [
    Case("created", _created, [floats(4, nasty=False)]),
    Case("full_of_tensor", lambda x: x.new_zeros(4).fill_(x[0, 0]), [floats(2, 2)]),
    Case("created_like_ints", lambda x: (torch.ones_like(x), torch.zeros_like(x, dtype=float32)),
         [integers(3)]),
    Case("ramp", lambda x: x + torch.linspace(-1, 1, 9), [floats(9)], ulp=1, atol=1e-6),
    Case("identity", lambda x: x * torch.eye(4), [floats(4, 4, nasty=False)]),
]  # fmt: skip


def _views(x: Tensor) -> list[Tensor]:  # x: [4, 3, 2]
    a, b = x.split(2)
    c, d = x.split([1, 2], 1)
    e, f, g = x.unbind(1)
    return [
        x.view(12, 2), x.reshape(3, -1), x.flatten(), x.flatten(1), x.unsqueeze(0),
        x.unsqueeze(-1), x.transpose(0, 2), x.transpose(-1, -2).reshape(-1), x.permute(2, 0, 1),
        x.permute(-1, 0, 1).reshape(4, 6), x[0].t(), x[0].T, x[:1].squeeze(0), x[:1].squeeze(),
        x[:1].expand(5, 3, 2), x[:, :1].expand(-1, 3, -1), x.select(1, -1), x[-1], x[1:3], x[::2],
        x[..., 1], x[:, None, 0], x[-3:-1], x[2:100], x[1:1], x.narrow(0, 1, 2), a, b, c, d, e, f,
        g, *x.chunk(3, -2), *x.tensor_split(2), x.mT, x.movedim(0, -1), x.swapaxes(0, 1),
        x.expand_as(x), x[0].broadcast_to(4, 3, 2), x.unflatten(0, (2, 2)), x.contiguous(),
        x.transpose(0, 1).contiguous(), x.transpose(0, 1).clone(), x.view_as(x), x.diagonal(),
        x.detach(), x[0, 0, 0], x.ravel(), x.flip(0), x.flip(0, -1), x.roll(1, 0), x.roll(-2),
        x.repeat(2, 1, 1), x.repeat_interleave(2, 0), x.tile(2), torch.atleast_2d(x[0, 0]),
    ]  # fmt: skip


VIEWED = [
    Case("views", _views, [floats(4, 3, 2)]),
    Case("views_large", lambda x: (x.t(), x.view(9, 68), x.flip(1), x.roll(5, 1), x[3:, 4::3]),
         [floats(36, 17)]),
    Case("views_ints", _views, [integers(4, 3, 2)]),
    Case("cat", lambda x, y: [torch.cat([x, y], 0), torch.cat([x, x, y], -2),
                              torch.cat([y[:1], x[:1]], 1), torch.cat([x, y[:0]])],
         [floats(4, 3), floats(5, 3)]),
    Case("cat_large", lambda x, y: torch.cat([x, y], 1) * 2, [floats(17, 9), floats(17, 64)]),
    Case("cat_promotes", lambda x, y: torch.cat([x, y]), [integers(3), floats(9)]),
    Case("cat_then_flat", lambda x, y: torch.cat([x, y], 1).flatten() + 1, [floats(9, 3)] * 2),
    Case("stack", lambda x, y: [torch.stack([x, y], i) for i in (0, 1, 2, -1)],
         [floats(9, 3), floats(9, 3)]),
    Case("stack_then_max", lambda x, y: torch.stack([x, y], 1).view(-1, 2).amax(1),
         [floats(17), floats(17)]),
    Case("stack_zero_dim", lambda x: torch.stack([x[0], x[1] * 2, x[2]]), [floats(3)]),
    Case("one_hot", lambda x: F.one_hot(x, 5), [indices(9, below=5)]),
    Case("triangle", lambda x: (x.tril(), x.triu(1)), [floats(4, 4)]),
    Case("bytes_as_numbers", lambda x: [x.view(t) for t in (float32, int32, int64, torch.int16)],
         [bytes_(5, 32)]),
    Case("some_bytes", lambda x: (x[:, 8:24].view(float32), (x > 99).to(uint8).view(torch.bool)),
         [bytes_(5, 32)]),
    Case("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), [floats(3), floats(9)]),
]  # fmt: skip


# ------------------------------------------------------------------------------------ reductions


def _reductions(x: Tensor) -> list[Tensor]:
    """All dims, kept dims and several dims of [a, b]."""
    made = [x.sum(), x.sum(0), x.sum(1, keepdim=True), x.sum((0, 1)), x.sum((-1, 0), keepdim=True)]
    return [*made, x.mean(), x.mean(0), x.mean(-1, keepdim=True)]


def _extremes(x: Tensor) -> list[Tensor]:
    return [
        x.max(), x.min(), *x.max(0), *x.max(1, keepdim=True), *x.min(1), x.amax(), x.amax(0),
        x.amin((0, 1), keepdim=True), x.argmax(), x.argmax(1), x.argmin(0, keepdim=True),
        x.argmin(-1),
    ]  # fmt: skip


def _truth(x: Tensor) -> list[Tensor]:
    return [x.any(), x.all(), x.any(0), x.all(1, keepdim=True), x.any((0, 1)), (x > 0).any(-1)]


SHAPES = ((1, 1), (1, 8), (3, 3), (8, 9), (9, 8), (9, 1), (100, 3), (3, 100), (1, 100))

# Sums are taken in another order than torch's, and so are wrong by their own rounding.
REDUCED = [
    *(
        Case(f"sums_{a}_{b}", _reductions, [floats(a, b, nasty=False)], ulp=8, atol=3e-5)
        for a, b in SHAPES
    ),
    *(Case(f"extremes_{a}_{b}", _extremes, [floats(a, b)], any_zero=True) for a, b in SHAPES),
    *(
        Case(f"ties_{a}_{b}", _extremes, [Spec((a, b), int64, 0, 3)])
        for a, b in ((3, 3), (9, 8), (3, 100))
    ),
    *(Case(f"truth_{a}_{b}", _truth, [flags(a, b)]) for a, b in ((1, 1), (3, 9), (100, 3))),
    Case("truth_floats", _truth, [floats(3, 9)]),
    Case("truth_none", lambda x: ((x > 1e9).any(), (x < 1e9).all()), [TAME]),
    Case("sums_ints", lambda x: (x.sum(), x.sum(0), x.sum(1)), [integers(9, 17)]),
    Case("sums_bytes", lambda x: (x.sum(), x.sum(0)), [bytes_(9, 3)]),
    Case("sums_bools", lambda x: (x.sum(), x.sum(1), x.float().mean()), [flags(9, 17)], ulp=1),
    Case("sums_nan", lambda x: (x.sum(0), x.mean(1)), [floats(3, 2)], ulp=8, atol=1e-5,),
    Case("sum_of_nothing", lambda x: (x[:0].sum(0), x[:0].sum()), [floats(4, 3)]),
    Case("sum_three", lambda x: (x.sum((0, 2)), x.sum(1), x.sum((1, 2), keepdim=True)),
         [floats(9, 3, 17, nasty=False)], ulp=8, atol=3e-5),
    Case("sum_zero_dim", lambda x: (x.sum(), x.max(), x.mean(), x.any(), x.argmax()), [floats()],
         any_zero=True),
    Case("prod", lambda x: (x.prod(), x.prod(1), x.prod(0, keepdim=True)),
         [floats(3, 4, nasty=False)], ulp=8),
    Case("prod_ints", lambda x: (x.prod(), x.prod(1)), [integers(3, 9)]),
    Case("cumsum", lambda x: (x.cumsum(0), x.cumsum(1)), [floats(4, 6, nasty=False)], ulp=8,
         atol=1e-5),
    Case("cumprod", lambda x: (x.cumprod(0), x.cumprod(1)), [floats(3, 5, nasty=False)], ulp=8),
    Case("cumsum_ints", lambda x: (x.cumsum(0), x.cumsum(-1)), [integers(4, 6)]),
    Case("norm", lambda x: (x.norm(), x.norm(dim=1), torch.linalg.vector_norm(x, dim=0)),
         [floats(9, 3, nasty=False)], ulp=8),
    Case("softmax", lambda x: (x.softmax(-1), x.softmax(0), x.log_softmax(1)),
         [floats(3, 4, nasty=False)], ulp=16, atol=1e-6),
    Case("softmax_large", lambda x: (x.softmax(-1), x.log_softmax(1), x.logsumexp(0)),
         [floats(9, 33, nasty=False)], ulp=16, atol=2e-6),
    Case("count", lambda x: (x > 0).sum(-1), [floats(3, 17)]),
    Case("max_of_sums", lambda x, y: (x + y).amax(1) - (x + y).mean(1), [floats(9, 17, nasty=False)
         ] * 2, ulp=8, atol=1e-5),
]  # fmt: skip


# --------------------------------------------------------------------------------- computed places


def _rows(x: Tensor, i: Tensor) -> list[Tensor]:
    return [x[i], x.index_select(0, i), x[i, 1], x[:, 0][i], x[i].sum(1)]


PLACES = [
    *(
        Case(f"rows_{n}", _rows, [floats(n, 3, nasty=False), indices(9, below=n)], ulp=4, atol=1e-6)
        for n in (1, 3, 8, 9, 100)
    ),
    *(
        Case(f"gather_{n}", lambda x, i: (x.gather(1, i), (x * 2).gather(1, i),
                                          x.take_along_dim(i, 1)),
             [floats(9, n), indices(9, 2, below=n)])
        for n in (1, 3, 8, 9, 100)
    ),
    Case("gather_rows", lambda x, i: x.gather(0, i), [floats(9, 3), indices(4, 3, below=9)]),
    Case("gather_short", lambda x, i: x.gather(0, i), [floats(9, 5), indices(4, 3, below=9)]),
    Case("index_pairs", lambda x, i, j: (x[i, j], x[i[:, None], j], x[:, j], x[i, 0, ]),
         [floats(9, 5), indices(4, below=9), indices(4, below=5)]),
    Case("index_apart", lambda x, i, j: x[i, :, j],
         [floats(9, 5, 3), indices(4, below=9), indices(4, below=3)]),
    Case("index_negative", lambda x, i: (x[i], (x + 1)[i]),
         [floats(9), indices(5, below=9, low=-9)]),
    Case("index_few_negative", lambda x, i: (x[i], (x + 1)[i]),
         [floats(3), indices(5, below=3, low=-3)]),
    Case("index_matrix", lambda x, i: x[i], [floats(9, 2), indices(3, 4, below=9)]),
    Case("index_zero_dim", lambda x, i: (x[i[None]], x.index_select(0, i)),
         [floats(9), indices(below=9)]),
    Case("index_computed", lambda x, i: (x * 2)[i] + (x - 1).t()[:, i].t(),
         [floats(9, 9), indices(5, below=9)]),
    Case("index_int32", lambda x, i: x[i], [floats(9), indices(5, below=9, dtype=int32)]),
    Case("index_middle", lambda x, i: (x.index_select(1, i), x.index_select(-1, i[:2])),
         [floats(2, 9, 3), indices(4, below=3)]),
    Case("table", lambda s, t, a: s.copy_(t.long()[s, a]),
         [indices(9, below=7), indices(7, 4, below=7, dtype=uint8), indices(9, below=4)]),
    Case("scatter", lambda x, i, y: (x.scatter(1, i, y), x.scatter(1, i, 2.0)),
         [floats(9, 5), indices(9, 1, below=5), floats(9, 1)]),
    Case("scatter_add", lambda x, i, y: x.scatter_add(1, i, y),
         [floats(9, 5), indices(9, 3, below=5), floats(9, 3)]),
    Case("scatter_in_place", lambda x, i: x.scatter_(1, i, 1.0).clone(),
         [floats(9, 5), indices(9, 1, below=5)]),
    Case("gradient_gather", lambda x, i: torch.autograd.grad((x * x).gather(1, i).sum(), x),
         [floats(9, 3, learns=True, nasty=False), indices(9, 1, below=3)]),
    Case("searchsorted", lambda x: (
        torch.searchsorted(torch.tensor([0.0, 1.0, 2.0]), x),
        torch.searchsorted(torch.tensor([0.0, 1.0, 2.0]), x, right=True),
        torch.bucketize(x, torch.tensor([-1.0, 0.5])),
    ), [floats(17)]),
    Case("searchsorted_int32", lambda x: torch.searchsorted(
        torch.tensor([0, 3, 3, 7]), x, out_int32=True, side="right"), [integers(17)]),
    Case("index_copy", lambda x, i, y: (x.index_copy_(0, i, y), x.sum(0)),
         [floats(9, 3, nasty=False), Spec((1,), int64, 0, 9, nasty=False), floats(1, 3, nasty=False)
          ], ulp=8, atol=1e-5),
    Case("index_copy_two", lambda x, i, y: (x.index_copy_(0, torch.stack([i, (i + 1) % 9]), y),
                                            x.clone()),
         [floats(9, 3), indices(below=9), floats(2, 3)]),
    Case("index_put", lambda x, i, y: x.index_put_((i,), y).clone(),
         [floats(9), Spec((1,), int64, 0, 9, nasty=False), floats(1)]),
    Case("index_fill", lambda x, i: x.index_fill(0, i, 2.0), [floats(9, 2), indices(3, below=9)]),
    Case("index_add", lambda x, i, y: x.index_add(0, i, y),
         [floats(9, 2), indices(3, below=9), floats(3, 2)]),
    Case("take", lambda x, i: torch.take(x, i), [floats(3, 4), indices(7, below=12)]),
]  # fmt: skip


# --------------------------------------------------------------------------------------- products

PRODUCTS = [
    Case(f"mm_{a}_{b}_{c}", lambda x, y: x @ y,
         [floats(a, b, nasty=False), floats(b, c, nasty=False)],
         ulp=8, atol=1e-4)
    for a, b, c in ((1, 1, 1), (9, 4, 17), (64, 8, 3), (16, 33, 64))
] + [
    Case("mm_views", lambda x, y: (x.t() @ y, y.t() @ x, x @ x.t(), x[1:, 2:] @ y[:7].t()[:7]),
         [floats(9, 9, nasty=False), floats(9, 9, nasty=False)], ulp=8, atol=1e-4),
    Case("mm_stored_transposed", lambda x, y: (x @ y, (x + 1) @ y),
         [floats(9, 4, nasty=False, order=(1, 0)), floats(4, 17, nasty=False, order=(1, 0))],
         ulp=8, atol=1e-4),
    Case("bmm", lambda x, y: torch.bmm(x, y), [floats(1, 9, 4, nasty=False),
                                              floats(1, 4, 17, nasty=False)], ulp=8, atol=1e-4),
    Case("baddbmm", lambda b, x, y: torch.baddbmm(b, x, y.mT),
         [floats(1, 1, 17, nasty=False), floats(1, 9, 4, nasty=False),
          floats(1, 17, 4, nasty=False)], ulp=8, atol=1e-4),
    Case("addmm", lambda b, x, y: F.linear(x, y, b),
         [floats(17, nasty=False), floats(9, 4, nasty=False), floats(17, 4, nasty=False)],
         ulp=8, atol=1e-4),
    Case("mm_of_computed", lambda x, y: (torch.relu(x) @ (y * 2), torch.cat([x, x], 1) @
                                        torch.cat([y, y])),
         [floats(9, 4, nasty=False), floats(4, 17, nasty=False)], ulp=8, atol=1e-4),
    Case("mm_of_one_hot", lambda i, y: F.one_hot(i, 5).float() @ y,
         [indices(9, below=5), floats(5, 17, nasty=False)], ulp=8, atol=1e-4),
    Case("mm_of_rows", lambda x, i, y: x[i] @ y,
         [floats(9, 4, nasty=False), indices(16, below=9), floats(4, 17, nasty=False)],
         ulp=8, atol=1e-4),
    Case("mm_nothing", lambda x, y: (x[:0] @ y, x[:, :0] @ y[:0]),
         [floats(9, 4, nasty=False), floats(4, 17, nasty=False)]),
    Case("mv", lambda x, y: (x @ y, torch.dot(y, y)), [floats(9, 4, nasty=False),
                                                       floats(4, nasty=False)], ulp=8, atol=1e-4),
    Case("bmm_two", lambda x, y: torch.bmm(x, y), [floats(2, 3, 4, nasty=False),
                                                  floats(2, 4, 5, nasty=False)], ulp=8, atol=1e-4),
    Case("gradient_linear",
         lambda w, b, x: torch.autograd.grad(torch.relu(F.linear(x, w, b)).square().sum(), [w, b]),
         [floats(17, 4, nasty=False, learns=True), floats(17, nasty=False, learns=True),
          floats(9, 4, nasty=False)], ulp=8, atol=2e-3),
]  # fmt: skip


# -------------------------------------------------------------------------------------- in lists


def _foreach_in_place(x: Tensor, y: Tensor) -> None:
    both, others = [x, y], [y * 2, x * 3]
    torch._foreach_mul_(both, 0.5)
    torch._foreach_add_(both, others, alpha=0.25)
    torch._foreach_sub_(both, 1.0)
    torch._foreach_div_(both, torch._foreach_add(others, 100.0))
    torch._foreach_neg_(both)
    torch._foreach_lerp_(both, others, 0.1)


LISTS = [
    Case("foreach_in_place", _foreach_in_place, [floats(16, nasty=False)] * 2, ulp=4, atol=1e-6),
    Case("foreach_pure", lambda x, y: [
        *torch._foreach_add([x, y], [y, x]), *torch._foreach_mul([x, y], [y, x]),
        *torch._foreach_sqrt([x.abs(), y.abs()]), *torch._foreach_add([x, y], 1.5),
        *torch._foreach_sub([x, y], [y, x], alpha=2), *torch._foreach_mul([x, y], [2.0, 3.0]),
        *torch._foreach_maximum([x, y], 0.5), *torch._foreach_addcmul([x, y], [y, x], [x, y], 1),
    ], [floats(16, nasty=False), floats(16, nasty=False)], ulp=4, atol=1e-5),
    Case("foreach_tensor_scalar", lambda x, y: torch._foreach_mul([x, x], y.sum()),
         [floats(16, nasty=False), floats(1)]),
    Case("foreach_copy", lambda x, y: torch._foreach_copy_([x], [y]), [integers(9), TAME]),
    Case("foreach_zero", lambda x, y: torch._foreach_zero_([x, y]), [floats(9), floats(9)]),
    Case("foreach_norm", lambda x, y: torch._foreach_norm([x, y]), [floats(16, nasty=False)] * 2,
         ulp=8),
]  # fmt: skip

SIZED = [
    Case(f"size_{n}", lambda x, y: (x * 2 + y, (x > y) & (y < 1), torch.where(x > 0, x, y)),
         [floats(n), floats(n)])
    for n in SIZES
] + [
    Case("broadcast", lambda x, y, z: (x + y, x * z, y - z, x + z[None, None]),
         [floats(9, 1, 4), floats(3, 1), floats()]),
    Case("broadcast_column", lambda x, y: (x[:, None] - y, (x[:, None] == y).any(1)),
         [floats(17), floats(9)]),
    Case("empty", lambda x: (x[:0] + 1, x[:, :0] * 2, torch.cat([x[:0], x]), x[:0].clone()),
         [floats(4, 3)]),
    Case("zero_dim", lambda x, y: (x + y, x * 2, x.unsqueeze(0), -y), [floats(), floats()]),
]  # fmt: skip

# Torch stops at an index outside; a program that cannot stop reads the last row instead.
OUTSIDE = [
    Case("outside_rows", lambda x, i: x[i], [floats(9, 3), integers(17)]),
    Case("outside_select", lambda x, i: x.index_select(0, i), [floats(9, 3), integers(17)]),
    Case("outside_gather", lambda x, i: x.gather(1, i), [floats(17, 9), integers(17, 1)]),
    Case("outside_few", lambda x, i: (x * 2)[i], [floats(3), integers(17)]),
    Case("outside_pairs", lambda x, i: x[i, i], [floats(9, 3), integers(17)]),
    Case("outside_write", lambda x, i, y: x.index_copy_(0, i, y),
         [floats(9, 3), integers(1), floats(1, 3)]),
    Case("division_by_zero", lambda i, j: (i // j, i % j, torch.fmod(i, j),
                                           torch.div(i, j, rounding_mode="trunc")),
         [integers(17), integers(17)]),
]  # fmt: skip
OUTSIDE = [replace(case, is_wrong=True) for case in OUTSIDE]

CASES = [
    *UNARY, *BINARY, *MORE, *TYPES, *CREATED, *VIEWED, *REDUCED, *PLACES, *PRODUCTS, *LISTS, *SIZED,
    *OUTSIDE,
]  # fmt: skip

TRACING = UntraceableError, IndexError, RuntimeError
"""Raised where a function reads numbers, and where torch itself refuses it."""


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile_cases(CASES)


def of(group: list[Case]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("case", group, ids=lambda case: case.name)


@of(UNARY)
def test_functions_of_one_number(compiled, case):
    """NaN, infinities and negative zeros included."""
    compiled.check(case)


@of(BINARY)
def test_functions_of_two_numbers(compiled, case):
    """Integers wrap, divide towards the side that torch does, and are shifted as by torch."""
    compiled.check(case)


@of(MORE)
def test_other_functions_of_elements(compiled, case):
    """Choices, bounds, losses and their gradients."""
    compiled.check(case)


@of(TYPES)
def test_types_are_promoted(compiled, case):
    """Results have torch's types and the numbers that follow from them."""
    compiled.check(case)


@of(CREATED)
def test_new_tensors(compiled, case):
    """Constants, ranges and tables of the function itself."""
    compiled.check(case)


@of(VIEWED)
def test_moves(compiled, case):
    """Views and joins move the right elements."""
    compiled.check(case)


@of(REDUCED)
def test_reductions(compiled, case):
    """All dims, kept dims and several dims of few and of many elements; the first of equals."""
    compiled.check(case)


@of(PLACES)
def test_computed_places(compiled, case):
    """Gathers, table look-ups, scatters and searches."""
    compiled.check(case)


@of(PRODUCTS)
def test_products(compiled, case):
    """Of matrices as they are, of views and of computed ones."""
    compiled.check(case)


@of(LISTS)
def test_lists_of_tensors(compiled, case):
    """`_foreach_*`."""
    compiled.check(case)


@of(SIZED)
def test_sizes_and_broadcasts(compiled, case):
    """Around the widths of vectors, and nothing at all."""
    compiled.check(case)


def test_every_known_operation_is_tried(compiled):
    """The cases above leave out no operation of the tables."""
    known = {*POINTWISE, *lower.CREATE, *lower.VIEWS, *lower.REDUCTIONS}
    known |= {n.removeprefix("_make_") for n in dir(lower.Lowering) if n.startswith("_make_")}
    tried = {name.rstrip("_") for name in compiled.operations} | compiled.operations
    tried |= {name.removeprefix("_foreach_").rstrip("_") for name in compiled.operations}
    assert known <= tried, known - tried


def _mask(x: Tensor) -> Tensor:
    return x[x > 0]


REFUSED = {
    "nonzero": lambda x: torch.nonzero(x),
    "index": _mask,
    "unfold": lambda x: x.unfold(0, 2, 1),
    "sort": lambda x: x.sort()[0],
    "topk": lambda x: x.topk(2)[0],
    "median": lambda x: x.median(),
    "float64": lambda x: (x.double() + 1).float(),
    "float16": lambda x: (x.half() + 1).float(),
    "bfloat16": lambda x: (x.bfloat16() + 1).float(),
    "int8": lambda x: x.to(torch.int8).sum(),
    "complex64": lambda x: torch.complex(x, x).abs(),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)),
    "view_bits": lambda x: x.view(int32),
    "rand": lambda x: x + torch.rand(9),
    "bernoulli": lambda x: torch.bernoulli(x.clamp(0, 1)),
    "item": lambda x: x + x[0].item(),
    "if": lambda x: x if x.sum() > 0 else -x,
    "rounding": lambda x: x.round(decimals=2),
    "norm": lambda x: torch.linalg.vector_norm(x, ord=1),
    "nothing": lambda x: x[:0][x[:2].long()],
    "median_of": lambda x: x.kthvalue(1)[0],
    "scatter": lambda x: x.scatter(0, x[:9].long(), x * 2),
    "repeats": lambda x: x[:1].expand(9).add_(1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused(what):
    """While the function is traced, lowered or planned: never a wrong number."""
    case = Case("refused", REFUSED[what], [floats(9, nasty=False)])
    with pytest.raises(Exception) as raised:
        build_plan(case)
    assert isinstance(raised.value, (UnknownOperationError, *TRACING)), raised.value


def test_a_refusal_names_the_operation_and_its_line():
    """The innermost line outside of torch that calls it."""
    with pytest.raises(UnknownOperationError) as raised:
        build_plan(Case("refused", REFUSED["unfold"], [floats(9)]))
    line = _line_of('"unfold": lambda')
    assert f"test_lower.py:{line} unfold" in str(raised.value)


def _line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("case", OUTSIDE, ids=lambda case: case.name)
def test_indices_outside_touch_no_foreign_memory(compiled, case):
    """The memory around each tensor stays as it is, and no number comes from there."""
    for attempt in range(3):
        values = [spec.values(attempt) for spec in case.state]
        rooms = [torch.full((3, *v.shape), 77, dtype=v.dtype) for v in values]
        for room, value in zip(rooms, values, strict=True):
            room[1] = value
        made = compiled.run(case, [room[1] for room in rooms])
        for room in rooms:
            assert (room[[0, 2]] == 77).all()
        if case.name not in ("outside_write", "division_by_zero"):
            own = values[0].flatten().tolist()
            own += [2 * number for number in own] + [0.0]  # of what is too small for a float
            assert all(number in own or number != number for number in made[0].flatten().tolist())


def test_an_index_outside_reads_the_last_row(compiled):
    """Also one that is negative, where torch counts none from the end."""
    case = next(case for case in OUTSIDE if case.name == "outside_select")
    x = torch.randn(MEMBERS, 9, 3)
    i = torch.randint(-(2**62), 2**62, (MEMBERS, 17))
    (made,) = compiled.run(case, [x, i])
    assert torch.equal(made[0], x[:, -1:].expand(MEMBERS, 17, 3))


@pytest.mark.slow
def test_no_case_does_what_cplusplus_forbids(tmp_path):
    """Neither memory outside nor undefined arithmetic, says the compiler's sanitizer."""
    environ = {**os.environ, "LD_PRELOAD": ":".join(sanitizer_preload())}
    environ["ASAN_OPTIONS"] = "detect_leaks=0"
    made = subprocess.run(
        [sys.executable, "-c", SANITIZED], env=environ, capture_output=True, text=True
    )
    assert made.stdout.strip().endswith("done"), (made.stdout + made.stderr)[-3000:]


SANITIZED = """
from tests.engines.fused import test_lower, test_planner
from tests.engines.fused.programs import compile_cases
cases = [*test_lower.CASES, *test_planner.CASES]
compiled = compile_cases(cases, sanitize=True)
for case in cases:
    print(case.name, flush=True)
    for attempt in range(3):
        compiled.run(case, [spec.values(attempt) for spec in case.state])
print("done")
"""
