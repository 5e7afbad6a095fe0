"""Settings: every field's type and range, what is taken for what, and flags in other forms."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
import pytest
import torch

from dqn_fast.agent import load_agent
from dqn_fast.envs import LineWorld, from_gymnasium
from dqn_fast.evaluate import EvaluateArgs
from dqn_fast.settings import (
    Range,
    UsageError,
    above,
    at_least,
    between,
    check_settings,
    check_value,
    declarations,
    expand_flags,
    finite,
    flag,
    parse,
)
from dqn_fast.setup import check, setup
from dqn_fast.sweep import read_sweep
from dqn_fast.train import Args, train

# What each field of Args allows, written a second time by hand: values at its bounds, values just
# outside, and the text of the range.
INTS = {
    **dict.fromkeys(
        ("num_envs", "num_seeds", "total_timesteps", "buffer_size", "batch_size", "train_freq",
         "chunk_steps", "keep_checkpoints"),
        ([1], [0, -1], "at least 1"),
    ),
    **dict.fromkeys(
        ("seed", "learning_starts", "gradient_steps", "sweep_random"), ([0], [-1], "at least 0")
    ),
    "eval_episodes": ([0], [-1], "at least 0 (0: no evaluation)"),
    "eval_envs": ([0], [-1], "at least 0 (0: those of training)"),
    "num_threads": ([0, 1_024], [-1, 1_025], "in [0, 1024] (0: torch's own choice)"),
    **dict.fromkeys(
        ("target_update_interval", "log_interval", "eval_interval", "checkpoint_interval"),
        ([0], [-1], "at least 0 (0: off)"),
    ),
}  # fmt: skip
TINY, INF, NAN = math.ulp(0.0), math.inf, math.nan
BELOW_1, ABOVE_1 = math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0)
LARGEST = math.nextafter(INF, 0.0)
FLOATS = {
    **dict.fromkeys(
        ("gamma", "eps_start", "eps_end", "eps_fraction"),
        ([0.0, 1.0], [-TINY, ABOVE_1, NAN, INF], "in [0, 1]"),
    ),
    "eps_repeat": ([0.0, BELOW_1], [-TINY, 1.0, NAN], "in [0, 1)"),
    "tau": ([TINY, 1.0], [0.0, ABOVE_1, NAN], "in (0, 1]"),
    "learning_rate": ([TINY, LARGEST], [0.0, -1.0, INF, NAN], "above 0 and finite"),
    "learning_rate_end": ([0.0, LARGEST], [-TINY, INF, NAN], "at least 0 and finite"),
    "max_grad_norm": ([TINY, INF], [0.0, -1.0, NAN], "above 0 (inf: no clipping)"),
    "stop_at_return": ([-LARGEST, LARGEST], [INF, -INF, NAN], "finite"),
}
CHOICES = {
    "vectorization_mode": "sync or async or vector_entry_point",
    "loss": "huber or squared",
    "engine": "auto or eager or fused or compile or graph",
    "matmul_precision": "highest or high",
    "wandb_mode": "online or offline, or None",
}
BOOLS = (
    "double_q", "stop_when_optimal", "checkpoint_replay", "report", "quiet", "track", "tensorboard",
)  # fmt: skip
TEXTS = ("env_id", "env", "device", "name", "wandb_project", "wandb_entity", "wandb_group")
OTHERS = (
    "env_params", "hidden_sizes", "resume", "run_dir", "keep_generated", "wandb_tags", "sweep",
    "wrappers",
)  # fmt: skip
OPTIONAL = {
    "learning_rate_end", "resume", "run_dir", "log_interval", "eval_interval", "stop_at_return",
    "eval_episodes", "eval_envs",
    "checkpoint_interval", "wandb_entity", "wandb_group", "wandb_mode", "keep_generated", "env",
}  # fmt: skip
RANGES = {**INTS, **FLOATS, "hidden_sizes": ([(1,), ()], [(64, 0), (-1,)], "at least 1 each")}


def or_none(name: str) -> str:
    return ", or None" if name in OPTIONAL else ""


def wrong_types() -> list[tuple[str, Any, str]]:
    """Field, value of a wrong type, and everything that is allowed."""
    cases: list[tuple[str, Any, str]] = []
    for name, (_, _, range_) in INTS.items():
        allowed = f"a whole number, {range_}{or_none(name)}"
        cases += [(name, v, allowed) for v in (1.5, "64", True, NAN, INF, [1], np.float32(0.5))]
    for name, (_, _, range_) in FLOATS.items():
        allowed = f"a number, {range_}{or_none(name)}"
        cases += [(name, v, allowed) for v in ("0.5", False, [0.5], 1j, abs, 10**400)]
    for name, allowed in CHOICES.items():
        cases += [(name, v, allowed) for v in ("nope", "", 1, ["huber"], np.zeros(2))]
    for name in BOOLS:
        cases += [(name, v, "True or False") for v in ("False", "", 0, 1.0, None, np.int64(1))]
    for name in TEXTS:
        cases += [(name, v, f"text{or_none(name)}") for v in (3, True, b"x", ["x"], Path("x"))]
    sizes = "a tuple of whole numbers, at least 1 each"
    cases += [("hidden_sizes", v, sizes) for v in (64, "64", (1.5,), (True,), ((64,),), {64})]
    for name in ("resume", "run_dir", "keep_generated"):
        cases += [(name, v, "a path, or None") for v in (3, True, ["x"])]
    for name in ("wandb_tags", "wrappers"):
        cases += [(name, v, "a tuple of texts") for v in ("tag", (1,), None)]
    parameters = "a dict from names to numbers, texts or truth values"
    cases += [("env_params", v, parameters) for v in (3, "n 5", [("n", 5)], {1: 2}, {"f": abs})]
    cases += [("sweep", v, parameters) for v in (3, "gamma 0.9", [("gamma", [0.9])], {1: [2]})]
    return cases


def test_the_tables_are_about_every_field():
    """A new setting needs a row, and its range if it is a number."""
    fields = set(vars(Args()))
    assert {*INTS, *FLOATS, *CHOICES, *BOOLS, *TEXTS, *OTHERS} == fields
    assert {name for name, *_ in wrong_types()} == fields
    assert {name for name, setting in declarations(Args).items() if setting.range} == set(RANGES)


@pytest.mark.parametrize(("name", "value", "allowed"), wrong_types())
def test_a_value_of_a_wrong_type_is_one_clear_line(name, value, allowed):
    """It names the flag, the value and what is allowed, types and range."""
    with pytest.raises(UsageError) as caught:
        check(Args(**{name: value}))
    message = str(caught.value)
    if isinstance(value, str) and name in CHOICES:
        assert message == f"{flag(name)} {value}: must be {allowed}"
    elif len(repr(value)) < 80:
        assert message.startswith(f"{flag(name)} {value!r}: must be ")
    else:
        assert message.startswith(f"{flag(name)} {repr(value)[:77]}...: must be ")
    assert message.endswith(allowed)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, (_, bad, allowed) in RANGES.items() for value in bad],
)
def test_just_outside_of_a_bound_is_one_clear_line(name, value, allowed):
    """It names the flag, the value and the range."""
    with pytest.raises(UsageError) as caught:
        check(Args(**{name: value}))
    assert str(caught.value) == f"{flag(name)} {value}: must be {allowed}"


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (good, *_) in RANGES.items() for value in good]
)
def test_a_bound_itself_is_allowed(name, value):
    """The value stays as it is, in type too."""
    clean = check_value(Args, name, value)
    assert clean == value
    assert type(clean) is type(value)


@pytest.mark.parametrize("name", vars(Args()))
def test_none_is_allowed_where_the_type_says_so(name):
    """And nowhere else."""
    if name in OPTIONAL:
        assert check_value(Args, name, None) is None
    else:
        with pytest.raises(UsageError, match=f"^{flag(name)} None: must be "):
            check_value(Args, name, None)


@pytest.mark.parametrize(
    ("name", "value", "clean"),
    [
        ("buffer_size", 1e4, 10_000),
        ("total_timesteps", 2e3, 2_000),
        ("batch_size", 64.0, 64),
        ("num_envs", np.int64(16), 16),
        ("num_envs", np.float32(16), 16),
        ("num_envs", torch.tensor(16), 16),
        ("eval_interval", np.array(1_000), 1_000),
        ("gamma", 1, 1.0),
        ("gamma", np.float32(0.5), 0.5),
        ("gamma", torch.tensor(0.5), 0.5),
        ("learning_rate_end", np.float64(0.25), 0.25),
        ("double_q", np.True_, True),
        ("double_q", torch.tensor(False), False),
        ("loss", np.str_("squared"), "squared"),
        ("hidden_sizes", [32, 32.0], (32, 32)),
        ("hidden_sizes", np.array([32, 64]), (32, 64)),
        ("hidden_sizes", (np.int32(32), torch.tensor(64)), (32, 64)),
        ("wandb_tags", ["a", np.str_("b")], ("a", "b")),
        ("run_dir", "runs/mine", Path("runs/mine")),
        ("device", torch.device("cuda", 1), "cuda:1"),
        ("env_params", {"n": np.int64(7), "p": torch.tensor(0.5)}, {"n": 7, "p": 0.5}),
        ("env_params", {"a": [np.int64(1), (2,)], "b": None}, {"a": [1, (2,)], "b": None}),
    ],
    ids=str,
)
def test_what_says_the_same_is_taken(name, value, clean):
    """In the type that the field declares, as files can hold it; the settings are left alone."""
    args = Args(**{name: value})
    taken = getattr(check_settings(args), name)
    assert taken == clean
    assert type(taken) is type(clean)
    if isinstance(clean, tuple):
        assert list(map(type, taken)) == list(map(type, clean))
    if isinstance(clean, dict):
        assert list(map(type, taken.values())) == list(map(type, clean.values()))
    assert getattr(args, name) is value


def test_clean_settings_stay_as_they_are():
    """Checking twice is checking once, for the defaults of every environment."""
    for env_id in ("LineWorld-v0", "CartPole-v1", "Acrobot-v1", "MountainCar-v0"):
        args = Args.for_env(env_id)
        clean = check(args)
        assert clean == args == check(clean)
        assert clean is not args


def test_a_setting_that_does_not_exist_is_named():
    """As a sweep over a misspelt name would have it."""
    with pytest.raises(UsageError, match=r"^--learning-rat: is no setting of Args$"):
        check_value(Args, "learning_rat", 0.1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("CartPole-v1", "args 'CartPole-v1': must be settings, as of Args(num_envs=64)"),
        ({"num_envs": 8}, "args {'num_envs': 8}: must be settings, as of Args(num_envs=64)"),
        (Args, "args <class 'dqn_fast.train.Args'>: must be settings, as of Args(num_envs=64)"),
        (None, "args None: must be settings, as of Args(num_envs=64)"),
    ],
    ids=["text", "dict", "class", "None"],
)
def test_train_takes_settings_alone(args, message, tmp_path, monkeypatch):
    """Anything else is one line, before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        train(args)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_an_attribute_that_is_no_setting_is_named(tmp_path):
    """It would have changed nothing, without a word."""
    args = Args(run_dir=tmp_path / "run")
    args.learning_rat = 0.1  # type: ignore[attr-defined]
    message = r"^--learning-rat: is no setting of Args; is learning_rate meant\?$"
    with pytest.raises(UsageError, match=message):
        train(args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "smooth_l1"}, "--loss smooth_l1: must be huber or squared"),
        ({"double_q": "False"}, "--double-q 'False': must be True or False"),
        ({"engine": "jit"}, "--engine jit: must be auto or eager or fused or compile or graph"),
        ({"seed": None}, "--seed None: must be a whole number, at least 0"),
        ({"learning_rate": abs}, "--learning-rate <built-in function abs>"),
        ({"buffer_size": 32.0}, "--buffer-size 32: must be at least --num-envs 64"),
    ],
    ids=str,
)
def test_train_writes_nothing_for_settings_that_make_no_sense(settings, message, tmp_path):
    """The same check as on the command line, before anything is written."""
    with pytest.raises(UsageError) as caught:
        train(Args(**settings, run_dir=tmp_path / "run"))
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_an_environment_of_gymnasiums_needs_from_gymnasium(tmp_path):
    """The message says so, before anything is written."""
    env = gymnasium.make("CartPole-v1")
    envs = gymnasium.make_vec("CartPole-v1", num_envs=2)
    for given, way in (
        (env, "dqn_fast.envs.from_gymnasium(lambda: gymnasium.make('CartPole-v1'))"),
        (envs, "dqn_fast.envs.from_gymnasium(env)"),
        ("CartPole-v1", "dqn_fast.envs.from_gymnasium('CartPole-v1'), or the setting env_id"),
        (type(env.unwrapped), "dqn_fast.envs.from_gymnasium converts what makes environments"),
        (lambda: env, "dqn_fast.envs.from_gymnasium converts what makes environments"),
        (LineWorld, "this is its class"),
    ):
        uses = [
            lambda given: train(Args(run_dir=tmp_path / "run"), env=given),
            lambda given: setup(Args(), given),
        ]
        if not isinstance(given, str):  # text is the path of a callable there
            uses.append(lambda given: load_agent(tmp_path, env=given))
        for use in uses:
            with pytest.raises(UsageError) as caught:
                use(given)
            assert re.fullmatch(r"env .*: must be a TensorEnv; [^\n]*", str(caught.value))
            assert way in str(caught.value)
    with pytest.raises(ValueError, match=r"must be an id.*; lambda: gymnasium.make\(...\) makes"):
        from_gymnasium(env)  # type: ignore[arg-type]
    env.close()
    envs.close()
    assert not list(tmp_path.iterdir())


