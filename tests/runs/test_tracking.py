"""Weights & Biases: offline without a key, never a question, never a hang, one run a job; the terminal's progress."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf
from transformers import TrainerState
from wandb_runs import read_offline
from wandb_server import ENTITY, KEY, serving

from preftune.config.errors import Interrupted, Stopped
from preftune.config.hardware import wandb_mode
from preftune.runs import tracking
from preftune.runs.tracking import Progress, Tracker, exit_code, run_name
from preftune.runs.training import train

NAMES = {"model": "tiny", "data": "file", "loss": "dpo"}
FINDING = {
    "code": "margin_explodes",
    "step": 3,
    "value": float("nan"),
    "threshold": 20.0,
    "meaning": "The margin grew without bound.",
    "remedy": "Raise loss.beta.",
}
DATA_FINDING = {"code": "duplicates", "severity": "note", "count": 2, "of": 24, "says": "seen twice", "remedy": "none"}


def settings(**changes):
    """As much of a recipe's config as a Tracker reads."""
    tracked = {"report_to": "wandb", "project": "preftune", "group": None, "tags": ["mine"], "run_name": None}
    return OmegaConf.create({"loss": {"beta": 0.1}, "train": {"seed": 1}, "tracking": tracked | changes})


def of_type(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


def only_run(folder):
    [run] = folder.glob("wandb/*run-*")
    return run


@pytest.fixture
def no_keys(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


@pytest.fixture
def online(no_keys, monkeypatch):
    """A server that this process's W&B client goes to."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()
        yield server
    wandb.teardown()


def test_without_a_key_the_run_is_offline_and_says_so(no_keys):
    assert wandb_mode() == ("offline", "W&B offline: no API key found (WANDB_API_KEY, or `wandb login`)")


def test_a_key_in_the_environment_or_in_netrc_means_online(no_keys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    (no_keys / "netrc").write_text("machine wandb.example.org\n  login user\n  password " + "k" * 40 + "\n")
    assert wandb_mode()[0] == "online"
    (no_keys / "netrc").write_text("machine elsewhere.example.org\n  login user\n  password secret\n")
    assert wandb_mode()[0] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode()[0] == "online"


def test_an_explicit_mode_is_kept(no_keys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode() == ("offline", "W&B offline (WANDB_MODE)")


def test_a_key_without_a_network_falls_back_to_offline_in_bounded_time(no_keys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(tracking, "LOGIN_SECONDS", 3)
    wandb.teardown()
    started = time.time()
    with Tracker(settings(), no_keys, NAMES) as tracker:
        pass
    assert time.time() - started < 60
    assert "offline" in tracker.line and "wandb sync" in tracker.line
    wandb.teardown()


def test_a_trained_run_holds_config_by_group_manifest_metrics_answers_and_verdicts(no_keys, composed):
    cfg = composed("dpo", "tracking=wandb", "gate.on_fail=warn")
    train(cfg, NAMES)
    records = read_offline(only_run(Path(cfg.output_dir)))
    [begun] = of_type(records, "run")
    first, *later = [begun["config"], *of_type(records, "config")]
    assert {"model", "data", "loss", "lora", "hardware", "train", "choices"} <= first["update"].keys()
    assert first["update"]["loss"]["beta"] == cfg.loss.beta and begun["tags"] == list(NAMES.values())
    assert begun["run_group"] == "tiny-file" and begun["display_name"] == "run"
    assert any("versions" in update["update"].get("manifest", {}) for update in later)
    seen = "".join(json.dumps(row["item"]) for row in of_type(records, "history"))
    for metric in ("train/rewards/margins", "train/rewards/accuracies", "train/logps/chosen", "eval/rewards/margins"):
        assert f'"{metric}"' in seen
    told = "".join(json.dumps(each["update"]) for each in of_type(records, "summary"))
    assert '"logp_accuracy_after"' in told
    assert [table.parent.name for table in only_run(Path(cfg.output_dir)).rglob("*.table.json")] == ["tables"] * 3


def test_online_a_run_arrives_whole_with_its_exit_code_and_without_its_key(online, no_keys):
    with pytest.raises(SystemExit), Tracker(settings(), no_keys / "run", NAMES) as tracker:
        tracker.manifest({"git_commit": "abc"})
        tracker.data_findings([DATA_FINDING | {"examples": ["a:1", "a:2"]}])
        for step in range(3):
            wandb.log({"train/loss": 1 / (step + 1), "train/global_step": step})
            tracker.samples(step, [{"prompt": "Tea?", "before": "no", "answer": f"yes, {step}"}])
        tracker.alert(FINDING)
        tracker.findings([FINDING])
        tracker.summary({"perplexity": 12.5, "snapshots": [], "margin_before": None})
        raise SystemExit(3)
    first, *_, last = online.operations["UpsertBucket"]
    run = first["name"]
    assert (first["project"], first["groupName"], first["displayName"]) == ("preftune", "tiny-file", "run")
    assert sorted(first["tags"]) == ["dpo", "file", "mine", "tiny"]
    assert json.loads(first["config"])["loss"]["value"] == {"beta": 0.1}
    assert json.loads(last["config"])["manifest"]["value"] == {"git_commit": "abc"}
    losses = [row["train/loss"] for row in online.lines(run) if "train/loss" in row]
    assert losses == [1, 0.5, pytest.approx(1 / 3)]
    [alert] = online.operations["NotifyScriptableRunAlert"]
    assert alert["title"] == "margin_explodes" and "Raise loss.beta." in alert["text"]
    assert online.ends[run]["exitcode"] == 3
    summary = online.lines(run, "wandb-summary.json")[-1]
    assert summary["perplexity"] == 12.5 and summary["tables/findings"]["nrows"] == 1
    answers = json.loads(online.files[summary["tables/samples"]["path"]])
    assert [row[0] for row in answers["data"]] == [0, 1, 2]
    assert online.unknown == []
    kept = [path.read_bytes() for path in no_keys.rglob("*") if path.is_file()]
    assert not [content for content in (*kept, *online.files.values()) if KEY.encode() in content]


def test_an_offline_run_is_sent_by_wandb_sync(online, no_keys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Tracker(settings(), no_keys / "run", NAMES):
        wandb.log({"train/loss": 0.5})
    assert not online.operations["UpsertBucket"]
    folder = only_run(no_keys / "run")
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    monkeypatch.delenv("WANDB_MODE")
    done = subprocess.run(command, cwd=no_keys, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    [begun] = of_type(read_offline(folder), "run")
    assert [row["train/loss"] for row in online.lines(begun["run_id"])] == [0.5]
    assert online.operations["UpsertBucket"][0]["entity"] in (None, "", ENTITY)


def test_a_network_that_is_lost_ends_the_run_in_bounded_time_and_says_how_to_send_it(no_keys, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.teardown()
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        tracker = Tracker(settings(), no_keys / "run", NAMES)
    started = time.time()
    with tracker:
        wandb.log({"train/loss": 0.5})
    assert time.time() - started < 15
    assert f"wandb sync {only_run(no_keys / 'run')}" in capsys.readouterr().out
    assert of_type(read_offline(only_run(no_keys / "run")), "history")
    wandb.teardown()


KILLED = """
import json, pathlib, sys, time, wandb
from omegaconf import OmegaConf
from preftune.runs import tracking
with tracking.Tracker(OmegaConf.create(json.loads(sys.argv[1])), pathlib.Path("run"), {}):
    while True:
        wandb.log({"train/loss": 1.0, "at": time.time()})
        print("logged", flush=True)
        time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_kill_loses_at_most_about_a_second(no_keys):
    command = [sys.executable, "-c", KILLED, json.dumps(OmegaConf.to_container(settings()))]
    process = subprocess.Popen(command, cwd=no_keys, stdout=subprocess.PIPE)
    process.stdout.readline()  # the first row is logged
    time.sleep(3)
    killed = time.time()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows = of_type(read_offline(only_run(no_keys / "run")), "history")
    assert killed - rows[-1]["item"]["at"] < 2


@pytest.mark.parametrize(("rank", "report_to"), [("1", "wandb"), ("0", "none"), ("0", "trackio")])
def test_other_ranks_and_other_trackers_leave_wandb_alone(rank, report_to, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    with Tracker(settings(report_to=report_to), tmp_path, NAMES) as tracker:
        tracker.manifest({})
        tracker.summary({"samples": [{"prompt": "a", "before": "b", "after": "c"}]})
        tracker.data_findings([DATA_FINDING])
        tracker.findings([FINDING])
        tracker.alert(FINDING)
        tracker.samples(1, [])
    assert wandb.run is None and not list(tmp_path.iterdir())


def test_the_exit_code_is_that_of_the_process():
    ends = [
        None,
        ValueError(),
        Stopped("by a guard"),
        Interrupted(15, ""),
        SystemExit(2),
        SystemExit("why"),
        SystemExit(),
    ]
    assert [exit_code(end) for end in ends] == [0, 1, 3, 143, 2, 1, 0]
    assert exit_code(KeyboardInterrupt()) == 130


def test_a_stage_of_a_pipeline_bears_the_names_of_both(tmp_path):
    (tmp_path / "demo").mkdir()
    assert run_name(tmp_path / "demo") == "demo"
    (tmp_path / "demo/config.yaml").touch()
    assert run_name(tmp_path / "demo/sft") == "demo/sft"


def state(step, main=True):
    return TrainerState(is_world_process_zero=main, global_step=step, max_steps=4)


def test_the_bar_shows_margin_accuracy_and_tokens_a_second(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = Progress("dpo")
    bar.on_train_begin(None, state(0), None)
    logs = {"rewards/margins": 0.1234, "rewards/accuracies": 0.75, "tokens_per_second": 1234.5}
    bar.on_log(None, state(1), None, logs=logs)
    assert bar.bar.postfix == "margin 0.123, accuracy 0.75, 1,234 tokens/s"
    bar.on_log(None, state(1), None, logs={"eval_rewards/margins": 9.0})
    assert "0.123" in bar.bar.postfix
    bar.on_train_end(None, state(4), None)


def test_tokens_a_second_are_counted_where_the_trainer_does_not_say_them(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    bar = Progress("dpo")
    assert bar.progress_suffix({"num_tokens": 1000}) == ""
    assert bar.progress_suffix({"num_tokens": 3000}) == "1,000 tokens/s"


def test_other_ranks_show_no_progress(capsys):
    bar = Progress("dpo")
    bar.on_train_begin(None, state(0, main=False), None)
    bar.on_log(None, state(1, main=False), None, logs={"rewards/margins": 0.1})
    bar.on_step_end(None, state(1, main=False), None)
    bar.on_train_end(None, state(1, main=False), None)
    assert capsys.readouterr() == ("", "")
