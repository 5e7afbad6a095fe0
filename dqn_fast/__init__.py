"""Vectorised, device-resident deep Q-learning in PyTorch.

Importing it makes the tensor environments known to Gymnasium: `dqn_fast/LineWorld-v0` and so on.
"""

import sys

if sys.argv[:1] == ["-m"]:  # python -m: the module that is to run has not been found yet
    from dqn_fast.process import start_command

    start_command()

from gymnasium.envs.registration import register, registry

__version__ = "0.1.0"

_OUT = "dqn_fast.envs.to_gymnasium"

for _env_id in ("Acrobot-v1", "CartPole-v1", "LineWorld-v0", "MountainCar-v0"):
    if f"dqn_fast/{_env_id}" not in registry:  # a module that is loaded again
        register(
            f"dqn_fast/{_env_id}",
            entry_point=f"{_OUT}:TensorSingleEnv",
            vector_entry_point=f"{_OUT}:TensorVectorEnv",
            kwargs={"env": _env_id},
        )
