import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.evaluate.subjects import SubjectError, find, weights
from preftune.pipeline import export
from preftune.pipeline.export import ExportError
from preftune.report.model_card import redacted

IDS = torch.tensor([list(range(60, 100))])
# Computed in float32, so that the comparison is of weights and not of roundings within the forward
QLORA = ("lora=qlora", "lora.quantization.bnb_4bit_compute_dtype=float32")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_an_exported_adapter_is_one_model_that_says_the_same(trained, tmp_path):
    run, target = trained("dpo"), tmp_path / "deep" / "model"
    said = export.export(str(run), str(target), None, "trained")
    assert "in float32" in said and "differ by" in said
    torch.testing.assert_close(logits(whole(target)), logits(weights(find(str(run)))), rtol=1e-4, atol=1e-4)
    names = {path.name for path in target.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert target.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}


def test_qlora_is_merged_into_the_weights_that_it_was_trained_over(trained, tmp_path):
    run = trained("dpo", *QLORA)
    adapter = logits(weights(find(str(run))))
    for base in ("trained", "original"):
        export.export(str(run), str(tmp_path / base), None, base)
    trained_over, original = whole(tmp_path / "trained"), whole(tmp_path / "original")
    assert "quantization_config" not in json.loads((tmp_path / "trained" / "config.json").read_text())
    torch.testing.assert_close(logits(trained_over), adapter, rtol=1e-4, atol=1e-4)
    assert (logits(original) - adapter).abs().max() > 20 * (logits(trained_over) - adapter).abs().max()
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "quantized weights that it was trained over, dequantized" in card and "4-bit weights" in card


def test_the_card_tells_data_loss_results_lineage_and_versions(trained, tmp_path, pairs_file):
    run = trained("sft_dpo")
    export.export(str(run), str(tmp_path / "model"), "bfloat16", "trained")
    card = (tmp_path / "model" / "README.md").read_text()
    manifest = json.loads((run / "preference" / "manifest.json").read_text())
    last = json.loads((run / "preference" / "summary.json").read_text())["snapshots"][-1]
    assert card.startswith("---\n") and "license" not in card.split("---")[1]
    for told in (
        "trl.DPOTrainer",
        "β: 0.1",
        f"path: {pairs_file}",
        manifest["data"]["fingerprint"],
        f"{last['reward_accuracy']:.1%}",
        f"weights {manifest['model']['weights']}",
        manifest["reference"],
        f"trl: {manifest['versions']['trl']}",
        "LoRA, r=16, alpha=32",
        "Log-probs of a short dialogue differ",
    ):
        assert told in card, told
    assert card.index("`embedded://tiny`") < card.index("sft-model`")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert saved.dtype == torch.bfloat16


def test_a_fully_trained_run_is_copied(trained, tmp_path):
    run = trained("dpo", "lora=none")
    export.export(str(run), str(tmp_path / "model"), None, "trained")
    torch.testing.assert_close(logits(whole(tmp_path / "model")), logits(whole(run / "model")))
    assert "all weights were trained" in (tmp_path / "model" / "README.md").read_text()


def test_nothing_is_overwritten_and_nothing_is_left_behind(trained, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match="nothing is overwritten"):
        export.export(str(trained("dpo")), str(tmp_path / "there"), None, "trained")
    with pytest.raises(SubjectError, match="there is no"):
        export.export("./nowhere", str(tmp_path / "new"), None, "trained")
    with pytest.raises(ExportError, match="one of trained, original"):
        export.export(str(trained("dpo")), str(tmp_path / "new"), None, "other")
    monkeypatch.setattr(Path, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(str(trained("dpo")), str(tmp_path / "new"), None, "trained")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_card_holds_no_passwords_or_tokens():
    told = "path: https://me:secret@host/prefs.jsonl?token=abcdef, hf_abcdefghij, sk-abcdefghijk, trl: 1.16.0"
    assert redacted(told) == "path: https://host/prefs.jsonl ***, ***, trl: 1.16.0"
