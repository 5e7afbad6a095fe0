"""The report of odd run directories: a gap in words, never a traceback or a wait."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dqn_fast.report import __main__ as report
from dqn_fast.report import write_report
from dqn_fast.report.health import check_health
from dqn_fast.report.recorded import read_run, split_settings
from tests.report.odd_runs import FILES, NO_RUNS, ODD
from tests.report.recorded_runs import write_run


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(3, marks=pytest.mark.slow)],
    ids=["one member", "three members"],
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run directory."""
    folder = tmp_path_factory.mktemp("whole")
    return write_run(folder / "run", members=request.param, log_points=16, episodes=60)


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize("what", ODD)
def test_an_odd_directory_is_read(what: str, run_dir: Path) -> None:
    """Whatever a file holds, reading and the health checks end soon, with one sentence a gap."""
    ODD[what](run_dir)
    began = time.process_time()
    run = read_run(run_dir)
    for part in split_settings(run):
        assert len(check_health(part)) == 10
    assert all(gap.endswith(".") and "\n" not in gap for gap in run.gaps)
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_named(name: str, run_dir: Path) -> None:
    """A directory, a pipe or a loop of links in place of a file is one gap with its name."""
    for what in ("a directory", "a pipe", "a loop", "missing"):
        shutil.rmtree(run_dir / name) if (run_dir / name).is_dir() else None
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).touch()
        ODD[f"{name} is {what}"](run_dir)
        gaps = [gap for gap in read_run(run_dir).gaps if gap.startswith(name)]
        assert len(gaps) == 1


def test_a_header_makes_no_memory(run_dir: Path) -> None:
    """A header of 8 TB and a zip bomb are gaps, and are not allocated."""
    ODD["header (1000000000000,) '<f8'"](run_dir)
    ODD["a zip bomb"](run_dir)
    tracemalloc.start()
    try:
        gaps = read_run(run_dir).gaps
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert any("its shape (1000000000000,) does not fit its 8 bytes" in gap for gap in gaps)
    assert any("is compressed" in gap for gap in gaps)


def render(what: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit status of the command, and the page, for an odd directory."""
    (ODD | NO_RUNS)[what](run_dir)
    out = run_dir.parent / "page.html"
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir), "--out", str(out)])
    status = report.main()
    return status, out.read_text() if out.exists() else "", str(out)


def check_page(what: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    status, page, _ = render(what, run_dir, monkeypatch)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    if status == 2:
        assert not page
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    else:
        assert status == 0
        assert not err
        assert page.rstrip().endswith("</html>")
        for text in ("</script><b>", "<img src=x>", "NaN%", "Infinity"):
            assert text not in page.split("window.PlotlyConfig")[0][-200_000:]


FEW = (
    "config.json is deep inside", "summary.json is duplicates", "all numbers are huge",
    "all numbers are null", "a million members", "diagnostics q_values NaN",
    "diagnostics visits empty", "diagnostics global_step empty", "config.json is HTML",
)  # fmt: skip


@pytest.mark.parametrize("what", FEW)
def test_an_odd_directory_has_a_page(
    what: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is written, and no text of a file becomes markup."""
    check_page(what, run_dir, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("what", ODD)
def test_every_odd_directory_has_a_page(
    what: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for all of them."""
    check_page(what, run_dir, monkeypatch, capsys)


@pytest.mark.parametrize("what", NO_RUNS)
def test_what_is_no_run_is_one_line(
    what: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, one line that names the directory, and no page."""
    status, page, _ = render(what, run_dir, monkeypatch)
    assert (status, page) == (2, "")
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert str(run_dir) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("out", ["no/page.html", ".", "/", "", "a" * 300, "loop/page.html"])
def test_a_page_that_cannot_be_written_is_one_line(
    out: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2 and one line; no file is left."""
    monkeypatch.chdir(run_dir.parent)
    Path("loop").symlink_to("loop")
    before = sorted(run_dir.parent.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["report", "run", "--out", out])
    assert report.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert sorted(run_dir.parent.rglob("*")) == before


# ---------------------------------------------------------------------------------------- digests


def write_digests(path: Path, names: tuple[str, ...] = FILES) -> None:
    """Write `digests.json` as a run does."""
    files = {}
    for name in names:
        content = (path / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "digests.json").write_text(json.dumps({"global_step": 16_000, "files": files}))


def test_files_with_right_digests_are_not_mentioned(run_dir: Path) -> None:
    """Nor are lines that were added to the metrics after the checkpoint."""
    before = read_run(run_dir).gaps
    write_digests(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 17000, "losses/td_loss": 0.5}\n')
    assert read_run(run_dir).gaps == before == ()


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(name: str, run_dir: Path) -> None:
    """One changed byte: the file is named; numbers of .npz files are not shown."""
    write_digests(run_dir)
    content = (run_dir / name).read_bytes()
    place = content.index(b"0", 30) if name.endswith("json") or "jsonl" in name else 400
    (run_dir / name).write_bytes(content[:place] + b"1" + content[place + 1 :])
    run = read_run(run_dir)
    assert any(
        gap.startswith(f"{name} differs from what the run wrote (its digest is wrong)")
        for gap in run.gaps
    )
    if name.endswith(".npz"):
        assert not (run.episodes if name == "episodes.npz" else run.diagnostics)


def test_a_file_that_is_shorter_or_longer_differs(run_dir: Path) -> None:
    """Arrays may not grow, metrics may not shrink."""
    write_digests(run_dir)
    with (run_dir / "episodes.npz").open("ab") as file:
        file.write(b"\0")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]))
    gaps = " ".join(read_run(run_dir).gaps)
    assert "episodes.npz differs" in gaps
    assert "metrics.jsonl differs" in gaps
    assert "config.json differs" not in gaps


def test_a_missing_file_is_missing_and_no_more(run_dir: Path) -> None:
    """It is not called different as well."""
    write_digests(run_dir)
    (run_dir / "episodes.npz").unlink()
    assert read_run(run_dir).gaps == ("episodes.npz is missing.",)


def test_every_flipped_byte_of_an_array_is_seen_or_harmless(run_dir: Path) -> None:
    """Without digests too: zip's own check finds it, or the numbers are those of the run."""
    whole = read_run(run_dir)
    content = (run_dir / "episodes.npz").read_bytes()
    for place in np.random.default_rng(0).integers(len(content), size=150):
        changed = bytearray(content)
        changed[place] ^= 1 << int(place % 8)
        (run_dir / "episodes.npz").write_bytes(changed)
        run = read_run(run_dir)
        for name, array in run.episodes.items():
            np.testing.assert_array_equal(array, whole.episodes[name])


def test_the_page_says_which_file_differs(run_dir: Path) -> None:
    """In its list of what is missing."""
    write_digests(run_dir)
    ODD["steps are equal"](run_dir)
    page = write_report([run_dir], run_dir.parent / "page.html").read_text()
    assert "metrics.jsonl differs from what the run wrote" in page
