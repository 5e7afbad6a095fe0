"""Every kind of observation and action space that Gymnasium knows."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from dqn_fast.envs.core import EnvError
from dqn_fast.envs.from_gymnasium import from_gymnasium
from dqn_fast.envs.spaces import ObservationEncoder, Violation

E = 3


class Shows(gymnasium.Env):
    """Observes samples of a space; every second step terminates."""

    action_space = spaces.Discrete(2)

    def __init__(self, make_space: Any) -> None:
        self.observation_space = make_space()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.observation_space.sample(), 0.0, self.steps == 2, False, {}


def flat(space: spaces.Space, obs: Any) -> np.ndarray:
    """Gymnasium's flattening, with whole-range bytes divided by 255, part by part."""
    if isinstance(space, spaces.Tuple):
        parts = [flat(s, x) for s, x in zip(space.spaces, obs, strict=True)]
        return np.concatenate(parts)
    if isinstance(space, spaces.Dict):
        return np.concatenate([flat(s, obs[key]) for key, s in space.spaces.items()])
    vector = np.asarray(spaces.flatten(space, obs), np.float32)
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and (space.high == 255).all():
        vector = vector / np.float32(255)
    return vector


def check(make_space: Any, mode: AutoresetMode | str) -> None:
    """Features of three steps' observations and successors equal the flattened samples."""
    if isinstance(mode, str):
        env = from_gymnasium(partial(Shows, make_space), vectorization_mode=mode)
    else:
        env = from_gymnasium(SyncVectorEnv([partial(Shows, make_space)] * E, autoreset_mode=mode))
    noise = torch.rand(E, 2, generator=torch.Generator().manual_seed(0))
    singles = [Shows(make_space) for _ in range(E)]
    seeds = [int(a * 2**16) * 2**15 + int(b * 2**15) for a, b in noise.double().tolist()]
    space = singles[0].observation_space
    expected = [flat(space, s.reset(seed=seed)[0]) for s, seed in zip(singles, seeds, strict=True)]
    vector, action, nothing = env.vector_reset(noise), torch.zeros(E).long(), torch.zeros(E, 0)
    for t in range(3):
        features = env.features(vector.obs)
        assert features.dtype == torch.float32
        np.testing.assert_array_equal(features.numpy(), np.stack(expected))
        np.testing.assert_array_equal(env.features(vector.obs[None, None])[0, 0], features)
        vector, outcome = env.vector_step(vector, action, nothing, nothing)
        reached = [flat(space, single.step(0)[0]) for single in singles]
        np.testing.assert_array_equal(env.features(outcome.next_obs).numpy(), np.stack(reached))
        done = outcome.done
        assert done.all() == done.any() == (t == 1)
        expected = reached
        if t == 1:
            expected = [flat(space, single.reset()[0]) for single in singles]
            if mode is AutoresetMode.NEXT_STEP:
                vector, outcome = env.vector_step(vector, action, nothing, nothing)
                assert outcome.valid is not None
                assert not outcome.valid.any()
    shape = env.observation_space.shape
    assert shape in ((), features.shape[1:])
    env.close()


BOX_DTYPES = (np.float16, np.float32, np.float64, np.uint8, np.int8, np.int16, np.int32, np.int64)
SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn) -> Any:
    dtype = np.dtype(draw(st.sampled_from(BOX_DTYPES)))
    low, high = draw(st.sampled_from([(0, 255), (0, 9)] if dtype == np.uint8 else [(-90, 90)]))
    return partial(spaces.Box, low, high, draw(SHAPES), dtype.type)


LEAVES = st.one_of(
    boxes(),
    st.builds(
        lambda n, start: partial(spaces.Discrete, n, start=start),
        st.sampled_from([1, 2, 5, 300]),
        st.sampled_from([0, 1, -4, 200]),
    ),
    st.builds(lambda shape: partial(spaces.MultiBinary, shape or (2,)), SHAPES),
    st.builds(
        lambda nvec, start: partial(spaces.MultiDiscrete, nvec, start=[start] * len(nvec)),
        st.lists(st.integers(1, 6), min_size=1, max_size=4),
        st.sampled_from([0, -2, 3]),
    ),
    st.just(partial(spaces.MultiDiscrete, [[2, 3], [4, 2]])),
)