def test_settings_from_python_are_written_as_any_others(tmp_path):
    """Text for a path, whole floats for counts and a device object train like their plain forms."""
    args = Args(
        num_envs=16.0, total_timesteps=1e3, learning_starts=100, eval_episodes=3, report=False,
        device=torch.device("cpu"), quiet=True, run_dir=str(tmp_path / "odd"),
    )  # fmt: skip
    odd = train(args)
    plain = train(replace(args, num_envs=16, device="cpu", run_dir=tmp_path / "plain"))
    assert odd.run_dir == tmp_path / "odd"
    for ours, theirs in zip(odd.q_net.parameters(), plain.q_net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("metadata", "text", "inside", "outside"),
    [
        (at_least(1), "at least 1", [1, INF], [0.9, NAN]),
        (at_least(0, finite=True), "at least 0 and finite", [0, 1e308], [-1, INF, NAN]),
        (at_least(0, note="0: off"), "at least 0 (0: off)", [0], [-1]),
        (above(0.5), "above 0.5", [0.6, INF], [0.5, NAN]),
        (above(0, finite=True), "above 0 and finite", [1], [0, INF]),
        (between(-1, 1), "in [-1, 1]", [-1, 1], [-1.1, 1.1, NAN]),
        (between(0, 1, "()"), "in (0, 1)", [0.5], [0, 1]),
        (finite(), "finite", [-1e308, 0, 10**400], [INF, -INF, NAN]),
    ],
)
def test_ranges(metadata, text, inside, outside):
    """The text, the help and the test of membership are of one interval."""
    allowed = metadata.help_behavior_hint
    assert isinstance(allowed, Range)
    assert str(allowed) == text
    assert allowed("7") == f"{text[0].upper()}{text[1:]}. (default: 7)"
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)


