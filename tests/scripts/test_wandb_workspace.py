"""The saved dashboard view: what would be sent, that its metrics are logged, and how saving fails.

What is checked is the view as JSON, as the package itself would send it. Where something is saved,
a process of its own talks to a server in this one.
"""

from __future__ import annotations

import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dqn_fast.train import Args, train
from scripts import wandb_workspace
from tests.record.test_tracker import WandbFile, wandb_files

pytest.importorskip("wandb_workspaces", reason='needs pip install -e ".[wandb]"')
pytestmark = pytest.mark.filterwarnings(  # of the package, where it is imported
    "ignore:Pydantic V1 style `@validator` validators are deprecated:DeprecationWarning"
)

COMMAND = [sys.executable, "-m", "scripts.wandb_workspace"]


@pytest.fixture(scope="module")
def view() -> dict[str, Any]:
    return wandb_workspace.spec(wandb_workspace.build("team", "dqn_fast", "Overview"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two members, tracked offline, just long enough for episodes to end."""
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        before = set(os.environ)
        args = Args(total_timesteps=4096, num_seeds=2, quiet=True, device="cpu", run_dir=run_dir)
        args.track, args.wandb_mode = True, "offline"
        train(args)
        yield run_dir
        for name in set(os.environ) - before:
            del os.environ[name]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wandb_workspace", *arguments])
    return wandb_workspace.main()


def panels(view: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The settings of every panel, by section."""
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return {s["name"]: [panel["config"] for panel in s["panels"]] for s in sections}


def test_sections_and_metrics(view: dict[str, Any]) -> None:
    """What belongs together is in one section, and what is to be compared in one panel."""
    shown = {
        section: [panel["metrics"] or [panel["metricRegex"]] for panel in configs]
        for section, configs in panels(view).items()
    }
    assert shown == {
        "Learning": [
            ["charts/episodic_return"],
            ["eval/return_mean"],
            ["eval/q_start", "eval/discounted_return"],
            ["charts/episodic_length"],
            ["charts/epsilon"],
        ],
        "Losses": [["losses/td_loss"], ["losses/grad_norm"]],
        "Q-values": [
            [r"^q/probe_\d+$"],
            ["losses/q_value", "losses/td_target"],
            ["exact/q_error_max"],
        ],
        "Speed": [["perf/env_steps_per_s"], ["perf/updates_per_s"]],
    }
    assert all(s["isOpen"] for s in view["spec"]["section"]["panelBankConfig"]["sections"])
    assert (view["entity"], view["project"]) == ("team", "dqn_fast")
    assert view["displayName"] == "Overview"


def test_axes(view: dict[str, Any]) -> None:
    """All is drawn over global_step, unsmoothed and with units; only TD loss is logarithmic."""
    for configs in panels(view).values():
        for panel in configs:
            assert panel["xAxis"] == "global_step"
            assert panel["chartTitle"]
            assert panel["yAxisTitle"]
            assert panel["yLogScale"] == (panel["metrics"] == ["losses/td_loss"])
            assert "smoothingType" not in panel  # that of the section
            assert panel.get("useMetricRegex", False) == (not panel["metrics"])
    section = view["spec"]["section"]
    local = [s["localPanelSettings"] for s in section["panelBankConfig"]["sections"]]
    for settings in (section["settings"], *local):
        assert settings["xAxis"] == "global_step"
        assert settings["xAxisActive"] is True
        assert settings["smoothingType"] == "none"
        assert settings["smoothingActive"] is False
    assert section["settings"]["shouldAutoGeneratePanels"] is False


def test_every_metric_is_logged(view: dict[str, Any], run_dir: Path) -> None:
    """Every metric and pattern names something in metrics.jsonl, and in what wandb was told."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    recorded = {name for line in lines for name in json.loads(line)}
    mean = wandb_files(run_dir)["short"]
    for logged in (recorded, {name for row in mean.history for name in row}):
        for panel in (panel for configs in panels(view).values() for panel in configs):
            assert {panel["xAxis"], *panel["metrics"]} <= logged
            if "metricRegex" in panel:
                matched = {name for name in logged if re.search(panel["metricRegex"], name)}
                assert matched == {"q/probe_0", "q/probe_1"}


def test_runs_are_grouped_by_env_and_seed(view: dict[str, Any], run_dir: Path) -> None:
    """Paths are those of a real run's config; the mean is no part of a group of members."""
    section = view["spec"]["section"]
    (runs,) = section["runSets"]
    keys = [(key["section"], key["name"]) for key in runs["grouping"]]
    assert keys == [
        ("config", "env_id.value"),
        ("config", "args.value.seed"),
        ("config", "member.value"),
    ]
    assert section["settings"]["useRunsTableGroupingInPanels"] is True

    def group(run: WandbFile) -> list[Any]:
        found = []
        for _, path in keys:  # wandb holds {"value": ...} under each key of the top level
            node: Any = {name: {"value": value} for name, value in run.config.items()}
            for name in path.split("."):
                node = node.get(name, {})
            found.append(node)
        return found

    files = wandb_files(run_dir)
    assert group(files["short"]) == ["LineWorld-v0", 0, {}]
    for i in range(2):
        env_id, seed, member = group(files[f"short__m{i}"])
        assert (env_id, member) == ("LineWorld-v0", i)
        assert isinstance(seed, int)


def test_dry_run(
    view: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prints the view as JSON, nothing else, and saves nothing."""

    def refuse(view: Any) -> str:
        raise AssertionError("saved")

    monkeypatch.setattr(wandb_workspace, "save", refuse)
    assert run_main(monkeypatch, "--entity", "team", "--name", "Overview", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert without_ids(json.loads(out)) == without_ids(view)


def without_ids(value: Any) -> Any:
    """A view without the ids of its parts, which are random."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("__id__", "id", "name")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--entity= ", "--entity: must not be empty"),
        ("--entity=a/b", "--entity a/b: must be a name without /"),
        ("--entity=a --project=b:c", "--project b:c: must be a name without :"),
        ("--entity=a --name=", "--name: must not be empty"),
        ("--entity=a --name=DQN\N{ROCKET}", "--name DQN\N{ROCKET}: wandb takes no emoji or"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 2, one line on stderr, nothing on stdout."""
    assert run_main(monkeypatch, *re.split(" (?=--)", arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: " + message)
    assert err.count("\n") == 1


def test_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the package one line names the extra."""
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert run_main(monkeypatch, "--entity", "team", "--dry-run") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith('pip install -e ".[wandb]"\n')
    assert err.count("\n") == 1


class Server(http.server.ThreadingHTTPServer):
    """Knows as much of wandb's protocol as saving a view takes.

    Attributes:
        status: of every answer; 0 answers nothing at all.
        saved: what was sent to be saved.
    """

    daemon_threads = True

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.saved: list[dict[str, Any]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.status == 0:
            threading.Event().wait()
        if b"upsertView" in body:
            self.server.saved.append(json.loads(body)["variables"])
        view = {"view": {"id": "VmlldzoxMjM=", "name": "nw-abc-v"}, "inserted": True}
        viewer = {"id": "VXNlcjox", "entity": "team", "flags": "{}", "teams": {"edges": []}}
        answer = json.dumps({"data": {"viewer": viewer, "upsertView": view}}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


def run_against(
    status: int, tmp_path: Path, **settings: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Save against a server that answers with `status`; the process, and what it saved."""
    server = Server(status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / ".netrc"),
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_HTTP_TIMEOUT": "30" if status else "2",  # 0 never answers
        **settings,
    }
    command = [*COMMAND, "--entity", "team", "--name", "Overview"]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    server.shutdown()
    server.server_close()
    return done, server.saved


KEY = {"WANDB_API_KEY": "0" * 40}


def test_saves_what_dry_run_prints(view: dict[str, Any], tmp_path: Path) -> None:
    """One new view is sent, the very same, and its address is printed."""
    done, saved = run_against(200, tmp_path, **KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/team/dqn_fast\?nw=abc\n", done.stdout)
    (sent,) = saved
    assert without_ids(json.loads(sent["spec"])) == without_ids(view["spec"])
    assert (sent["entityName"], sent["projectName"]) == ("team", "dqn_fast")
    assert sent["displayName"] == "Overview"
    assert "id" not in sent  # which would replace a view


@pytest.mark.parametrize(
    ("status", "settings", "message"),
    [
        (200, {}, "No API key configured"),
        (401, KEY, "401"),
        (0, KEY, "http://127.0.0.1:"),
    ],
    ids=["no key", "key refused", "no answer"],
)
def test_failing_to_save_is_one_line(
    status: int, settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    """Exit status 1 and one line on stderr that says why, after a bounded wait."""
    done, saved = run_against(status, tmp_path, **settings)
    assert (done.returncode, done.stdout, saved) == (1, "", [])
    assert done.stderr.startswith("error: not saved: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that never returns is given up after SAVE_S."""

    class Hanging:
        release = threading.Event()

        def save(self) -> Any:
            self.release.wait()
            return self

        url = ""

    monkeypatch.setattr(wandb_workspace, "SAVE_S", 0.1)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(TimeoutError, match=r"no answer within 0 s"):
        wandb_workspace.save(Hanging())  # type: ignore[arg-type]
    Hanging.release.set()