def nest(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        several.map(lambda parts: lambda: spaces.Tuple([part() for part in parts])),
        several.map(
            lambda parts: lambda: spaces.Dict({f"k{9 - i}": p() for i, p in enumerate(parts)})
        ),
    )


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, nest, max_leaves=5), st.sampled_from(["sync", *AutoresetMode]))
def test_features_are_gymnasiums_flattening(make_space, mode):
    """For spaces of every kind, nested, in every autoreset mode: of first observations, of
    successors and of those before a reset, for any leading axes."""
    check(make_space, mode)


@pytest.mark.parametrize(
    "make_space",
    [
        partial(spaces.Text, 5),
        lambda: spaces.Dict(
            {"mission": spaces.Text(4), "view": spaces.Box(0, 255, (2,), np.uint8)}
        ),
        lambda: spaces.OneOf([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]),
        lambda: spaces.Tuple([spaces.Discrete(4, start=2), spaces.Box(-1, 1, (2, 2), np.float64)]),
    ],
    ids=["Text", "Text in Dict", "OneOf", "Tuple"],
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_unusual_spaces_come_through_processes(make_space, mode):
    """Observations that processes cannot share as memory are sent with each step."""
    check(make_space, mode)


@pytest.mark.parametrize(
    ("make_space", "dtype", "shape"),
    [
        (partial(spaces.Discrete, 256), torch.uint8, ()),
        (partial(spaces.Discrete, 257), torch.int16, ()),
        (partial(spaces.Discrete, 100, start=-128), torch.int8, ()),
        (partial(spaces.Discrete, 70_000), torch.int32, ()),
        (partial(spaces.MultiDiscrete, [3, 300]), torch.int16, (2,)),
        (partial(spaces.MultiBinary, 4), torch.uint8, (4,)),
        (partial(spaces.Box, 0, 255, (4, 5, 3), np.uint8), torch.uint8, (4, 5, 3)),
        (partial(spaces.Box, -1, 1, (3,), np.float64), torch.float32, (3,)),
        (partial(spaces.Box, -1, 1, (3,), np.float16), torch.float16, (3,)),
        (partial(spaces.Box, 0, 9, (3,), np.int64), torch.float32, (3,)),
        (partial(spaces.Box, 0, 1, (3,), np.bool_), torch.bool, (3,)),
        (lambda: spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11)]), torch.uint8, (2,)),
        (
            lambda: spaces.Tuple([spaces.Discrete(300), spaces.Box(0, 1, (2,))]),
            torch.float32,
            (3,),
        ),
    ],
)
def test_replay_stores_little(make_space, dtype, shape):
    """Observations are stored in the smallest dtype that holds them."""
    env = from_gymnasium(partial(Shows, make_space))
    obs = env.vector_reset(torch.rand(E, 2)).obs
    assert (obs.dtype, obs.shape) == (dtype, (E, *shape))
    env.close()


@pytest.mark.parametrize(
    "make_space",
    [
        partial(spaces.Sequence, spaces.Discrete(3)),
        partial(spaces.Graph, spaces.Discrete(3), None),
        lambda: spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Sequence(spaces.Box(0, 1))}),
    ],
)
def test_spaces_without_a_fixed_size_are_refused(make_space):
    """One line that names the space and says what to do."""
    message = r"Shows: its observation space .* has no fixed size.*TransformObservation"
    with pytest.raises(ValueError, match=message):
        from_gymnasium(partial(Shows, make_space))


def test_an_empty_space_is_refused():
    """A space without any number has nothing to learn from."""
    with pytest.raises(ValueError, match=r"Shows: its observation space Dict\(\) is empty"):
        from_gymnasium(partial(Shows, spaces.Dict))


