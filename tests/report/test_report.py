"""The report's file: its content, and its display in a real browser without network."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from scipy import stats

import dqn_fast
from dqn_fast.report import __main__ as report
from dqn_fast.report import write_report
from tests.report.recorded_runs import change_json, write_run

EVIL = "<script>window.evil=1</script><b>&amp;\"'"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
# Address of the page, once all of it has run.
LOADED = 'return document.readyState === "complete" ? location.href : ""'
in_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="chromium and chromium-driver are not installed"
)


def words(path: Path) -> str:
    """The text of the page as one line, without scripts, figures and HTML."""
    html = path.read_text()
    body = html[html.index("<body>") : html.index("<noscript>")]
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


# -------------------------------------------------------------------------------- without browser


def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    """Apart from Plotly's own code no address is in the file, and its policy forbids loading."""
    from plotly.offline import get_plotlyjs

    out = write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    html = out.read_text()
    assert html.count(get_plotlyjs()) == 1
    assert "http" not in html.replace(get_plotlyjs(), "").replace("http-equiv", "")
    assert "default-src 'none'" in html
    assert out.stat().st_size < 6e6
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_numbers_at_the_top(tmp_path: Path) -> None:
    """Return, optimum, error, transitions and status of a run can be read without scrolling."""
    path = write_run(tmp_path / "run")
    change_json(path / "summary.json", eval_return_mean=0.5, q_error_max=0.0123, num_updates=4_068)
    text = words(write_report([path], tmp_path / "report.html"))
    for number in ("0.8451", "0.0123", "40,000", "4,068", "done", "10 ok"):
        assert number in text[: text.index("Why did a run not learn?")]


def test_scores_of_several_agents(tmp_path: Path) -> None:
    """Mean, interquartile mean and count of final returns are those of all agents of a name."""
    paths = [write_run(tmp_path / str(s), members=5, seed=s, log_points=20) for s in (0, 1)]
    returns = []
    for path in paths:
        row = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
        returns += row["members"]["eval/return_mean"]
    text = words(write_report(paths, tmp_path / "report.html"))
    table = text[text.index("Final returns") : text.index("Single agents")]
    iqm = stats.trim_mean(returns, 0.25)
    assert f"LineWorld-v0 dqn 10 {np.mean(returns):.4g} {iqm:.4g}" in table
    low, high = map(float, re.findall(r"([\d.]+) to ([\d.]+)", table)[0])
    assert low < iqm < high
    assert f"{min(returns):.4g} {max(returns):.4g}" in table


def test_names_over_several_environments_are_pooled(tmp_path: Path) -> None:
    """A name that was run on two environments has a row for both together."""
    paths = [
        write_run(tmp_path / f"{e}{s}", env_id=f"{e}-v0", seed=s, log_points=8)
        for e in "AB"
        for s in (0, 1)
    ]
    text = words(write_report(paths, tmp_path / "report.html"))
    for row in ("A-v0 dqn 2", "B-v0 dqn 2", "all environments dqn 4"):
        assert row in text


def test_settings_that_differ_are_shown(tmp_path: Path) -> None:
    """Runs of one name with different settings are pointed out, and the values tabulated."""
    paths = [write_run(tmp_path / str(g), gamma=g, log_points=8) for g in (0.9, 0.99)]
    text = words(write_report(paths, tmp_path / "report.html"))
    assert "Take care: runs of one experiment differ in gamma." in text
    assert "What differs run gamma" in text
    assert "buffer_size 25,000" in text


def test_a_run_counts_once(tmp_path: Path) -> None:
    """A directory that is named twice is one run."""
    path = write_run(tmp_path / "run", log_points=8)
    text = words(write_report([path, path / ".." / "run"], tmp_path / "report.html"))
    assert "Final returns" not in text


def gif_film(*colours: str) -> bytes:
    """An endless film of 64 x 48 pixels, each picture of one colour."""
    image = pytest.importorskip("PIL.Image")
    frames = [image.new("RGB", (64, 48), colour) for colour in colours]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=60, loop=0)
    return content.getvalue()


