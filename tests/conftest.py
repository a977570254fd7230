"""What most tests share: no network, a small preference file, and recipes composed as on the command line."""

import atexit
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["PREFTUNE_CACHE"] = tempfile.mkdtemp(prefix="preftune-tests-")  # nothing that an earlier session kept
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

gc.disable()  # until all is imported: pytest_collection_finish
CACHE, MODELS = Path(os.environ["PREFTUNE_CACHE"]), Path.home() / ".cache/preftune/models"
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
MODELS.mkdir(parents=True, exist_ok=True)
(CACHE / "models").symlink_to(MODELS)  # but the embedded models, which are unpacked once
datasets.disable_caching()  # what an earlier run kept has another day's date, where a template writes one

SMALL = [
    "model=tiny",
    "hardware=cpu",
    "hardware.bf16=false",
    "hardware.per_device_train_batch_size=4",
    "tracking=none",
    "train.logging_steps=1",
    "train.learning_rate=1e-3",
    "train.max_steps=2",
    "samples=1",
    "gate.on_fail=warn",  # the tiny model knows nothing
    "fit_check=false",  # a third of such a run's time; whoever asks for the plan says so
]
TINY = ["model=tiny", "hardware=cpu", "hardware.bf16=false", "tracking=none", "samples=1", "gate.on_fail=warn"]
TINY += ["fit_check=false"]
STEPS = ["hardware.per_device_train_batch_size=4", "train.learning_rate=2e-2", "train.max_steps=3"]
DATA = ["data=file", "data.eval_fraction=0.25"]
ONLY_TRAINED = ["pipeline.stages=[sft,preference]"]
THINGS = ["a cat", "rain", "the moon", "bread", "a door", "tea", "a hill", "snow", "a boat", "wood", "salt", "a song"]


@pytest.fixture(scope="session")
def small():
    """Overrides that make any recipe a matter of seconds."""
    return SMALL


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """Twenty-four pairs as JSONL, each prompt once."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    asked = [(f"{verb} {thing}?", thing) for verb in ("What is", "Who likes") for thing in THINGS]
    rows = [
        {"prompt": prompt, "chosen": f"In short, {thing} it is.", "rejected": f"Who can say{'!' * (i % 5 + 1)}"}
        for i, (prompt, thing) in enumerate(asked)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def composed(pairs_file, tmp_path):
    """composed("dpo", "loss=ipo"): that recipe's config for two steps of the tiny model on the small pairs."""

    def compose_recipe(recipe, *overrides):
        GlobalHydra.instance().clear()
        data = ["data=file", f"data.path={pairs_file}", "data.eval_fraction=0.25", f"output_dir={tmp_path / 'run'}"]
        with initialize_config_module("preftune.conf", version_base="1.3"):
            return compose(recipe, [*SMALL, *data, *overrides])

    return compose_recipe


@pytest.fixture
def typed(tmp_path):
    """typed("recipes.dpo", "loss=ipo"): the finished process of that command, from a folder that is no checkout."""

    def run(module, *arguments, timeout=240, **environment):
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def in_turn(tmp_path):
    """in_turn(["recipes.inspect_data", …], …): what each command said and its exit code, all in one fresh process."""

    def run(*commands, timeout=240, **environment):
        driver = Path(__file__).with_name("in_turn.py")
        given = {"cwd": tmp_path, "env": {**os.environ, **environment}, "timeout": timeout, "text": True}
        asked = json.dumps(commands)
        done = subprocess.run([sys.executable, driver], input=asked, stdout=subprocess.PIPE, check=True, **given)
        return [subprocess.CompletedProcess(*each) for each in json.loads(done.stdout)]

    return run


def composed_once(recipe, *overrides):
    GlobalHydra.instance().clear()
    with initialize_config_module("preftune.conf", version_base="1.3"):
        return compose(recipe, list(overrides))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, pairs_file):
    """trained("dpo", "lora=none"): the directory of that recipe's run, three steps of the tiny model."""
    done = {}

    def train_once(recipe, *overrides):
        if (recipe, overrides) not in done:
            from preftune.pipeline.run import run_stages
            from preftune.runs.training import train

            run = tmp_path_factory.mktemp(recipe) / "run"
            given = [f"data.path={pairs_file}", f"output_dir={run}", *overrides]
            given += ONLY_TRAINED if recipe == "sft_dpo" else []
            cfg = composed_once(recipe, *TINY, *STEPS, *DATA, *given)
            (run_stages if recipe == "sft_dpo" else train)(cfg)
            done[recipe, overrides] = run
        return done[recipe, overrides]

    return train_once


@pytest.fixture
def settings():
    """settings("evaluate", "kl_prompts=2"): the composed config of a recipe that trains nothing."""
    return composed_once


@pytest.fixture(autouse=True)
def curves_are_drawn_by_tests_of_reports(request, monkeypatch):
    """And by runs in processes of their own. Elsewhere a page keeps its words alone: drawing is a third of a run."""
    curves = sys.modules.get("preftune.report.curves")
    if curves and request.path.parent.name != "report":
        monkeypatch.setattr(curves.Plot, "svg", lambda plot: "")


FAST = {  # of seconds: they start no process and train no model
    "test_fields", "test_values", "test_rules", "test_renamed", "test_hardware", "test_remedies", "test_house",
    "test_closed_forms", "test_mechanics", "test_global_batch", "test_layout", "test_statistics", "test_scoring",
    "test_conversions", "test_shapes", "test_mixing", "test_demo_data", "test_record", "test_comparison", "test_seams",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """`make test ARGS="-m fast"` runs the tests of FAST alone."""
    for item in items:
        if item.path.stem in FAST and item.get_closest_marker("slow") is None:
            item.add_marker("fast")


FROZEN = [0]  # how many modules were there when they were last left out of garbage collection


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(autouse=True)
def libraries_are_never_garbage():
    """A training collects twice, and would take a second over each to look through what was imported."""
    if len(sys.modules) > FROZEN[0] + 100:
        gc.collect()
        gc.freeze()
        FROZEN[0] = len(sys.modules)
