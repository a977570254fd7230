"""The W&B workspace: every panel on what real runs log, saved online, written as a spec offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from wandb_runs import read_offline
from wandb_server import ENTITY, KEY, serving

from preftune.report import dashboard
from preftune.report.dashboard import DashboardError, metrics, sections, wandb
from preftune.report.panels import DRAWN, IPO, KTO, ORPO, PAIRS, PANELS, REFERENCE, REWARD

LOSSES = ("dpo", "ipo", "kto", "orpo")
LOGGED_BY = {
    "": LOSSES,
    REFERENCE: ("dpo", "ipo", "kto"),
    PAIRS: ("dpo", "ipo"),
    IPO: ("ipo",),
    f"{KTO}, {DRAWN}": ("kto",),
    DRAWN: (),  # tests/trainers/test_rewards.py has these
    REWARD: (),
    ORPO: ("orpo",),
}


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory, pairs_file, small):
    """The records of the offline W&B runs, by loss, of one multirun over LOSSES with two steps each.

    Workers of one test session share it: it takes half a minute.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "multirun"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            multirun(folder, pairs_file, small)
    return folder, [read_offline(path) for path in sorted(folder.glob("runs/*/wandb/offline-run-*"))]


def multirun(folder, pairs_file, small):
    folder.mkdir()
    settings = [*small, "tracking=wandb", "gate.on_fail=warn", "data=file", f"data.path={pairs_file}"]
    settings += ["data.eval_fraction=0.5", "output_dir=runs"]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.dpo", "--multirun", f"loss={','.join(LOSSES)}", *settings],
        cwd=folder,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": KEY},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def logged(records):
    """The names of everything in a run's history; the reader says a table's parts as name.part."""
    return {
        name.partition(".")[0]
        for record in records
        if record["type"] == "history"
        for name in record["history"]["item"]
    }


def config(records):
    """A run's config, as it was when the run began."""
    [run] = [record["run"] for record in records if record["type"] == "run"]
    return run["config"]["update"]


@pytest.mark.slow
def test_a_multirun_is_one_wandb_run_a_job(runs_of):
    folder, runs = runs_of
    assert [len(list(path.glob("wandb/offline-run-*"))) for path in sorted(folder.glob("runs/*"))] == [1, 1, 1, 1]
    assert [config(records)["choices"]["loss"] for records in runs] == list(LOSSES)
    for records in runs:
        assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [0]


@pytest.mark.slow
def test_every_panel_shows_what_real_runs_log_and_says_which_losses_log_it(runs_of):
    found = {config(records)["choices"]["loss"]: logged(records) for records in runs_of[1]}
    names = {f"tables/{name}": "" for name in ("findings", "samples", "data_findings")}
    names |= {name: panel.losses for panel in PANELS for part in panel.shown for name in metrics(panel, part)}
    for name, by in names.items():
        losses = tuple(loss for loss in LOSSES if name in found[loss])
        assert losses == LOGGED_BY[by], f"{name}: {losses}"


@pytest.mark.slow
def test_runs_are_grouped_by_keys_that_their_config_has(runs_of):
    workspace = dashboard.workspace("", "p", "n")
    for records in runs_of[1]:
        for group in workspace.runset_settings.groupby:
            section, key = group.name.split(".")
            assert key in config(records)[section]


@pytest.mark.slow
def test_no_key_is_in_any_file_of_a_run(runs_of):
    files = [path for path in runs_of[0].rglob("*") if path.is_file()]
    assert len(files) > 40
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_offline_the_spec_is_written_and_says_how_to_publish(typed, tmp_path):
    done = typed("recipes.dashboard", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert "WANDB_API_KEY" in done.stdout
    written = json.loads((tmp_path / "runs/dashboard.json").read_text())
    saved = written["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in saved] == list(sections())
    assert written["url"] is None


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The server, with this process's W&B client pointed at it."""
    with serving() as server:
        for name, value in {"BASE_URL": server.url, "API_KEY": KEY, "SILENT": "true"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.chdir(tmp_path)
        wandb.teardown()
        yield server
        wandb.teardown()


def test_online_the_workspace_is_saved_and_a_second_time_brought_up_to_date(online, monkeypatch):
    opened = []
    monkeypatch.setattr(dashboard.webbrowser, "open", opened.append)
    first = dashboard.build("preftune", None, "preftune", "dashboard.json", open=True)
    second = dashboard.build("preftune", None, "preftune again", "dashboard.json")
    assert first.startswith(f"saved {online.url}/{ENTITY}/preftune?nw=") and first.split()[1] == second.split()[1]
    assert opened == [first.split()[1]]
    [view] = online.views.values()
    assert view["entityName"] == ENTITY and view["displayName"] == "preftune again"
    saved = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [len(section["panels"]) for section in saved] == [len(parts) for parts in sections().values()]
    assert KEY not in Path("dashboard.json").read_text()
    assert online.unknown == []


def test_a_workspace_that_is_not_taken_is_an_error_with_a_remedy(online, monkeypatch):
    monkeypatch.setattr(online, "on_UpsertView2", None, raising=False)
    with pytest.raises(DashboardError, match="dashboard.json"):
        dashboard.build("preftune", "nobody", "preftune", "dashboard.json")