def test_films_are_part_of_the_page(tmp_path: Path) -> None:
    """Each run's film is in the file, with words in its place; of many runs the first six."""
    paths = [write_run(tmp_path / str(i), log_points=8, env_id=EVIL) for i in range(8)]
    films = [gif_film("red", f"#0000{i:02x}") for i in range(8)]
    for path, film in zip(paths, films, strict=True):
        (path / "agent.gif").write_bytes(film)
    html = write_report(paths[:1], tmp_path / "report.html").read_text()
    assert base64.b64encode(films[0]).decode() in html
    assert f'alt="The greedy agent playing {escape(EVIL)}"' in html
    assert "No film of the agent" not in html
    html = write_report(paths, tmp_path / "report.html").read_text()
    assert [base64.b64encode(film).decode() in html for film in films] == [True] * 6 + [False] * 2
    assert "2 more films are left out" in html


@pytest.mark.parametrize("content", [None, b"<script>", b"GIF89a" + bytes(2_000_001)])
def test_without_a_film_the_page_says_how_to_get_one(tmp_path: Path, content: bytes | None) -> None:
    """No file, something else, or one too long for a page: a sentence with both commands."""
    path = write_run(tmp_path / "run", log_points=8)
    if content is not None:
        (path / "agent.gif").write_bytes(content)
    out = write_report([path], tmp_path / "report.html")
    assert "data:image/gif" not in out.read_text()
    assert "--video RUN_DIR/agent.gif" in words(out)
    assert "pip install -e &quot;.[video]&quot;" in words(out)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """An interrupted run has a report that names what it lacks."""
    path = write_run(tmp_path / "run")
    (path / "summary.json").unlink()
    (path / "diagnostics.npz").unlink()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"global_st')
    text = words(write_report([path], tmp_path / "report.html"))
    assert "summary.json is missing" in text
    assert "diagnostics.npz is missing" in text
    assert "metrics.jsonl holds a line that is not whole" in text
    assert "Learned values of all states: q_values was not recorded." in text
    assert "cut off" in text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "episodes.npz", "summary.json"])
def test_any_single_file_is_enough(tmp_path: Path, name: str) -> None:
    """Whatever a run left behind, there is a report."""
    path = write_run(tmp_path / "run")
    for file in path.iterdir():
        if file.name != name:
            file.unlink()
    assert "Left out" in words(write_report([path], tmp_path / "report.html"))


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    """No text that a run recorded becomes HTML or ends a script."""
    path = write_run(tmp_path / "run", env_id=EVIL, name=EVIL, log_points=8)
    change_json(path / "summary.json", status=f"failed: {EVIL}", device=EVIL)
    html = write_report([path], tmp_path / "report.html").read_text()
    assert "<script>window.evil" not in html
    assert html.count("</script>") == 3  # Plotly's code, the data and the page's script


def test_a_long_run_makes_a_small_file(tmp_path: Path) -> None:
    """A million episodes and 20 000 log points: under 10 MB, in seconds."""
    path = write_run(tmp_path / "run", log_points=20_000, episodes=1_000_000)
    began = time.process_time()
    out = write_report([path], tmp_path / "report.html")
    assert time.process_time() - began < 30
    assert out.stat().st_size < 10e6


@pytest.mark.slow
def test_many_long_runs_make_a_small_file(tmp_path: Path) -> None:
    """Twelve experiments of five members each, with tables: still under 10 MB."""
    paths = [
        write_run(tmp_path / str(i), members=5, name=str(i), log_points=5_000, episodes=50_000)
        for i in range(12)
    ]
    assert write_report(paths, tmp_path / "report.html").stat().st_size < 10e6