Width = Annotated[int, at_least(1)]


@dataclass
class Small:
    """Some settings."""

    out: Path
    """Without default."""
    width: Width = 3
    """Units."""
    rates: Annotated[tuple[float, ...], between(0, 1)] = (0.5,)
    mode: Literal["a", 2] | None = None
    paths: tuple[Path, ...] = ()
    flags: tuple[bool, ...] = ()
    either: int | str = 0
    pair: tuple[int, str] = (0, "")
    number: Any = None
    options: dict[str, int] = field(default_factory=dict)
    on: bool = False
    left: int = field(init=False, default=7)


def test_other_classes_declare_settings_the_same_way():
    """Every kind of field; types that nothing is known of take anything."""
    args = Small("x", np.int8(4), [0, 1], 2, ["a"], [True], 1.5, "anything", object)
    clean = check_settings(args)
    assert clean.out == Path("x")
    assert clean.rates == (0.0, 1.0)
    assert clean.paths == (Path("a"),)
    assert (clean.either, clean.pair, clean.number, clean.left) == (1.5, "anything", object, 7)
    for name, value, message in (
        ("width", 0, "--width 0: must be at least 1"),
        ("rates", (0.5, 2), "--rates (0.5, 2.0): must be in [0, 1]"),
        ("mode", 2.0, "--mode 2.0: must be a or 2, or None"),
        ("paths", "a", "--paths 'a': must be a tuple of paths"),
        ("flags", [1], "--flags [1]: must be a tuple of truth values"),
    ):
        with pytest.raises(UsageError) as caught:
            check_settings(replace(args, **{name: value}))
        assert str(caught.value) == message
    assert parse(Small, argv=["--out", "x", "--width", "2"]).width == 2
    assert parse(Small, Small(Path("y"), 5), []) == Small(Path("y"), 5)


