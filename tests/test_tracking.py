"""Weights & Biases: offline without a key, never a question, never a hang, one run a job."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preftune import tracking
from preftune.training import train

NAMES = {"model": "tiny", "data": "file", "loss": "dpo"}


@pytest.fixture
def no_keys(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def test_without_a_key_the_run_is_offline_and_says_so(no_keys):
    assert tracking.wandb_mode() == ("offline", "W&B offline: no API key found (WANDB_API_KEY, or `wandb login`)")


def test_a_key_in_the_environment_or_in_netrc_means_online(no_keys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    (no_keys / "netrc").write_text("machine wandb.example.org\n  login user\n  password " + "k" * 40 + "\n")
    assert tracking.wandb_mode()[0] == "online"
    (no_keys / "netrc").write_text("machine elsewhere.example.org\n  login user\n  password secret\n")
    assert tracking.wandb_mode()[0] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking.wandb_mode()[0] == "online"


def test_an_explicit_mode_is_kept(no_keys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.wandb_mode() == ("offline", "W&B offline (WANDB_MODE)")


def test_a_key_without_a_network_falls_back_to_offline_in_bounded_time(no_keys, monkeypatch, composed):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(tracking, "LOGIN_SECONDS", 3)
    cfg = composed("dpo", "tracking=wandb")
    Path(cfg.output_dir).mkdir()
    started = time.time()
    with tracking.Tracker(cfg, Path(cfg.output_dir), NAMES) as tracker:
        pass
    assert time.time() - started < 60
    assert "offline" in tracker.line and "wandb sync" in tracker.line


def test_each_job_is_its_own_run_and_holds_what_the_trainer_logged(no_keys, composed):
    for loss in ("dpo", "ipo"):
        cfg = composed("dpo", "tracking=wandb", f"loss={loss}")
        cfg.output_dir += loss
        train(cfg, NAMES | {"loss": loss})
        [run] = Path(cfg.output_dir).glob("wandb/offline-run-*")
        shown = subprocess.run(
            [
                shutil.which("wandb") or str(Path(sys.executable).with_name("wandb")),
                "leet",
                "inspect",
                "--json",
                str(run),
            ],
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        told = "".join(json.dumps(json.loads(line)) for line in shown.stdout.splitlines())
        for metric in ("train/rewards/margins", "train/rewards/accuracies", "train/logps/chosen"):
            assert metric in told
        assert f'"{loss}"' in told
