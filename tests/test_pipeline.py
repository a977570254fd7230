"""SFT, then DPO: the second stage starts from the first one's result, and is measured against it."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from preftune.pipeline import sft_then_preference
from preftune.training import train

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 33, 34]])


@pytest.fixture
def finished(composed):
    cfg = composed("sft_dpo", "sft.train.learning_rate=0.02", "train.learning_rate=0.01")
    return cfg, sft_then_preference(cfg)


def test_the_reference_is_the_sft_result(finished):
    run = Path(finished[0].output_dir)
    with torch.no_grad():
        sft = AutoPeftModelForCausalLM.from_pretrained(run / "sft" / "model", dtype=torch.float32)(IDS).logits
        start = AutoModelForCausalLM.from_pretrained(run / "sft-model", dtype=torch.float32)(IDS).logits
        base = AutoModelForCausalLM.from_pretrained(
            json.loads((run / "sft" / "model" / "adapter_config.json").read_text())["base_model_name_or_path"],
            dtype=torch.float32,
        )(IDS).logits
    torch.testing.assert_close(start, sft, rtol=1e-5, atol=1e-5)
    assert (start - base).abs().max() > 1e-3
    adapter = json.loads((run / "preference" / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(run / "sft-model")
    first = json.loads((run / "preference" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_summary_spans_both_stages(finished):
    cfg, summary = finished
    assert json.loads((Path(cfg.output_dir) / "summary.json").read_text()) == summary
    start, after_sft, after_dpo = summary["looks"]
    assert summary["logp_accuracy_before"] == start["logp_accuracy"]
    assert summary["perplexity"] == after_sft["perplexity"] < start["perplexity"]
    assert summary["accuracy_after"] == after_dpo["reward_accuracy"]
    assert summary["margin_before"] == 0
    assert {"prompt", "before", "after"} == summary["samples"][0].keys()
    assert summary["seconds"] > 0


def test_a_finished_stage_is_kept_on_resume(finished, capsys):
    cfg, summary = finished
    run = Path(cfg.output_dir)
    (run / "summary.json").unlink()
    (run / "preference" / "summary.json").unlink()
    cfg.resume = True
    again = sft_then_preference(cfg)
    assert "finished before, kept" in capsys.readouterr().out
    assert again["looks"][:2] == summary["looks"][:2]


def test_after_full_fine_tuning_the_second_stage_starts_from_the_saved_model(composed):
    cfg = composed("sft_dpo", "lora=none", "train.max_steps=1")
    sft_then_preference(cfg)
    run = Path(cfg.output_dir)
    assert not (run / "sft-model").exists()
    assert json.loads((run / "preference" / "manifest.json").read_text())["model"]["path"] == str(run / "sft" / "model")


def test_an_adapter_is_no_model_to_start_from(composed):
    cfg = composed("dpo")
    train(cfg)
    other = composed("dpo", "model=path", f"model.path={cfg.output_dir}/model", f"output_dir={cfg.output_dir}-2")
    with pytest.raises(ValueError, match="is an adapter, not a whole model. Merge it first"):
        train(other)
