"""Values that cannot work together are refused, and everything that the project ships is not."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from preftune.config import check, schema
from preftune.config.check import ConfigError
from preftune.config.schema import KINDS, RANGES
from preftune.config.stages import RESERVED

CONF = Path(__file__).parents[2] / "conf"
CPU = ("hardware=cpu", "hardware.bf16=false")


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides, recipe="dpo"):
    with initialize_config_module("preftune.conf", version_base="1.3"):
        return compose(recipe, list(overrides))


@pytest.mark.parametrize(
    ("recipe", "override"),
    [("dpo", f"{group}={choice}") for group in ("loss", "lora", "hardware", "tracking") for choice in choices(group)]
    + [("dpo", f"{group}={choice}") for group in ("model", "data") for choice in choices(group)]
    + [(recipe, "hardware=cpu") for recipe in ("dpo", "kto", "orpo", "sft", "sft_dpo")],
)
def test_what_the_project_ships_has_no_problem(recipe, override):
    more = {
        "model=path": ["++model.path=org/name"],
        "data=file": ["++data.path=org/name"],
        "loss=tr_dpo": ["lora=none"],  # its file says so
    }.get(override, [])
    assert check.check(composed(override, *more, recipe=recipe)) == []


@pytest.mark.parametrize(
    ("overrides", "key", "phrase"),
    [
        (["+train.hub_token=hf_x"], "train.hub_token", "set HF_TOKEN"),
        (["+train.push_to_hub=true"], "train.push_to_hub", "recipes.export run=RUN"),
        (
            ["+train.label_smoothing_factor=0.1"],
            "train.label_smoothing_factor",
            "ignores it; write loss.label_smoothing",
        ),
        (["train.lr_scheduler_type=cosine_with_min_lr"], "train.lr_scheduler_type", "min_lr_rate: 0.1"),
        (["+hardware.parallelism_config=abc"], "hardware.parallelism_config", "wants an object of accelerate's"),
        (["+hardware.deepspeed={a: 1}"], "hardware.deepspeed", "is no configuration of DeepSpeed's"),
        (["+train.deepspeed=ds.json"], "train.deepspeed", "there is no file ds.json"),
        (["train.learning_rate=-1e-6"], "train.learning_rate", "at least 0"),
        (["train.learning_rate=inf"], "train.learning_rate", "below inf"),
        (["loss.beta=0"], "loss.beta", "above 0, got 0; usual is 0.1"),
        (["train.max_length=0"], "train.max_length", "above 0"),
        (["train.max_steps=0"], "train.max_steps", "wants 1 or more steps"),
        (["hardware.gradient_accumulation_steps=0"], "hardware.gradient_accumulation_steps", "at least 1"),
        (["lora.r=0"], "lora.r", "at least 1"),
        (["loss=orpo", "loss.rate=abc"], "loss.rate", "wants a learning rate above 0, got abc; for example 2e-5"),
        (["loss=orpo", "loss.rate=0"], "loss.rate", "wants a learning rate above 0, got 0"),
        (["lora.lora_dropout=1"], "lora.lora_dropout", "at least 0 and below 1"),
        (["loss=exo", "loss.label_smoothing=0"], "loss.label_smoothing", "above 0 and below 1 with loss_type exo_pair"),
        (["loss=robust", "loss.label_smoothing=0.5"], "loss.label_smoothing", "below 0.5 with loss_type robust"),
        (["loss.loss_weights=[1,2]"], "loss.loss_weights", "gives 2 weights for 1 loss_type; for example"),
        (
            ["loss=nca", "loss.f_divergence_type=forward_kl"],
            "loss.f_divergence_type",
            "does not go with loss_type nca_pair",
        ),
        (["loss=aot", "loss.use_weighting=true"], "loss.use_weighting", "does not go with loss_type aot"),
        (["loss.truncation_mode=keep_end"], "loss.truncation_mode", "is deprecated by TRL; write"),
        (["loss.padding_free=true"], "loss.padding_free", "takes it and ignores it"),
        (["hardware=gpu", "hardware.fp16=true"], "hardware.fp16", "excludes hardware.bf16; for float16 write"),
        ([*CPU, "hardware.fp16=true"], "hardware.fp16", "does not work on CPU"),
        (
            ["hardware.activation_checkpointing=true"],
            "hardware.activation_checkpointing",
            "its older name, is selective",
        ),
        (
            ["hardware.gradient_checkpointing=partial"],
            "hardware.gradient_checkpointing",
            "no such value 'partial' (true or false or selective)",
        ),
        (
            ["+hardware.gradient_checkpointing_kwargs={use_reentrant:true}"],
            "hardware.gradient_checkpointing",
            "does not go with use_reentrant: true",
        ),
        (
            ["hardware=zero3", "hardware.gradient_checkpointing=selective"],
            "hardware.gradient_checkpointing",
            "under ZeRO-3; write true",
        ),
        (["loss.sync_ref_model=true", "lora=none"], "loss.sync_ref_model", "write loss.precompute_ref_log_probs=false"),
        (
            ["loss.sync_ref_model=true", "loss.precompute_ref_log_probs=false"],
            "loss.sync_ref_model",
            "needs a reference model, which an adapter does without; write lora=none",
        ),
        (
            ["lora=none", "lora.quantization.load_in_4bit=true"],
            "lora.quantization",
            "cannot be trained in full; write lora=qlora",
        ),
        (["lora=qlora", "lora.quantization.load_in_8bit=true"], "lora.quantization", "exclude each other"),
        (
            ["lora=qlora", "lora.quantization.bnb_4bit_quant_type=nf5"],
            "lora.quantization.bnb_4bit_quant_type",
            "nf4, fp4",
        ),
        (
            ["lora=qlora", "hardware=gpu", "hardware.bf16=false", "hardware.fp16=true"],
            "hardware.fp16",
            "compute in bfloat16",
        ),
        (["lora.target_modules=[lm_head]"], "lora.target_modules", "would never train an adapter on lm_head"),
        (
            ["train.eval_strategy=epoch", "train.eval_steps=5"],
            "train.eval_steps",
            "has no effect with eval_strategy epoch",
        ),
        (["train.eval_strategy=no", "train.eval_on_start=true"], "train.eval_on_start", "needs evaluations"),
        (
            [
                "train.load_best_model_at_end=true",
                "train.eval_strategy=steps",
                "train.eval_steps=30",
                "train.save_steps=50",
            ],
            "train.save_steps",
            "wants a multiple of eval_steps (30) with load_best_model_at_end, got 50; for example train.save_steps=60",
        ),
        (
            ["data.eval_split=null", "data.eval_fraction=0", "train.eval_steps=9"],
            "train.eval_steps",
            "needs eval data; write data.eval_split=",
        ),
        (["data.streaming=true", "train.max_steps=9"], "data.streaming", "write loss.precompute_ref_log_probs=false"),
        (["data.streaming=true", "loss=simpo"], "data.streaming", "write train.max_steps=1000"),
        (["data.sft_fraction=0.1", "loss=dpo_sft"], "data.sft_fraction", "needs demonstrations; write data.sft_path="),
        (["data.sft_fraction=0.1", "data.sft_path=org/name"], "data.sft_fraction", "needs an SFT term in the loss"),
        (["data.sft_path=org/name", "loss=dpo_sft"], "data.sft_path", "is not read with data.sft_fraction=0"),
        (["data.eval_fraction=1.0"], "data.eval_fraction", "at least 0 and below 1, got 1"),
        (["data.max_rows=0"], "data.max_rows", "at least 1"),
        (["data.max_rows=many"], "data.max_rows", "wants a whole number, got 'many'"),
        (["data.pairs_rule=best"], "data.pairs_rule", "no such value 'best'; did you mean best_rest?"),
        (["train.load_best_model_at_end=true"], "train.load_best_model_at_end", "write train.save_strategy=epoch"),
        (["train.train_sampling_strategy=group_by_length"], "train.train_sampling_strategy", "fails on pairs"),
        (["loss=kto", "train.train_sampling_strategy=random"], "train.train_sampling_strategy", "needs sequential"),
        (
            ["loss=kto", "hardware.per_device_train_batch_size=1"],
            "hardware.per_device_train_batch_size",
            "a mean over the batch",
        ),
        (["train.dataloader_prefetch_factor=2"], "train.dataloader_prefetch_factor", "needs loader processes"),
    ],
)
def test_what_cannot_work_is_refused(told, overrides, key, phrase):
    found = told(*overrides)
    assert phrase in found.pop(key)
    assert set(found) <= {"hardware.use_cpu"}  # a choice of GPU on a machine without one


def test_a_rule_keeps_quiet_where_its_value_is_wrong_by_itself(told):
    assert list(told("train.eval_strategy=stepz", "train.eval_steps=10")) == ["train.eval_strategy"]


def test_all_rules_speak_at_once(told):
    found = told("loss=robust", "loss.label_smoothing=0.6", "loss.beta=-1", "lora.r=0", "train.max_length=-5")
    assert set(found) == {"train.max_length", "loss.beta", "lora.r", "loss.label_smoothing"}


def test_group_by_length_is_fine_for_sft(told):
    assert told("train.train_sampling_strategy=group_by_length", recipe="sft") == {}


def test_the_arguments_of_a_trainer_stand_in_one_group_each():
    for loss in choices("loss"):
        cfg = composed(f"loss={loss}")
        groups = [set(cfg.train), set(cfg.hardware), set(cfg.loss)]
        assert sum(map(len, groups)) == len(set.union(*groups)), loss


def test_a_group_that_gives_what_another_gives_is_an_error_that_names_both():
    cfg = composed("++loss.learning_rate=1e-6")
    assert [(p.key, p.text) for p in check.check(cfg)] == [
        ("loss.learning_rate", "stands in train.learning_rate too; keep one of them")
    ]


def test_a_machine_without_gpu_refuses_the_gpu_choices(told):
    from preftune.config import hardware

    expected = {} if hardware.accelerator() else {"hardware.use_cpu"}
    assert set(told("hardware=gpu")) == set(expected)
    assert told("hardware=gpu", "--cfg", "job") == {}


def test_require_raises_the_whole_table():
    with pytest.raises(ConfigError, match="2 problems in the configuration"):
        check.require(composed("loss.beta=-1", "train.learning_rate=-1"))


def test_every_own_key_without_a_telling_default_says_what_it_wants():
    telling = (bool, int, float, str, list, dict)
    for path, default in schema.base().items():
        if path.split(".")[0] not in (*RESERVED, "hydra"):
            assert path in KINDS or (isinstance(default, telling) and default != "???"), path
    assert set(KINDS) | set(RANGES) <= set(schema.base())


def test_data_from_several_sources_is_looked_for_one_by_one(told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    assert told("data.path=[a.jsonl,org/name]") == {}
    assert told("data.path=*.jsonl", "data.columns={prompt: question}") == {}
    found = told("data.path=[{path: a.jsonl, weight: 0.7}, {path: b.jsonl, weight: 0.3}]")
    assert found == {"data.path": f"there is no b.jsonl in {tmp_path}; did you mean a.jsonl?"}


def test_files_that_are_not_there_are_named(told, tmp_path):
    (tmp_path / "prefs.jsonl").write_text("")
    found = told(f"data.path={tmp_path}/pref.jsonl")
    assert found == {"data.path": f"there is no pref.jsonl in {tmp_path}; did you mean {tmp_path}/prefs.jsonl?"}
    assert told("model=path", "model.path=./gone")["model.path"].startswith("there is no gone in ")


@pytest.mark.parametrize(
    ("recipe", "key", "adapter"),
    [
        ("dpo", "train", 2e-5),
        ("sft", "train", 2e-4),
        ("sft_dpo", "sft.train", 2e-4),
        ("sft_dpo pipeline=orpo", "train", 8e-5),
        ("orpo", "train", 8e-5),
        ("dpo loss=orpo", "train", 8e-5),
        ("dpo loss=cpo", "train", 1e-4),
        ("dpo loss=alphapo", "train", 1e-5),
        ("reward", "train", 1e-4),
        ("plan", "sft.train", 2e-4),
    ],
)
def test_a_loss_brings_its_rate_and_every_weight_learns_at_a_tenth_of_it(recipe, key, adapter):
    recipe, *more = recipe.split()

    def rate(*overrides):
        return OmegaConf.select(composed(*more, *overrides, recipe=recipe), f"{key}.learning_rate")

    assert rate("lora=lora") == pytest.approx(adapter)
    assert rate("lora=none") == pytest.approx(adapter / 10)
    assert rate("lora=none", f"{key}.learning_rate=3e-6") == 3e-6