@pytest.mark.parametrize(
    "space",
    [spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)],
    ids=lambda space: type(space).__name__,
)
def test_actions_other_than_discrete_are_refused(space):
    """One line that names the space and says what to do."""

    class Other(Shows):
        action_space = space

    message = rf"Other: its action space {re.escape(str(space))} .*TransformAction"
    with pytest.raises(ValueError, match=message):
        from_gymnasium(partial(Other, partial(spaces.Discrete, 2)))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_actions_are_sent_as_the_environment_numbers_them(mode):
    """Action 0 is the start of a Discrete space."""

    class Echo(Shows):
        action_space = spaces.Discrete(3, start=-1)

        def step(self, action: Any) -> Any:
            assert action in self.action_space
            return super().step(action)[0], float(action), False, False, {}

    env = from_gymnasium(partial(Echo, partial(spaces.Discrete, 2)), vectorization_mode=mode)
    assert env.num_actions == 3
    vector, nothing = env.vector_reset(torch.rand(E, 2)), torch.zeros(E, 0)
    _, outcome = env.vector_step(vector, torch.arange(E), nothing, nothing)
    assert outcome.reward.tolist() == [-1.0, 0.0, 1.0]
    env.close()


class Says(Shows):
    """Its first observation is a sample of the space, all others are `value`."""

    def __init__(self, make_space: Any, value: Any) -> None:
        super().__init__(make_space)
        self.value = value

    def step(self, action: Any) -> Any:
        return self.value, 0.0, True, False, {}


BOX8 = partial(spaces.Box, 0, 255, (2,), np.uint8)
PAIR = partial(spaces.Tuple, [spaces.Discrete(3), spaces.Box(0, 1, (1,))])
DICT = partial(spaces.Dict, {"a": spaces.Discrete(3)})


@pytest.mark.parametrize(
    ("make_space", "value", "stored"),
    [
        (BOX8, np.array([3, 200]), [3, 200]),
        (BOX8, [1.0, 2.0], [1, 2]),
        (partial(spaces.Box, -1, 1, (2,)), np.array([0.1, 1]), [np.float32(0.1), 1.0]),
        (partial(spaces.Box, -1, 1, (2,)), (0, 1), [0.0, 1.0]),
        (partial(spaces.Discrete, 5), np.uint8(4), 4),
        (PAIR, [2, np.array([0.5])], [2.0, 0.5]),
    ],
)
def test_careless_dtypes_pass_where_nothing_is_lost(make_space, value, stored):
    """Lists, float64 for float32, whole numbers for bytes are stored in the dtype of the space."""
    env = from_gymnasium(partial(Says, make_space, value))
    vector, nothing = env.vector_reset(torch.rand(2, 2)), torch.zeros(2, 0)
    _, outcome = env.vector_step(vector, torch.zeros(2).long(), nothing, nothing)
    assert outcome.next_obs.tolist() == [stored] * 2
    env.close()


@pytest.mark.parametrize(
    ("make_space", "value", "message"),
    [
        (BOX8, np.array([0.5, 1]), "float64 and does not fit the uint8"),
        (BOX8, np.array([-1, 1]), "int64 and does not fit the uint8"),
        (BOX8, np.array([256, 1]), "int64 and does not fit the uint8"),
        (BOX8, np.array(["a", "b"]), "the dtype <U1"),
        (BOX8, [[1], [2, 3]], "a list of 2, not an array"),
        (partial(spaces.Discrete, 5), 5, r"5 is not in Discrete\(5\)"),
        (partial(spaces.Discrete, 5, start=1), 0, r"0 is not in Discrete\(5, start=1\)"),
        (partial(spaces.Discrete, 5), np.array([1]), r"the shape \(1,\), its space \(\)"),
        (partial(spaces.MultiDiscrete, [2, 2]), np.array([0, 2]), r"\[0 2\] is not in Multi"),
        (PAIR, (1,), "a tuple of 1, not a tuple of 2"),
        (PAIR, {"a": 1}, "not a tuple of 2"),
        (DICT, {"b": 1}, "lacks 'a'"),
        (DICT, 3, r"3 \(int\), not a dict"),
        (partial(spaces.Text, 3), 3, "3 is not in Text"),
    ],
)
def test_observations_outside_of_their_space_are_named(make_space, value, message):
    """An observation whose stored value would differ is an error with copy and step."""
    env = from_gymnasium(partial(Says, make_space, value))
    vector, nothing = env.vector_reset(torch.rand(2, 2)), torch.zeros(2, 0)
    with pytest.raises(EnvError, match=rf"^Says, copy 0, step 1: its observation .*{message}"):
        env.vector_step(vector, torch.zeros(2).long(), nothing, nothing)
    env.close()