def test_evaluation_has_the_same_checks():
    """A count of episodes below 1 and a seed below 0."""
    for name in ("episodes", "video_episodes", "video_steps"):
        with pytest.raises(UsageError, match=f"^{flag(name)} 0: must be at least 1$"):
            check_settings(EvaluateArgs(Path("run"), **{name: 0}))
    with pytest.raises(UsageError, match=r"^--seed -1: must be at least 0$"):
        check_settings(EvaluateArgs(Path("run"), seed=-1))
    with pytest.raises(UsageError, match=r"^--agent worst: must be best or last$"):
        check_settings(EvaluateArgs(Path("run"), agent="worst"))


# -------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("value", [True, False])
def test_every_flag_that_is_on_or_off_takes_a_truth_value(name, value):
    """With - or _, after = or a blank, in Python's spelling and in YAML's; the plain forms stay."""
    dashed, underscored = flag(name), f"--{name}"
    forms = [[dashed if value else dashed.replace("--", "--no-", 1)]]
    for text in (str(value), str(value).lower()):
        for written in (dashed, underscored):
            forms += [[f"{written}={text}"], [written, text]]
    for form in forms:
        args = parse(Args, argv=[*form, "--num-envs", "8"])
        assert args == Args(num_envs=8, **{name: value}), form


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--hidden_sizes=[32,32]"], {"hidden_sizes": (32, 32)}),
        (["--hidden_sizes=[32, 32]"], {"hidden_sizes": (32, 32)}),
        (["--hidden-sizes", "[32, 32]"], {"hidden_sizes": (32, 32)}),
        (["--hidden-sizes=(32, 32)"], {"hidden_sizes": (32, 32)}),
        (["--hidden-sizes=(32)"], {"hidden_sizes": (32,)}),
        (["--hidden-sizes", "32", "32"], {"hidden_sizes": (32, 32)}),
        (["--hidden-sizes=32"], {"hidden_sizes": (32,)}),
        (["--hidden_sizes=[]"], {"hidden_sizes": ()}),
        (["--hidden_sizes=32 16"], {"hidden_sizes": (32, 16)}),
        (["--hidden-sizes", "32,16"], {"hidden_sizes": (32, 16)}),
        (["--hidden_sizes=[32.0, 16.0]"], {"hidden_sizes": (32, 16)}),
        (["--wandb_tags=a b"], {"wandb_tags": ("a b",)}),
        (["--wandb_tags=['a','b']"], {"wandb_tags": ("a", "b")}),
        (["--wandb_tags=['a, b', \"c\"]"], {"wandb_tags": ("a, b", "c")}),
        (["--wandb_tags=[a, b]"], {"wandb_tags": ("a", "b")}),
        (["--wandb-tags", "a", "b"], {"wandb_tags": ("a", "b")}),
        (["--learning_rate=0.001"], {"learning_rate": 0.001}),
        (["--learning_rate_end=None"], {"learning_rate_end": None}),
        (["--log_interval=None"], {"log_interval": None}),
        (["--total_timesteps=1e5"], {"total_timesteps": 100_000}),
        (["--total-timesteps", "1e5"], {"total_timesteps": 100_000}),
        (["--batch_size=32.0", "--seed", "1_000"], {"batch_size": 32, "seed": 1_000}),
        (["--seed", "12345678901234567891"], {"seed": 12345678901234567891}),
        (["--env_params={'n_states': 9}"], {"env_params": {"n_states": "9"}}),
        (["--env-params", "n_states", "9"], {"env_params": {"n_states": "9"}}),
        (["--name=True", "--run_dir=[x]"], {"name": "True", "run_dir": Path("[x]")}),
        (
            ["--double_q=True", "--loss=squared", "--hidden_sizes=[8, 8]", "--quiet"],
            {"double_q": True, "loss": "squared", "hidden_sizes": (8, 8), "quiet": True},
        ),
    ],
    ids=str,
)
def test_flags_as_a_sweep_writes_them(words, settings):
    """Each value is read as the one that Python would have."""
    assert parse(Args, argv=words) == Args(**settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--double_q=maybe"], "--double-q maybe: must be true or false"),
        (["--quiet="], "--quiet : must be true or false"),
    ],
)
def test_a_truth_value_that_is_none_is_one_clear_line(words, message):
    """Of flags with =; without, the next word is no value."""
    with pytest.raises(UsageError) as caught:
        parse(Args, argv=words)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "words",
    [
        [], ["--help"], ["--no-such=[1, 2]"], ["--num-envs", "many"], ["--num-envs=1.5"],
        ["--seed"], ["--hidden-sizes"], ["--hidden-sizes=[1"], ["--quiet", "--track"],
        ["--name", "true"], ["--env-params={1"], ["--env-params", "{1, 2}"], ["stray", "True"],
    ],
    ids=str,
)  # fmt: skip
def test_other_words_are_left_to_tyro(words):
    """Just as they came."""
    assert expand_flags(Args, words) == words


