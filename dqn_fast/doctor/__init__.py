"""What this machine can do for a run, and whether an environment can be trained on, in words.

    python -m dqn_fast.doctor
    python -m dqn_fast.doctor --env-id gym:CartPole-v1
    python -m dqn_fast.doctor --env my_package.my_module:MyEnv

`packages` and `machine` look at the machine, `environment` finds the environment and decides which
checks it needs: `single` for one of Gymnasium's, `vector` for a VectorEnv. All of them yield
findings. Nothing here imports torch before `packages` has seen that everything is installed.
"""
