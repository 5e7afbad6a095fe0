"""Devices by name, and the conditions under which a run computes."""

from __future__ import annotations

import gc

import pytest
import torch

from dqn_fast.device import (
    ProcessSetting,
    choose_device,
    cpu_threads,
    gc_frozen,
    run_conditions,
)

ZEROS = torch.zeros
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
RTX, RTX_D = "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090 D"


@pytest.fixture
def cards(monkeypatch):
    """Make this a machine with these cards, where tensors on a card are made on the CPU."""

    def install(*names: str, current: int = 0) -> None:
        def stand_in(*size: object, device: torch.device) -> torch.Tensor:
            if device.type == "cuda":
                if (device.index or 0) >= len(names):
                    raise RuntimeError("CUDA error: invalid device ordinal\nand more lines")
                return ZEROS(())
            return ZEROS(*size, device=device)

        monkeypatch.setattr(torch, "zeros", stand_in)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return install


def test_without_cards_auto_is_the_cpu(cards):
    """And a card's name is no device."""
    cards()
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError) as error:
        choose_device("H100")
    assert str(error.value) == "--device H100: not available here; there is auto, cpu"


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_auto_and_cuda_are_the_current_card(cards, name):
    """With its number, so that it equals the device of its tensors."""
    cards(H100, A100)
    assert choose_device(name) == torch.device("cuda", 0)
    cards(H100, A100, current=1)
    assert choose_device(name) == torch.device("cuda", 1)


def test_a_number_is_that_card(cards):
    """cuda:1 is the second."""
    cards(H100, A100)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["H100", "h100", "nvidia h100", "NVIDIA-H100", "H100 80GB HBM3"])
def test_a_card_by_its_name(cards, name):
    """Any part, whatever its case, spaces and hyphens; of equal cards the first."""
    cards(A100, H100, H100)
    assert choose_device(name) == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["rtx 4090", "RTX4090", RTX])
def test_a_whole_name_is_no_other_card(cards, name):
    """A name that is part of another one can be asked for in full."""
    cards(RTX_D, RTX)
    if name == RTX:
        assert choose_device(name) == torch.device("cuda", 1)
        return
    with pytest.raises(ValueError) as error:
        choose_device(name)
    assert str(error.value) == (
        f"--device {name}: must name one model; it may be cuda:0 ({RTX_D}), cuda:1 ({RTX})"
    )


@pytest.mark.parametrize(
    "name", ["cuda:2", "cuda:-1", "V100", "quantum", "meta", "", "-", "0", "10"]
)
def test_what_is_not_there_is_one_line_with_what_is(cards, name):
    """With the cards' names; a number alone is no name."""
    cards(H100, A100)
    with pytest.raises(ValueError) as error:
        choose_device(name)
    assert str(error.value) == (
        f"--device {name}: not available here; there is auto, cpu, cuda:0 ({H100}), cuda:1 ({A100})"
    )


def test_a_card_that_cannot_be_used_says_why(cards, monkeypatch):
    """It is there, but full or another's: the driver's own first line, and the flag as typed."""
    cards(H100)

    def full(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nand more lines")

    monkeypatch.setattr(torch, "zeros", full)
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(ValueError) as error:
            choose_device(name)
        assert str(error.value) == f"--device {name}: cannot be used, CUDA error: out of memory"


@pytest.mark.gpu
def test_the_first_card_by_its_own_name():
    """A real card is found by what its driver calls it."""
    name = torch.cuda.get_device_name(0)
    assert choose_device(name) == choose_device("cuda") == torch.device("cuda", 0)


# ------------------------------------------------------------------------------------ conditions


def test_threads_are_given_back():
    """As many as asked for inside; 0 changes nothing."""
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(0):
        assert torch.get_num_threads() == before


def test_precision_of_products_is_of_cards_only_and_given_back():
    """TF32 where it is asked for on CUDA; a CPU multiplies in float32; afterwards as before."""
    before = torch.get_float32_matmul_precision()
    with run_conditions(1, "cpu", "high"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


def test_users_of_a_setting_may_go_in_any_order():
    """The last to come decides while it is there; when all have gone it is as before."""
    value = ["before"]
    setting = ProcessSetting[str](lambda: value[0], lambda new: value.__setitem__(0, new))
    for order in ("abc", "acb", "bac", "bca", "cab", "cba"):
        users = {name: setting.lent(None if name == "b" else name) for name in "abc"}
        for user in users.values():
            user.__enter__()
        assert value == ["c"]
        for name in order:
            users[name].__exit__(None, None, None)
        assert value == ["before"]


def test_the_collector_is_given_back_as_it_was():
    """Nothing stays frozen after a run, and what was frozen before it stays so."""
    gc.unfreeze()  # another test may have run the training command, which freezes as it ends
    with gc_frozen():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    with gc_frozen():
        pass
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


@pytest.mark.parametrize("before", [False, True])
def test_small_numbers_are_zero_during_a_run_and_then_as_before(before):
    """Below float32's normal numbers there is only 0 while a run lasts."""
    tiny = torch.full((), torch.finfo(torch.float32).tiny)
    torch.set_flush_denormal(before)
    try:
        with run_conditions(1):
            assert tiny / 2 == 0
            assert tiny / 2 * 2 == 0
        assert (tiny / 2 == 0) == before
    finally:
        torch.set_flush_denormal(False)
