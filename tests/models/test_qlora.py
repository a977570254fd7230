"""QLoRA end to end, on the tiny model in 4 bits: every recipe trains, its reference the base with adapters off."""

import json
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from preftune.pipeline.run import run_stages
from preftune.runs.training import train

QLORA = ["lora=qlora", "train.eval_strategy=no", "lora.quantization.bnb_4bit_compute_dtype=float32"]


@pytest.mark.parametrize(("recipe", "first"), [("dpo", math.log(2)), ("kto", 0.5), ("orpo", None), ("sft", None)])
def test_every_recipe_trains_over_four_bit_weights(composed, recipe, first):
    cfg = composed(recipe, *QLORA)
    train(cfg)
    run = Path(cfg.output_dir)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first is None or rows[0]["loss"] == pytest.approx(first, abs=1e-4)
    assert (run / "model" / "adapter_model.safetensors").exists()
    assert [row["code"] for row in json.loads((run / "findings.json").read_text())] in ([], ["perplexity"])


def test_a_pipeline_in_four_bits_measures_against_its_sft_result(composed):
    cfg = composed("sft_dpo", *QLORA, "pipeline.evaluate.kl_prompts=0", "pipeline.evaluate.generations=0")
    summary = run_stages(cfg)
    run = Path(cfg.output_dir)
    first = json.loads((run / "preference" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    _, after_sft, _ = summary["snapshots"]
    sft = json.loads((run / "sft" / "summary.json").read_text())["snapshots"][-1]
    # merged over the dequantized weights and quantized again, the model is the SFT result to the rounding of 4 bits
    assert after_sft["perplexity"] == pytest.approx(sft["perplexity"], rel=0.02)


@pytest.mark.parametrize("recipe", ["dpo", "kto", "orpo", "sft_dpo"])
def test_the_command_for_a_7b_model_on_24_gb_composes_as_qlora(recipe):
    GlobalHydra.instance().clear()
    with initialize_config_module("preftune.conf", version_base="1.3"):
        cfg = compose(recipe, ["lora=qlora", "hardware=gpu24gb", "model=mistral7b", "output_dir=x"])
    assert cfg.lora.quantization.bnb_4bit_quant_type == "nf4" and cfg.lora.quantization.bnb_4bit_use_double_quant
    assert cfg.hardware.optim == "paged_adamw_8bit" and cfg.hardware.bf16 and cfg.hardware.gradient_checkpointing
    assert cfg.model.path == "mistralai/Mistral-7B-Instruct-v0.3" and cfg.fastpath.enabled
