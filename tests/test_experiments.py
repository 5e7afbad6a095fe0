"""Settings by environment id."""

from __future__ import annotations

import pytest

from dqn_fast.envs import TENSOR_ENVS, CartPole, GymTable, make_env
from dqn_fast.experiments import EXPERIMENTS, experiment
from dqn_fast.setup import check
from dqn_fast.train import Args


@pytest.mark.parametrize("env_id", list(EXPERIMENTS))
def test_experiments_are_settings_of_train(env_id: str):
    """Each names fields of Args with values that `check` accepts, for an environment of tensors."""
    check(Args.for_env(env_id))
    assert env_id in TENSOR_ENVS or isinstance(make_env(env_id), GymTable)


def test_gymnasiums_own_environment_has_the_same_settings():
    """The prefix gym: changes who steps, not what works; unknown ids have no settings."""
    assert experiment("gym:CartPole-v1") is experiment("CartPole-v1") is EXPERIMENTS["CartPole-v1"]
    assert experiment("Nowhere-v0") == {}


def test_a_class_of_ones_own_may_declare_settings(monkeypatch):
    """They hold for its id, for `train` and for the environment's parameters."""

    class Declares(CartPole):
        experiment = {"num_envs": 7, "env_params": {"length": 0.25}}  # noqa: RUF012

    monkeypatch.setitem(TENSOR_ENVS, "Declares-v0", Declares)
    assert Args.for_env("Declares-v0").num_envs == 7
    assert make_env("Declares-v0").params["length"] == 0.25
