"""Environments as tensors on one device, and adapters from and to Gymnasium."""

from dqn_fast.envs.acrobot import Acrobot
from dqn_fast.envs.cartpole import CartPole
from dqn_fast.envs.core import (
    CopiesError,
    EnvCheckError,
    EnvError,
    Outcome,
    TabularEnv,
    TensorEnv,
    VectorState,
    check_env,
)
from dqn_fast.envs.from_gymnasium import VectorizationMode, from_gymnasium
from dqn_fast.envs.line_world import LineWorld
from dqn_fast.envs.mountain_car import MountainCar
from dqn_fast.envs.recipe import (
    TENSOR_ENVS,
    NotNamedError,
    OwnedError,
    Recipe,
    UnknownEnvError,
    differences,
    make_env,
    need_tensor_env,
)
from dqn_fast.envs.tabular import GymTable, NoTableError
from dqn_fast.experiments import EXPERIMENTS, experiment

__all__ = [
    "EXPERIMENTS",
    "TENSOR_ENVS",
    "Acrobot",
    "CartPole",
    "CopiesError",
    "EnvCheckError",
    "EnvError",
    "GymTable",
    "LineWorld",
    "MountainCar",
    "NoTableError",
    "NotNamedError",
    "Outcome",
    "OwnedError",
    "Recipe",
    "TabularEnv",
    "TensorEnv",
    "UnknownEnvError",
    "VectorState",
    "VectorizationMode",
    "check_env",
    "differences",
    "experiment",
    "from_gymnasium",
    "make_env",
    "need_tensor_env",
]