def test_templates_are_packaged() -> None:
    """Every file of the page's folder is package data, so that an installed report finds it."""
    root = Path(dqn_fast.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = root / "dqn_fast" / "report"
    packaged = {p for g in settings["package-data"]["dqn_fast.report"] for p in folder.glob(g)}
    assert {p for p in (folder / "templates").iterdir() if p.is_file()} == packaged
    assert packaged


def test_importing_is_cheap() -> None:
    """Training imports the module: neither Plotly nor torch comes with it."""
    code = "import sys, dqn_fast.report; print({'plotly', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def run_main(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *argv])
    return report.main()


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report is written to the run directory, for several runs to the working directory, or to
    --out."""
    monkeypatch.chdir(tmp_path)
    paths = [str(write_run(tmp_path / str(i), log_points=8)) for i in (0, 1)]
    assert run_main(monkeypatch, paths[0]) == 0
    assert (tmp_path / "0" / "report.html").is_file()
    assert str(tmp_path / "0" / "report.html") in capsys.readouterr().out
    assert run_main(monkeypatch, *paths) == 0
    assert (tmp_path / "report.html").is_file()
    assert run_main(monkeypatch, *paths, "--out", "other.html") == 0
    assert (tmp_path / "other.html").is_file()


@pytest.mark.parametrize("argv", [["nowhere"], [], ["run", "--out", "no/such/folder.html"]])
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
) -> None:
    """Exit status 2 and one line that names what is wrong."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", log_points=8)
    assert run_main(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not argv or argv[-1] in error


# ---------------------------------------------------------------------------------- in a browser

# For each figure whether something is drawn in it: a line, a point, a bar or a heatmap's image.
DRAWN = """
return Object.fromEntries([...document.querySelectorAll(".js-plotly-plot")].map((plot) => [
  plot.id.replace("figure-", ""),
  [...plot.querySelectorAll(
    ".main-svg .scatterlayer path, .main-svg .barlayer path, .main-svg .heatmaplayer image"
  )].some((mark) => mark.getBBox().width > 0)
]));
"""


class Page:
    """A page in headless Chromium that has no network."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get_log("browser")  # what the page before said
        self.driver.get(path.as_uri())
        # On a busy machine `get` may return while the page before still stands.
        for _ in range(300):
            if self.run(LOADED) == path.as_uri():
                return
            time.sleep(0.1)
        raise TimeoutError(f"{path} did not load")

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def check(self, expected: set[str]) -> None:
        """Every expected figure is drawn, nothing was loaded, and the console is empty."""
        drawn = self.run(DRAWN)
        assert set(drawn) == expected
        assert all(drawn.values()), drawn
        assert self.run('return performance.getEntriesByType("resource").length') == 0
        assert self.driver.get_log("browser") == []

    def screenshot(self, path: Path) -> None:
        """The whole page, as far down as it goes."""
        size = self.run(
            "const d = document.documentElement; return [d.clientWidth, d.scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        path.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)  # or Selenium would download one
    driver = webdriver.Chrome(options=options, service=service)
    try:
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield Page(driver)
    finally:
        driver.quit()


CURVES = {"return", "q-error", "q-start", "over-estimation", "td-loss", "dead-units"}
CURVES |= {"policy-changes", "epsilon", "env-steps"}
OF_A_GROUP = {"q-table", "q-error-table", "td-errors", "td-error-sample", "visits"}


@in_browser
def test_browser_draws_every_figure(tmp_path: Path, page: Page) -> None:
    """All figures of a whole run are drawn, on a desk and on a phone, and fit on either."""
    out = write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    for width in (1280, 390):
        page.open(out, width)
        page.check(CURVES | OF_A_GROUP)
        assert page.run("return document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / f"{width}.png")
        assert (tmp_path / f"{width}.png").stat().st_size > 100_000


@in_browser
def test_browser_plays_the_film(tmp_path: Path, page: Page) -> None:
    """The film is decoded, seen without scrolling on a desk, and moves."""
    path = write_run(tmp_path / "run", log_points=8)
    for name in ("metrics.jsonl", "episodes.npz", "diagnostics.npz"):
        (path / name).unlink()  # figures would only cost time
    (path / "agent.gif").write_bytes(gif_film("red", "blue"))
    page.open(write_report([path], tmp_path / "report.html"), 1280, 1000)
    source, alt, loaded, bottom = page.run("""
      const film = document.querySelector(".films img");
      return [film.src.slice(0, 22), film.alt, [film.naturalWidth, film.naturalHeight],
              film.getBoundingClientRect().bottom];
    """)
    assert source == "data:image/gif;base64,"
    assert alt == "The greedy agent playing LineWorld-v0"
    assert loaded == [64, 48]
    assert bottom < 1000
    film = page.driver.find_element("css selector", ".films img")
    looks = {film.screenshot_as_base64}
    deadline = time.perf_counter() + 20
    while len(looks) < 2 and time.perf_counter() < deadline:
        looks.add(film.screenshot_as_base64)
    assert len(looks) > 1
    assert page.driver.get_log("browser") == []


@in_browser
def test_browser_switches_to_wall_time_and_back(tmp_path: Path, page: Page) -> None:
    """Curves and heatmap move to the times at which the steps were reached, others stay."""
    out = write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    page.open(out, 1280)
    state = """
      const of = (key) => document.getElementById("figure-" + key);
      return [Array.from(of("td-loss").data[0].x), Array.from(of("visits").data[0].x),
              Array.from(of("q-table").data[1].x), of("td-loss").layout.xaxis.title.text];
    """
    loss, visits, states, title = page.run(state)
    assert loss == [1_000 * (i + 1) for i in range(40)]
    assert title == "global step (transitions)"
    page.run('document.querySelector("input[value=wall]").click()')
    loss_time, visits_time, states_after, title_after = page.run(state)
    np.testing.assert_allclose(loss_time, 0.1 * np.arange(1, 41) ** 1.2, atol=1e-3)
    np.testing.assert_allclose(visits_time, [0, *loss_time], atol=1e-3)
    assert states_after == states
    assert title_after == "wall time (s)"
    page.check(CURVES | OF_A_GROUP)
    page.run('document.querySelector("input[value=step]").click()')
    assert page.run(state) == [loss, visits, states, title]


@in_browser
def test_browser_draws_comparisons(tmp_path: Path, page: Page) -> None:
    """Two experiments, one with members: curves together, tables and errors for each."""
    paths = [
        write_run(tmp_path / "a", name="a", members=3),
        write_run(tmp_path / "b", name="b", seed=1),
    ]
    page.open(write_report(paths, tmp_path / "report.html"), 1280)
    each = {f"{key}-{i}" for key in OF_A_GROUP for i in (0, 1)}
    page.check(CURVES | {"evaluation"} | each)
    page.screenshot(tmp_path / "comparison.png")


@in_browser
def test_browser_opens_the_report_of_a_failed_run(tmp_path: Path, page: Page) -> None:
    """Cut off inside a line, without summary and diagnostics: what there is is drawn."""
    path = write_run(tmp_path / "run", tabular=False)
    (path / "summary.json").unlink()
    (path / "diagnostics.npz").unlink()
    content = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(content[: len(content) // 2])
    page.open(write_report([path], tmp_path / "report.html"), 1280)
    page.check(CURVES - {"dead-units", "policy-changes"})


@in_browser
def test_browser_shows_evil_names_as_text(tmp_path: Path, page: Page) -> None:
    """Markup in recorded text is neither run nor drawn as markup, in HTML or in figures."""
    paths = [
        write_run(tmp_path / str(i), env_id=f"{EVIL}{i}", name=EVIL, log_points=8) for i in (0, 1)
    ]
    page.open(write_report(paths, tmp_path / "report.html"), 1280)
    assert page.run("return window.evil === undefined")
    assert f"{EVIL}0" in page.run("return document.body.innerText")
    legend = 'return document.querySelector("#figure-td-loss .legendtext").textContent'
    assert page.run(legend) == f"{EVIL}0 · {EVIL}"
    assert page.driver.get_log("browser") == []


@in_browser
def test_browser_prints(tmp_path: Path, page: Page) -> None:
    """On paper the figures are as wide as the page, and it takes several pages."""
    page.open(write_report([write_run(tmp_path / "run")], tmp_path / "report.html"), 1280)
    # One script: a browser lays the paper out as soon as the event has been handled.
    widths = page.run(
        'window.dispatchEvent(new Event("beforeprint"));'
        'return [...document.querySelectorAll(".main-svg")].map((svg) => svg.clientWidth)'
    )
    assert max(widths) <= 660
    page.run('window.dispatchEvent(new Event("afterprint"))')
    pdf = base64.b64decode(page.driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
    page.check(CURVES | OF_A_GROUP)