def test_parts_of_a_dict_keep_their_dtypes():
    """An image of bytes beside two floats takes its bytes, eight more for the floats, and no float
    for each pixel; a VizDoom observation so takes a quarter."""
    screen = spaces.Box(0, 255, (240, 320, 3), np.uint8)
    space = spaces.Dict(gamevariables=spaces.Box(-np.inf, np.inf, (2,), np.float32), screen=screen)
    encoder = ObservationEncoder(space)
    assert (encoder.dtype, encoder.shape) == (np.uint8, (8 + 240 * 320 * 3,))
    values = np.array([[0.1, -3e30], [np.pi, 5e-324]], np.float32)
    images = np.random.default_rng(0).integers(0, 256, (2, 240, 320, 3), np.uint8)
    features = encoder.features(torch.from_numpy(encoder.encode([values, images], 2)))
    np.testing.assert_array_equal(features[:, :2].numpy(), values)
    expected = images.reshape(2, -1).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(features[:, 2:].numpy(), expected)


@pytest.mark.parametrize(
    ("parts", "row_bytes"),
    [
        ([spaces.Box(-1, 1, (3,)), spaces.MultiBinary(9)], 12 + 9 + 3),
        ([spaces.MultiBinary(9), spaces.Box(-1, 1, (3,))], 9 + 3 + 12),
        ([spaces.Box(0, 9, (5,), np.int8), spaces.Box(0, 255, (8, 8), np.uint8)], 5 + 64),
        ([spaces.Box(-1, 1, (4,)), spaces.Discrete(3)], 5 * 4),  # as few bytes as columns of floats
        ([spaces.Box(-1, 1, (4,), np.float16), spaces.MultiBinary(8)], 8 + 8),
        ([spaces.Box(0, 255, (4,), np.uint8), spaces.Discrete(4)], 5),
        ([spaces.Discrete(2, start=2**40), spaces.MultiBinary(30)], 8 + 30 + 2),
    ],
)
def test_bytes_of_a_row(parts, row_bytes):
    """Each part has its own dtype, aligned to its items, unless one dtype needs no more bytes."""
    encoder = ObservationEncoder(spaces.Tuple(parts))
    assert np.empty((1, *encoder.shape), encoder.dtype).nbytes == row_bytes


def test_equal_observations_are_equal_bytes_and_bad_floats_are_found():
    """The gaps between parts are zeros; NaN in a part of floats is refused with its row."""
    space = spaces.Tuple([spaces.MultiBinary(9), spaces.Box(-np.inf, np.inf, (3,), np.float32)])
    encoder = ObservationEncoder(space)
    parts = [np.ones((2, 9), np.int8), np.ones((2, 3), np.float32)]
    first, again = (encoder.encode(parts, 2) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first[:, 9:12].sum() == 0
    parts[1][1, 2] = np.nan
    with pytest.raises(Violation, match="its observation holds nan") as raised:
        encoder.encode(parts, 2)
    assert raised.value.index == 1


def test_images_are_known():
    """Bytes in two dimensions, at least 1,024 of them; MiniGrid's 7 x 7 x 3 codes are none."""
    space = spaces.Dict(
        a=spaces.Box(0, 255, (84, 84), np.uint8),
        b=spaces.Box(0, 255, (7, 7, 3), np.uint8),
        c=spaces.Box(0, 1, (84, 84), np.float32),
        d=spaces.Box(0, 255, (4096,), np.uint8),
        e=spaces.Tuple([spaces.Box(0, 255, (3, 32, 32), np.uint8)]),
    )
    assert ObservationEncoder(space).image_shapes == [(84, 84), (3, 32, 32)]
