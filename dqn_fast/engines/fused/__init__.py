"""The whole training step as one generated program.

The functions of an algorithm are traced for one member (trace.py) and turned into expressions for
single elements (lower.py, expr.py). A plan gives tensors memory and orders loops (planner.py). It
is printed (cpp.py), compiled and kept (build.py), and called for chunks of vector steps (chunk.py).
"""

from dqn_fast.engines.fused.chunk import FusedChunk

__all__ = ["FusedChunk"]