def test_help_shows_range_and_default_of_every_number(capsys, monkeypatch):
    """They stand next to the type alone, so the text of a field need not say them."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(Args, argv=["--help"])
    entries = re.split(r"\n[│ ] (?=--)", capsys.readouterr().out)
    about = {entry.split()[0]: " ".join(entry.replace("│", " ").split()) for entry in entries}
    for name, (_, _, allowed) in RANGES.items():
        default = getattr(Args(), name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        assert f"{allowed[0].upper()}{allowed[1:]}. (default: {shown})" in about[flag(name)]


# --------------------------------------------------------------------- of any size, in any letters


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize(
    "value", [2**53 + 1, 2**63, 2**70, 10**400, pytest.param(10**5_000, id="5,000 digits")]
)
def test_whole_numbers_have_a_largest_one(name, value):
    """Above 2**53, and where it has thousands of digits, the line is still one."""
    with pytest.raises(UsageError) as caught:
        check(Args(**{name: value}))
    assert re.match(f"{flag(name)} .*: must be (at most 2\\*\\*53|in )", str(caught.value))
    assert len(str(caught.value)) < 300
    if name != "num_threads":
        assert check_value(Args, name, 2**53) == 2**53


@pytest.mark.parametrize("name", ["name", "wandb_project", "wandb_tags", "run_dir", "env_id"])
@pytest.mark.parametrize("text", ["a" * 300, "a\nb", "a\0b", "\udc80", "\x1b[31m", "a\u2028b"])
def test_texts_that_no_file_can_be_called_are_refused(name, text):
    """Too long, or not printable: one printable line."""
    with pytest.raises(UsageError) as caught:
        check(Args(**{name: (text,) if name == "wandb_tags" else text}))
    message = str(caught.value)
    assert message.startswith(f"{flag(name)} ")
    assert message.isprintable()
    message.encode()


@pytest.mark.parametrize("name", ["name", "env_id"])
def test_a_run_directory_can_be_called_so(name, tmp_path):
    """Names that are too long for it are named, unless the directory has a name of its own."""
    with pytest.raises(UsageError, match=f"{flag(name)} .*: must be at most 100 bytes, or name a"):
        check(Args(**{name: "é" * 60}))
    check(Args(**{name: "é" * 60, "run_dir": tmp_path}))


def test_odd_objects_are_one_line():
    """Lists that hold themselves, deep ones, objects without text."""

    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    endless: list[Any] = []
    endless.append(endless)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, {"a": endless}, {"a": deep}, Mute(), {"a": "\0"}, {"\udc80": 1}):
        with pytest.raises(
            UsageError, match=r"^--env-params .*: must be a dict from names"
        ) as caught:
            check(Args(env_params=value))
        assert len(str(caught.value).splitlines()) == 1


def test_a_usage_error_is_one_printable_line():
    """Whatever it quotes."""
    text = str(UsageError("--name a\nb\0\udc80: " + "x" * 5_000))
    assert text.startswith("--name a b\\x00\\udc80: xxx")
    assert len(text) == 1_000


def test_long_command_lines_are_read_fast():
    """A hundred thousand words take less than a second of the processor's time each way."""
    words = ["--sweep", "gamma", *(f"0.{i:06d}" for i in range(100_000))]
    began = time.thread_time()
    assert len(expand_flags(Args, words)) == len(words)
    assert len(read_sweep(words[1:])["gamma"]) == 100_000
    assert time.thread_time() - began < 5.0


@pytest.mark.parametrize("text", ["[" * 5_000, "[" + "9" * 5_000 + "]", "{[]: 1}", "[1, [}"])
def test_brackets_without_a_value_are_left_to_tyro(text):
    """No traceback from Python's reader."""
    for name in ("--hidden-sizes", "--env-params"):
        assert expand_flags(Args, [name, text])
