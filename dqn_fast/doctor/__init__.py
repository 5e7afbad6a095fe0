"""What this machine can do for a run, and whether an environment can be trained on, in words.

    python -m dqn_fast.doctor
    python -m dqn_fast.doctor --env-id gym:CartPole-v1
    python -m dqn_fast.doctor --env my_package.my_module:MyEnv

`packages` and `machine` look at the machine, `environment` finds the environment and decides which
checks it needs: `single`, `repeats` and `adapted` for one of Gymnasium's, `vector` for a VectorEnv.
All of them yield findings. Only the standard library is imported before `packages` has looked.
"""
