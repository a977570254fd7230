"""What a user installs: wheel and sdist, from a folder and an environment in which no checkout can be imported."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = ["model=tiny", "hardware=cpu", "hardware.bf16=false", "tracking=none", "train.max_steps=2", "samples=1"]
RUN += ["gate.on_fail=warn", "data.max_rows=24"]
pytestmark = pytest.mark.slow


def call(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a clean clone, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    left = {path.name for path in ROOT.glob(".*")} | {path.name for path in ROOT.glob("*.egg-info")}
    left |= {"build", "dist", "runs"}
    shutil.copytree(ROOT, folder / "clone", ignore=lambda at, names: left if Path(at) == ROOT else {"__pycache__"})
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "clone", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of an environment with the wheel in it; all other packages are read from this one's."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [wheel] = built.glob("*.whl")
    call(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", wheel, cwd=folder)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return folder


@pytest.fixture
def at(installed, tmp_path):
    """at("preftune", "dpo", …): what that command prints, in an empty folder with an empty home."""

    def run(program, *arguments):
        home = {"HOME": str(installed / "home"), "PREFTUNE_CACHE": str(installed / "cache")}
        return call(installed / "bin" / program, *arguments, cwd=tmp_path, **home)

    return run


def test_the_packages_pass_the_registrys_check(built):
    assert len(list(built.iterdir())) == 2
    call(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)


def test_the_wheel_and_no_checkout_is_what_runs(at, installed):
    where = at(
        "python", "-c", "import preftune.health, recipes, preftune.conf as c; print(recipes.__path__, c.__path__)"
    )
    assert str(ROOT) not in where and str(installed) in where


def test_the_command_lists_every_recipe(at, installed):
    listed = at("preftune", "--help")
    for recipe in (ROOT / "recipes").glob("[a-z]*.py"):
        assert f"  {recipe.stem} " in listed
    assert "loss.beta=0.05" in at("preftune", "dpo", "--help")
    unknown = subprocess.run([installed / "bin" / "preftune", "dop"], capture_output=True, text=True)
    assert unknown.returncode == 2 and "dpo" in unknown.stderr


def test_every_recipe_runs(at, tmp_path):
    at("preftune", "dpo", "loss=ipo", *RUN, "output_dir=one")
    at("python", "-m", "recipes.sft_dpo", *RUN, "output_dir=two")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())
    at("preftune", "inspect_data")
    assert "GB" in at("preftune", "plan", "model=tiny")
    assert "rewards" in at("preftune", "evaluate", "models=[one]", "max_pairs=8", "max_new_tokens=8")
    at("preftune", "report", "one")
    assert (tmp_path / "one" / "report.html").exists()
    at("preftune", "export", "run=one", "output=out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "gradient" in at("preftune", "mechanics")
    at("preftune", "dashboard")
