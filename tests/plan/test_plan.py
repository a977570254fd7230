"""A plan is made from shapes alone, says what the model's own weights say, and refuses what cannot fit."""

import json
import re

import pytest
from omegaconf import OmegaConf

from preftune.data.load import load
from preftune.models.embedded import folder
from preftune.plan import plan, text
from preftune.plan.command import report
from preftune.plan.measure import Setting, footprint
from preftune.plan.model import PlanError, from_keywords, sizes
from preftune.plan.plan import changed, choice, device_memory, require_fits

# Parameters as their cards and papers state them
PUBLISHED = {
    "gemma2_9b": 9.24e9,
    "gpt2": 124.4e6,
    "llama2_13b": 13.02e9,
    "llama3_70b": 70.55e9,
    "llama3_8b": 8.03e9,
    "mistral7b": 7.25e9,
    "mistral7b_base": 7.24e9,
    "pythia28": 2.78e9,
    "qwen3_8b": 8.19e9,
    "smollm3_sft": 3.08e9,
    "zephyr_gemma_sft": 8.54e9,
    "zephyr_sft": 7.24e9,
}
GPU = ["hardware=gpu24gb", "model=mistral7b"]


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_named_model_has_the_parameters_that_its_card_states(model):
    config = from_keywords(choice("model", model).architecture)
    assert sizes(config, None).parameters == pytest.approx(PUBLISHED[model], rel=0.005)


@pytest.mark.parametrize("lora", ["lora", "qlora", "dora"])
def test_adapter_parameters_are_those_that_peft_trains(composed, lora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    cfg = composed("dpo", f"lora={lora}")
    keywords = OmegaConf.to_container(cfg.lora)
    keywords.pop("quantization", None)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder("embedded://tiny")), LoraConfig(**keywords))
    planned = plan.plan(cfg)
    assert planned.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm"])
def test_modules_that_an_adapter_saves_whole_are_planned(composed, name):
    plain = plan.plan(composed("dpo", "lora=lora"))
    saving = plan.plan(composed("dpo", "lora=lora", f"+lora.modules_to_save=[{name}]"))
    assert saving.trained > plain.trained


def test_a_plan_from_loaded_rows_counts_them_and_their_steps(composed):
    from preftune.models.load import load_tokenizer

    cfg = composed("dpo", "train.max_steps=-1", "train.num_train_epochs=2")
    tokenizer = load_tokenizer(cfg.model)
    data = load(cfg.data, view="paired", tokenizer=tokenizer, max_length=1024, seed=42)
    planned = plan.plan(cfg, data, tokenizer)
    assert (planned.rows, planned.steps, planned.lengths) == (18, 10, "counted")
    assert planned.tokens > 0 and 0 <= planned.padding < 1
    lines = text.lines(planned)
    assert len(lines) == 3 and all(line.startswith("plan: ") for line in lines)


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo", "simpo", "sft"])
def test_every_kind_of_loss_is_planned(composed, loss):
    told = json.loads(report(composed("plan", f"loss={loss}", "format=json")))
    assert {"parameters", "memory_gb", "fits", "suggestions", "steps", "tokens", "seconds"} <= told.keys()
    parts = dict(told["memory_gb"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()), abs=0.01)
    assert (told["reference"]["kind"] == "cached") == (loss in ("dpo", "kto"))


def test_both_stages_of_a_pipeline_are_planned(composed):
    told = json.loads(report(composed("plan", "stages=sft_dpo", "format=json")))
    assert told["stages"].keys() == {"sft", "preference"}
    assert told["steps"] == sum(stage["steps"] for stage in told["stages"].values())


def test_qlora_fits_a_7b_model_on_24_gb_and_full_fine_tuning_does_not(composed):
    data = ["data=ultrafeedback", "train.max_steps=-1"]
    thin = plan.plan(composed("dpo", *GPU, "lora=qlora", *data))
    assert thin.fits and 3.5 < thin.memory_gb["weights"] < 4.5
    full = composed("dpo", *GPU, "lora=none", "fit_check=true", *data)
    refused = plan.plan(full)
    assert refused.fits is False and any("lora=qlora" in each for each in refused.suggestions)
    with pytest.raises(PlanError, match=r"fit with .*lora=.*fit_check=false"):
        require_fits(refused, full)
    full.fit_check = False
    require_fits(refused, full)


@pytest.mark.slow
def test_what_a_suggestion_says_fits(composed):
    cfg = composed(
        "dpo", "hardware=gpu24gb", "model=llama3_8b", "lora=lora", "data=ultrafeedback", "hardware.memory_gb=16"
    )
    planned = plan.plan(cfg)
    assert planned.fits is False and planned.suggestions
    for line in planned.suggestions:
        assert plan.plan(changed(cfg, line.split())).fits


@pytest.mark.slow
def test_checkpointing_packing_and_smaller_batches_save_memory(composed):
    base = ["hardware=gpu", "model=mistral7b", "lora=lora", "data=ultrafeedback", "hardware.memory_gb=80"]
    total = plan.plan(composed("dpo", *base)).memory_gb["total"]
    for change in (
        "hardware.gradient_checkpointing=selective",
        "hardware.gradient_checkpointing=true",
        "hardware.per_device_train_batch_size=1",
        "train.max_length=512",
    ):
        assert plan.plan(composed("dpo", *base, change)).memory_gb["total"] < total
    assert plan.plan(composed("dpo", *base, "fastpath.enabled=false")).memory_gb["total"] > total


