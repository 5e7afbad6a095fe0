"""Operations element by element: what torch computes of scalars, as expressions.

Each function of `POINTWISE` takes the type to compute in, then the arguments in the order of
torch's schema: an expression for each tensor, and numbers, None or strings as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dqn_fast.engines.fused.expr import Expr, cast, chosen, const, op

Function = Callable[..., Expr]


def _given(value: Any, dtype: torch.dtype) -> Expr:
    return value if isinstance(value, Expr) else const(value, dtype)


def _binary(name: str) -> Function:
    return lambda dtype, a, b: op(name, dtype, _given(a, dtype), _given(b, dtype))


def _compare(name: str) -> Function:
    return lambda dtype, a, b: op(name, torch.bool, _given(a, dtype), _given(b, dtype))


def _unary(name: str) -> Function:
    return lambda dtype, a: op(name, dtype, a)


def _rounding(name: str) -> Function:
    return lambda dtype, a: op(name, dtype, a) if dtype.is_floating_point else a


def _add(dtype: torch.dtype, a: Any, b: Any, alpha: float = 1) -> Expr:
    a, b = _given(a, dtype), _given(b, dtype)
    if alpha == 1:
        return op("or" if dtype == torch.bool else "add", dtype, a, b)
    return _scaled_add(dtype, a, b, alpha)


def _scaled_add(dtype: torch.dtype, a: Expr, b: Expr, alpha: float) -> Expr:
    factor = const(alpha, dtype)
    if dtype.is_floating_point:  # as torch's kernels
        return op("fma", dtype, b, factor, a)
    return op("add", dtype, a, op("mul", dtype, b, factor))


def _sub(dtype: torch.dtype, a: Any, b: Any, alpha: float = 1) -> Expr:
    a, b = _given(a, dtype), _given(b, dtype)
    return op("sub", dtype, a, b) if alpha == 1 else _scaled_add(dtype, a, b, -alpha)


def _rsub(dtype: torch.dtype, a: Any, b: Any, alpha: float = 1) -> Expr:
    return _sub(dtype, b, a, alpha)


def _mul(dtype: torch.dtype, a: Any, b: Any) -> Expr:
    return op("and" if dtype == torch.bool else "mul", dtype, _given(a, dtype), _given(b, dtype))


def _div(dtype: torch.dtype, a: Any, b: Any, rounding_mode: str | None = None) -> Expr:
    a, b = _given(a, dtype), _given(b, dtype)
    if rounding_mode is None:
        return op("div", dtype, a, b)
    return op("floor_divide" if rounding_mode == "floor" else "trunc_divide", dtype, a, b)


def _pow(dtype: torch.dtype, a: Any, b: Any) -> Expr:
    if isinstance(b, Expr) or not isinstance(a, Expr):
        return op("pow", dtype, _given(a, dtype), _given(b, dtype))
    if b == 0.5:
        return op("sqrt", dtype, a)
    if b == -0.5:
        return _rsqrt(dtype, a)
    if b in (-1, -2):
        return _reciprocal(dtype, a if b == -1 else op("mul", dtype, a, a))
    if b in (2, 3) or (not dtype.is_floating_point and 1 <= b <= 64):
        power = a
        for _ in range(int(b) - 1):
            power = op("mul", dtype, power, a)
        return power
    if not dtype.is_floating_point:
        return op("pow", dtype, a, const(b, dtype))
    wide = torch.float64  # torch does not round the exponent
    return cast(op("pow", wide, cast(a, wide), const(b, wide)), dtype)


def _shift(name: str) -> Function:
    def function(dtype: torch.dtype, a: Any, b: Any) -> Expr:
        """Torch shifts out all bits if the distance is negative or too large; C++ may not."""
        a, b = _given(a, dtype), _given(b, dtype)
        bits = 8 * dtype.itemsize
        if b.op == "const" and 0 <= b.args[0] < bits:
            return op(name, dtype, a, b)
        above = op("lt", torch.bool, b, const(bits, dtype))
        inside = op("and", torch.bool, above, op("ge", torch.bool, b, const(0, dtype)))
        distance = chosen(inside, b, const(bits - 1, dtype))
        shifted = op(name, dtype, a, distance)
        if name == "shr" and dtype.is_signed:
            return shifted
        return chosen(inside, shifted, const(0, dtype))

    return function


def _clamp(dtype: torch.dtype, a: Expr, low: Any = None, high: Any = None) -> Expr:
    if low is not None:
        a = op("max", dtype, a, _given(low, dtype))
    return a if high is None else op("min", dtype, a, _given(high, dtype))


def _relu(dtype: torch.dtype, a: Expr) -> Expr:
    return op("max", dtype, a, const(0, dtype))


def _addcmul(dtype: torch.dtype, a: Any, b: Any, c: Any, value: float = 1) -> Expr:
    scaled = b if value == 1 else op("mul", dtype, const(value, dtype), b)
    return op("add", dtype, a, op("mul", dtype, scaled, c))


def _addcdiv(dtype: torch.dtype, a: Any, b: Any, c: Any, value: float = 1) -> Expr:
    return op("add", dtype, a, op("div", dtype, op("mul", dtype, const(value, dtype), b), c))


def _lerp(dtype: torch.dtype, a: Expr, b: Expr, weight: Any) -> Expr:
    """As torch: from the nearer end."""
    weight = _given(weight, dtype)
    difference = op("sub", dtype, b, a)
    near = op("fma", dtype, weight, difference, a)
    rest = op("sub", dtype, weight, const(1, dtype))
    far = op("fma", dtype, rest, difference, b)
    if weight.op == "const":
        return near if abs(weight.args[0]) < 0.5 else far
    small = op("lt", torch.bool, op("abs", dtype, weight), const(0.5, dtype))
    return chosen(small, near, far)


def _where(dtype: torch.dtype, condition: Expr, a: Any, b: Any) -> Expr:
    return chosen(cast(condition, torch.bool), _given(a, dtype), _given(b, dtype))


def _masked_fill(dtype: torch.dtype, a: Expr, mask: Expr, value: Any) -> Expr:
    return chosen(cast(mask, torch.bool), _given(value, dtype), a)


def _copy(dtype: torch.dtype, _: Expr, source: Any) -> Expr:
    return _given(source, dtype)


def _smooth_l1(dtype: torch.dtype, a: Expr, b: Expr, _: int, beta: float) -> Expr:
    z = op("abs", dtype, op("sub", dtype, a, b))
    half, edge = const(0.5, dtype), const(beta, dtype)
    inner = op("div", dtype, op("mul", dtype, op("mul", dtype, half, z), z), edge)
    outer = op("sub", dtype, z, op("mul", dtype, half, edge))
    return chosen(op("lt", torch.bool, z, edge), inner, outer)


def _smooth_l1_backward(
    dtype: torch.dtype, grad: Expr, a: Expr, b: Expr, _: int, beta: float
) -> Expr:
    x, edge = op("sub", dtype, a, b), const(beta, dtype)
    inside = op("div", dtype, op("mul", dtype, x, grad), edge)
    low = op("le", torch.bool, x, op("neg", dtype, edge))
    high = op("ge", torch.bool, x, edge)
    return chosen(low, op("neg", dtype, grad), chosen(high, grad, inside))


def _mse(dtype: torch.dtype, a: Expr, b: Expr, _: int) -> Expr:
    d = op("sub", dtype, a, b)
    return op("mul", dtype, d, d)


def _mse_backward(dtype: torch.dtype, grad: Expr, a: Expr, b: Expr, _: int) -> Expr:
    d = op("mul", dtype, const(2, dtype), op("sub", dtype, a, b))
    return op("mul", dtype, d, grad)


def _threshold_backward(dtype: torch.dtype, grad: Expr, a: Expr, threshold: float) -> Expr:
    below = op("le", torch.bool, a, const(threshold, dtype))
    return chosen(below, const(0, dtype), grad)


def _isnan(_: torch.dtype | None, a: Expr) -> Expr:
    return op("ne", torch.bool, a, a) if a.dtype.is_floating_point else const(False, torch.bool)


def _isinf(_: torch.dtype | None, a: Expr) -> Expr:
    if not a.dtype.is_floating_point:
        return const(False, torch.bool)
    return op("eq", torch.bool, op("abs", a.dtype, a), const(math.inf, a.dtype))


def _is(number: float) -> Function:
    return lambda _, a: op("eq", torch.bool, cast(a, torch.float32), const(number, torch.float32))


def _signbit(_: torch.dtype | None, a: Expr) -> Expr:
    if a.dtype.is_floating_point:
        a = op("copysign", a.dtype, const(1, a.dtype), a)
    return op("lt", torch.bool, a, const(0, a.dtype))


def _not(dtype: torch.dtype, a: Expr) -> Expr:
    return op("not" if dtype == torch.bool else "invert", dtype, a)


def _logical_not(_: torch.dtype | None, a: Expr) -> Expr:
    return op("not", torch.bool, cast(a, torch.bool))


def _logical(name: str) -> Function:
    def function(_: torch.dtype | None, a: Any, b: Any) -> Expr:
        pair = (cast(_given(each, torch.bool), torch.bool) for each in (a, b))
        return op(name, torch.bool, *pair)

    return function


def _sigmoid(dtype: torch.dtype, a: Expr) -> Expr:
    one = const(1, dtype)
    return op("div", dtype, one, op("add", dtype, one, op("exp", dtype, op("neg", dtype, a))))


def _reciprocal(dtype: torch.dtype, a: Expr) -> Expr:
    return op("div", dtype, const(1, dtype), a)


def _rsqrt(dtype: torch.dtype, a: Expr) -> Expr:
    return op("div", dtype, const(1, dtype), op("sqrt", dtype, a))


def _frac(dtype: torch.dtype, a: Expr) -> Expr:
    return op("sub", dtype, a, op("trunc", dtype, a))


def _sign(dtype: torch.dtype, a: Expr) -> Expr:
    """0 for NaN, as torch."""
    if dtype == torch.bool:
        return a
    zero = const(0, dtype)
    up, down = op("gt", torch.bool, a, zero), op("lt", torch.bool, a, zero)
    return chosen(up, const(1, dtype), chosen(down, const(-1, dtype), zero))


_UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "sin", "cos", "tan", "tanh", "asin", "acos", "atan",
    "log2", "log10", "log1p", "exp2", "expm1", "sinh", "cosh",
)  # fmt: skip

POINTWISE: dict[str, tuple[Function, str]] = {
    **{name: (_unary(name), "result") for name in _UNARY},
    **{name: (_rounding(name), "result") for name in ("floor", "ceil", "round", "trunc")},
    **{name: (_compare(name), "inputs") for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "add": (_add, "result"),
    "sub": (_sub, "result"),
    "rsub": (_rsub, "result"),
    "mul": (_mul, "result"),
    "div": (_div, "result"),
    "pow": (_pow, "result"),
    "maximum": (_binary("max"), "result"),
    "minimum": (_binary("min"), "result"),
    "fmod": (_binary("fmod"), "result"),
    "remainder": (_binary("remainder"), "result"),
    "floor_divide": (_binary("floor_divide"), "result"),
    "atan2": (_binary("atan2"), "result"),
    "hypot": (_binary("hypot"), "result"),
    "copysign": (_binary("copysign"), "result"),
    "bitwise_and": (_binary("and"), "result"),
    "bitwise_or": (_binary("or"), "result"),
    "bitwise_xor": (_binary("xor"), "result"),
    "bitwise_not": (_not, "result"),
    **{name: (_shift("shl"), "result") for name in ("bitwise_left_shift", "__lshift__")},
    **{name: (_shift("shr"), "result") for name in ("bitwise_right_shift", "__rshift__")},
    "logical_and": (_logical("and"), "own"),
    "logical_or": (_logical("or"), "own"),
    "logical_xor": (_logical("xor"), "own"),
    "logical_not": (_logical_not, "own"),
    "isnan": (_isnan, "own"),
    "isinf": (_isinf, "own"),
    "isposinf": (_is(math.inf), "own"),
    "isneginf": (_is(-math.inf), "own"),
    "signbit": (_signbit, "own"),
    "where": (_where, "filled"),
    "masked_fill": (_masked_fill, "filled"),
    "copy": (_copy, "filled"),
    "fill": (_copy, "filled"),
    "zero": (lambda dtype, _: const(0, dtype), "filled"),
    "_to_copy": (lambda _, a: a, "filled"),
    "clamp": (_clamp, "result"),
    "clamp_min": (_clamp, "result"),
    "clamp_max": (lambda dtype, a, high: _clamp(dtype, a, None, high), "result"),
    "relu": (_relu, "result"),
    "sigmoid": (_sigmoid, "result"),
    "reciprocal": (_reciprocal, "result"),
    "rsqrt": (_rsqrt, "result"),
    "frac": (_frac, "result"),
    "sign": (_sign, "result"),
    "addcmul": (_addcmul, "result"),
    "addcdiv": (_addcdiv, "result"),
    "lerp": (_lerp, "result"),
    "smooth_l1_loss": (_smooth_l1, "result"),
    "smooth_l1_loss_backward": (_smooth_l1_backward, "result"),
    "mse_loss": (_mse, "result"),
    "mse_loss_backward": (_mse_backward, "result"),
    "threshold_backward": (_threshold_backward, "result"),
}
"""Expression of an element, and the type in which operands come:

- result: that of the result; in place, that of all operands together;
- inputs: that of all operands together;
- own: each in its own;
- filled: that of the result, whatever is written.
"""
