"""Engines: how the chunks of a run are executed.

They know the protocol of `dqn_fast.algorithm` and no algorithm. All engines use the same random
numbers. Their results differ only by rounding, because sums are evaluated in a different order.
"""

from dqn_fast.engines.cache import CacheState, cache_state
from dqn_fast.engines.choice import (
    EngineChoice,
    EngineName,
    EngineUnavailableError,
    StopRequested,
    choose_engine,
    without_compiler,
)
from dqn_fast.engines.chunk import chunk_
from dqn_fast.engines.graph import RECORDED_STEPS
from dqn_fast.engines.runner import Runner

__all__ = [
    "RECORDED_STEPS",
    "CacheState",
    "EngineChoice",
    "EngineName",
    "EngineUnavailableError",
    "Runner",
    "StopRequested",
    "cache_state",
    "choose_engine",
    "chunk_",
    "without_compiler",
]