def test_a_copy_of_the_reference_weighs_as_much_as_the_model(composed):
    online = plan.plan(composed("dpo", "lora=none", "loss.precompute_ref_log_probs=false"))
    assert online.reference["kind"] == "copy" and online.memory_gb["reference"] == online.memory_gb["weights"]


@pytest.mark.slow
def test_sharding_divides_what_it_shares(composed):
    cfg = composed("dpo", "hardware=gpu80gb", "model=mistral7b", "lora=none", "data=ultrafeedback")
    plans = [plan.plan(cfg, world_size=8, sharding=each).memory_gb for each in ("none", "zero2", "zero3")]
    for part in ("weights", "gradients", "optimizer"):
        held = [each[part] for each in plans]
        assert held[2] < held[0] and held[2] <= held[1]
    assert plans[1]["weights"] == plans[0]["weights"]


@pytest.mark.parametrize(
    ("engine", "sharding"),
    [("ddp", "none"), ("fsdp", "fsdp"), ("zero2_offload", "zero2_offload"), ("zero3", "zero3")],
)
def test_recipes_plan_says_what_training_says_of_its_processes(composed, monkeypatch, engine, sharding):
    from preftune.models.load import load_tokenizer
    from preftune.runs.training import announce

    asked = [f"hardware={engine}", "hardware.use_cpu=false", "hardware.memory_gb=80", "nproc=4", "hardware.nodes=2"]
    told = json.loads(report(composed("plan", *asked, "format=json")))
    assert (told["world_size"], told["sharding"], told["limit_gb"]) == (8, sharding, 80)
    cfg = composed("dpo", *asked, "fit_check=true")
    tokenizer = load_tokenizer(cfg.model)
    data = load(cfg.data, view="paired", tokenizer=tokenizer, max_length=1024, seed=42)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert announce(cfg, data, tokenizer) == told


def test_an_engine_is_planned_for_a_machine_that_is_not_this_one(composed):
    asked = ["hardware=zero3", "machine=gpu80gb", "model=mistral7b", "lora=none", "format=json"]
    told = json.loads(report(composed("plan", *asked, "nproc=8")))
    assert (told["world_size"], told["limit_gb"], told["tflops"]) == (8, 80, 150)
    with pytest.raises(PlanError, match="nproc=8"):
        report(composed("plan", *asked))
    with pytest.raises(PlanError, match="machine=gpu80gb"):
        report(composed("plan", "hardware=fsdp", "hardware.use_cpu=true", "nproc=2"))


def test_processes_on_one_processor_share_its_memory(composed):
    cfg = composed("dpo", "hardware.memory_gb=null")
    assert device_memory(cfg, 4) == pytest.approx(device_memory(cfg) / 4, rel=0.2)


def test_layers_watched_on_fake_tensors_keep_what_real_ones_keep():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder("embedded://tiny"))
    feet = footprint(config, Setting(2, 96, "float32", None, "sdpa", None, False))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []
    mask = torch.ones(2, 1, 96, 96, dtype=torch.bool)  # which transformers makes on fake tensors, too

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(torch.zeros(2, 96, dtype=torch.long), attention_mask=mask, use_cache=False)
    assert hidden is not None
    assert feet.kept == pytest.approx(sum(kept.values()), rel=0.12)


@pytest.mark.parametrize("bf16", [True, False])
def test_experts_in_float32_are_planned_with_and_without_autocast(composed, bf16):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 16, "vocab_size": 512}
    counts = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    cfg = composed("dpo", "model.path=nobody/nothing", f"hardware.bf16={bf16}")
    cfg.model.architecture = OmegaConf.create({"model_type": "qwen3_moe", **sizes, **counts, "num_experts_per_tok": 2})
    made = plan.plan(cfg)
    assert made.memory_gb["activations"] > 0


def test_a_model_whose_architecture_is_nowhere_is_one_clear_error(composed):
    with pytest.raises(PlanError, match=r"no config.json to plan from.*model.architecture"):
        plan.plan(composed("dpo", "model.path=nobody/nothing"))


@pytest.mark.slow
def test_a_preset_for_long_rows_says_how_long_one_may_be(composed):
    given = ("hardware=long", "hardware.memory_gb=3", "lora=lora")
    cfg = composed("plan", *given)
    longest = int(re.search(r"longest row that fits: about ([\d,]+) tokens", report(cfg)).group(1).replace(",", ""))
    kept = composed(
        "plan", "hardware=long", "hardware.memory_gb=3", "lora=lora", "hardware.activation_offloading=false"
    )
    assert longest >= 1024 and "longest row" not in report(kept)


def test_an_adapter_with_a_rank_of_its_own_for_some_layers_is_planned(composed):
    more = plan.plan(composed("dpo", "lora=lora", "+lora.rank_pattern={q_proj: 64}"))
    assert more.trained > plan.plan(composed("dpo", "lora=lora")).trained
