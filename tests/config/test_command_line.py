"""The command line as a user types it: everything wrong is said at once, and what is right reaches Hydra."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from preftune.config.command_line import command_line
from preftune.config.schema import base

CONF = Path(__file__).parents[2] / "conf"


def recipe(*arguments, cwd, python=()):
    return subprocess.run(
        [sys.executable, *python, "-m", *arguments], capture_output=True, text=True, cwd=cwd, env=None, check=False
    )


def test_everything_wrong_is_said_at_once_without_torch_or_traceback(tmp_path):
    typed = [
        "loss.betta=1",
        "+train.learning_rat=1",
        "model=mistral7",
        "train.learning_rate=abc",
        "data.path=gone.jsonl",
    ]
    run = recipe("recipes.dpo", *typed, cwd=tmp_path, python=["-X", "importtime"])
    message = "\n".join(line for line in run.stderr.splitlines() if not line.startswith("import time:"))
    assert run.returncode == 2 and run.stdout == ""
    assert "5 problems in the configuration (nothing was run):" in message
    for key in ("loss.betta ", "train.learning_rat ", "model=mistral7 ", "train.learning_rate ", "data.path "):
        assert f"\n  {key}" in message
    assert "Traceback" not in message and "+" not in message
    modules = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in modules and not modules & {"torch", "transformers", "trl", "peft", "datasets", "wandb"}
    assert list(tmp_path.iterdir()) == []


def test_help_lists_groups_choices_and_examples_without_torch(tmp_path):
    run = recipe("recipes.dpo", "--help", cwd=tmp_path, python=["-X", "importtime"])
    assert run.returncode == 0 and "torch" not in {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    for group in ("model", "data", "loss", "lora", "hardware", "tracking"):
        choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        assert f"{group}: {', '.join(choices)}" in run.stdout
    assert run.stdout.count("python -m recipes.") >= 4
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_the_trainer_that_no_file_names_compose_without_a_plus(tmp_path):
    typed = ["loss=ipo", "train.adam_beta1=0.5", "loss.ld_alpha=0.5", "+loss.beta=0.3", "lora.bias=all", "--cfg", "job"]
    run = recipe("recipes.dpo", *typed, cwd=tmp_path)
    cfg = OmegaConf.create(run.stdout)
    assert run.returncode == 0, run.stderr
    assert (cfg.train.adam_beta1, cfg.loss.ld_alpha, cfg.loss.beta, cfg.lora.bias) == (0.5, 0.5, 0.3, "all")


def test_what_is_typed_is_what_is_composed(tmp_path):
    run = recipe("recipes.dpo", "loss=ipo", "model=mistral7b", "--cfg", "job", cwd=tmp_path)
    with initialize_config_module("preftune.conf", version_base="1.3"):
        assert OmegaConf.create(run.stdout) == compose("dpo", ["loss=ipo", "model=mistral7b"])


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_typo_gets_the_same_answer_with_and_without_plus(told, plus):
    assert told(f"{plus}loss.betta=1") == {"loss.betta": "no such key; did you mean loss.beta?"}


def test_a_wrong_choice_lists_the_choices(told):
    for plus in ("", "+", "++"):
        answer = told(f"{plus}loss=dpoo")["loss=dpoo"]
        assert answer.startswith("no such choice; did you mean dpo? (choices: alphapo, aot,")
    assert told("model=mistral7", "hardware=gpu24")["hardware=gpu24"].startswith(
        "no such choice; did you mean gpu24gb?"
    )


def test_a_key_with_a_letter_dropped_is_recognised(told):
    typos = {key[:-2] + key[-1:]: key for key in base() if not key.startswith("hydra") and len(key) > 8}
    found = told(*(f"{typo}=1" for typo in typos))
    for typo, key in typos.items():
        assert f"did you mean {key}?" in found[typo]


@pytest.mark.parametrize(
    ("typed", "key", "meant"),
    [
        ("los.beta=1", "los.beta", "loss.beta"),
        ("beta=1", "beta", "loss.beta"),
        ("learning_rate=1", "learning_rate", "train.learning_rate"),
        ("model.learning_rate=1", "model.learning_rate", "train.learning_rate"),
        ("loss.labelsmoothing=0.1", "loss.labelsmoothing", "loss.label_smoothing"),
        ("lora.alpha=1", "lora.alpha", "lora.lora_alpha"),
        ("train.adam_betta1=1", "train.adam_betta1", "train.adam_beta1"),
        ("lora.quantization.load_in_5bit=true", "lora.quantization.load_in_5bit", "lora.quantization.load_in_8bit"),
        ("~train.seedd", "~train.seedd", "train.seed"),
    ],
)
def test_a_wrong_key_names_the_right_one(told, typed, key, meant):
    assert told(typed) == {key: f"no such key; did you mean {meant}?"}


def test_an_argument_of_another_trainer_names_its_loss(told):
    assert told("loss.desirable_weight=2")["loss.desirable_weight"].endswith("it belongs to loss=kto")
    assert told("loss.beta=2", recipe="sft")["loss.beta"].startswith(
        "not an argument of this loss; it belongs to loss="
    )
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        assert told("loss=simpo", f"loss.{name}=true")[f"loss.{name}"].startswith("this loss has no reference model")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("train.learning_rate=abc", "wants a float, got 'abc'; for example train.learning_rate=5e-6"),
        ("train.max_steps=1.5", "wants a whole number, got 1.5; for example train.max_steps=100"),
        ("train.max_steps=true", "wants a whole number, got true; for example train.max_steps=100"),
        ("hardware.use_cpu=yes", "wants true or false, got 'yes'; for example hardware.use_cpu=true"),
        ("train.seed=[1,2]", "wants a whole number, got [1,2]; for example train.seed=42"),
        ("loss.loss_type=ipo", "wants a list of some of"),
        ("loss.loss_type=[sigmoidd]", "no such value 'sigmoidd'; did you mean sigmoid?"),
        ("loss.loss_type=[kto_pair]", "kto_pair is gone: KTO is a trainer of its own: write loss=kto"),
        ("train.lr_scheduler_type=cosin", "no such value 'cosin'; did you mean cosine?"),
        ("hardware.optim=adam", "adam is called adamw_torch"),
        ("lora.bias=some", "no such value 'some'"),
        ("lora.r=x", "wants a whole number, got 'x'; for example lora.r=8"),
        ("model.trust_remote_code=yes", "wants true or false, got 'yes'; for example model.trust_remote_code=true"),
        ("tracking.tags=mine", "wants a list, got 'mine'"),
        ("resume=1", "wants true or false, got 1; for example resume=true"),
        ("output_dir=5", "wants a string, got 5; for example output_dir='\"5\"'"),
        ("train=5", "is a section; write one of its keys"),
        ("~model.path", "cannot be taken out"),
        ("~loss", "a group cannot be taken out"),
        ("foo", "cannot be read; write key=value"),
        ("loss.loss_type=[ipo", "cannot be read; its brackets do not match"),
        ("loss.beta=0.1,0.2", "is several values: add -m to run each"),
        ("hydra.verbos=true", "Hydra has no such key; did you mean hydra.verbose?"),
        ("hydra/launcher=slurm", "no such choice; did you mean submitit_slurm?"),
        ("loss.trainer=trl.DPOTrianer", "trl.DPOTrianerConfig is not to be found; did you mean trl.DPOTrainer?"),
    ],
)
def test_a_wrong_value_says_what_is_wanted(told, typed, answer):
    found = told(typed)
    key = typed if typed in found else typed.partition("=")[0]
    assert found[key].startswith(answer)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("train.bf16=true", "has its place elsewhere: write hardware.bf16=true"),
        ("loss.learning_rate=1e-6", "has its place elsewhere: write train.learning_rate=1e-6"),
        ("train.beta=0.2", "has its place elsewhere: write loss.beta=0.2"),
        ("train.output_dir=x", "has its place elsewhere: write output_dir=x"),
        ("train.run_name=x", "has its place elsewhere: write tracking.run_name=x"),
        ("train.resume_from_checkpoint=x", "is set by resume: write that"),
    ],
)
def test_an_argument_in_a_second_group_names_the_first(told, typed, answer):
    assert told(typed) == {typed.partition("=")[0]: answer}


def test_missing_values_are_asked_for(told):
    assert told("model=path") == {"model.path": "must be given; for example model.path=./my-model"}
    assert told("model=path", "model.path=org/name") == {}


def test_options_of_other_command_lines_are_translated(told):
    found = told("--learning_rate", "5e-6", "--loss=ipo", "--max-steps=3", "loss.beta=0.2", "--lr=1", "model=tinyy")
    assert found["--learning_rate 5e-6"] == "overrides take no dashes; write train.learning_rate=5e-6"
    assert found["--loss=ipo"] == "overrides take no dashes; write loss=ipo"
    assert found["--max-steps=3"] == "overrides take no dashes; write train.max_steps=3"
    assert found["--lr=1"] == "write train.learning_rate=5e-6"
    assert "model=tinyy" in found


def test_a_sweep_is_checked_value_by_value(told):
    found = told("-m", "loss=ipo,dpoo", "loss.beta=0.1,-1", "train.max_steps=1,x")
    assert list(found) == ["loss=dpoo", "loss.beta", "train.max_steps"]
    assert told("--multirun", "loss=ipo,orpo,kto,simpo", "loss.beta=0.1,0.2") == {}
    assert told("loss=glob(apo*)", "hydra.mode=MULTIRUN") == {}


def test_the_stages_of_a_pipeline_are_checked_against_their_own_trainers(told):
    assert told("sft.train.packing=true", "sft.loss.assistant_only_loss=false", recipe="sft_dpo") == {}
    found = told("sft.train.packin=true", "sft.train.learning_rate=x", "loss@sft.loss=sftt", recipe="sft_dpo")
    assert found["sft.train.packin"] == "no such key; did you mean sft.loss.packing?"
    assert found["sft.train.learning_rate"].startswith("wants a float, got 'x'")
    assert found["loss@sft.loss=sftt"].startswith("no such choice; did you mean sft?")


def test_arguments_for_hydra_are_rewritten():
    line = ["loss=ipo,hinge", "-m", "loss.label_smoothing=0.1,0.2", "+loss.beta=0.2", "output_dir=runs/a (1)"]
    assert command_line("dpo", line) == [
        "-m",
        "loss=ipo,hinge",
        "++loss.label_smoothing=0.1,0.2",
        "loss.beta=0.2",
        'output_dir="runs/a (1)"',
        "hydra.job.config.override_dirname.exclude_keys=['loss.beta', 'output_dir']",  # what does not name a job
    ]


def test_a_mapping_that_is_empty_takes_its_keys_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.jsonl").touch()
    line = ["bema={update_freq: 1}", "lora=none", "data.eval_sets={other: o.jsonl}", "-m", "train.seed=1,2"]
    assert command_line("dpo", line) == [
        "-m",
        "++bema.update_freq=1",
        "lora=none",
        "++data.eval_sets.other=o.jsonl",
        "train.seed=1,2",
        "hydra.job.config.override_dirname.exclude_keys=['bema', 'bema.update_freq', 'data.eval_sets', "
        "'data.eval_sets.other', 'lora']",
    ]


def test_a_wrong_key_in_a_mapping_is_told_like_any_other(told):
    assert told("bema={update_frequency: 5}", "lora=none")["bema.update_frequency"].startswith("no such key; did you")


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["--help"],
        ["--info", "config"],
        ["--cfg", "job", "loss=ipo"],
        ["hydra.verbose=true", "hydra/launcher=basic", "loss=ipo"],
        ["+hydra.job.env_set.X=1"],
        ["++train.lr_scheduler_kwargs.num_cycles=2"],
        ["~train.weight_decay"],
        ["--cfg", "job", "model=path"],
    ],
)
def test_what_hydra_offers_passes_through(line):
    assert command_line("dpo", line) == line


def test_a_config_dir_of_ones_own_adds_choices(told, tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("defaults: [ipo]\nbeta: 0.7\n")
    (tmp_path / "loss" / "typo.yaml").write_text("defaults: [ipo]\nbetta: 0.7\n")
    assert told("--config-dir", str(tmp_path), "loss=mine") == {}
    assert told(f"hydra.searchpath=[file://{tmp_path}]", "loss=mine") == {}
    assert told("--config-dir", str(tmp_path), "loss=typo") == {"loss.betta": "no such key; did you mean loss.beta?"}
    assert told("--config-dir", str(tmp_path / "gone"))["--config-dir"].startswith("there is no folder")


def test_a_recipe_that_does_not_exist_lists_those_that_do(told):
    assert told("--config-name", "dpp")["--config-name dpp"].startswith("no such choice; did you mean dpo? (choices: ")
