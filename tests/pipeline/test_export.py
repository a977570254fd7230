import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
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
    assert "in float32" in said and "6 of 6 greedy answers are the same" in said
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
        "greedy answers are the same, log-probs differ by",
        "the re-loaded model beside the trained one",
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


def test_an_adapter_is_exported_over_a_base_that_exists(trained, tmp_path):
    run, target = trained("dpo"), tmp_path / "model"
    said = export.export(str(run), str(target), None, "trained", ["adapter"])
    assert "the saved adapter's model beside the trained one: 6 of 6" in said
    assert {path.name for path in target.iterdir()} == {"README.md", "adapter"}
    names = {path.name for path in (target / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    settings = json.loads((target / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32)
    served = PeftModel.from_pretrained(base, target / "adapter")
    torch.testing.assert_close(logits(served), logits(weights(find(str(run)))))
    assert "the saved adapter's model" in (target / "README.md").read_text()


def test_what_has_no_adapter_or_is_no_form_is_refused_before_a_model_is_loaded(trained, tmp_path):
    with pytest.raises(ExportError, match=r"all its weights were trained: to=\[merged\]"):
        export.export(str(trained("dpo", "lora=none")), str(tmp_path / "new"), None, "trained", ["adapter"])
    with pytest.raises(ExportError, match="a list of some of merged, adapter, ollama"):
        export.export(str(trained("dpo")), str(tmp_path / "new"), None, "trained", ["gguf"])


def test_a_modelfile_names_the_weights_and_where_an_answer_ends(trained, tmp_path):
    said = export.export(str(trained("dpo")), str(tmp_path / "model"), None, "trained", "ollama")
    lines = (tmp_path / "model" / "Modelfile").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert "FROM ." in lines and f'PARAMETER stop "{tokenizer.eos_token}"' in lines
    assert all(line.startswith(("#", "FROM ", "PARAMETER ")) for line in lines)
    assert "convert_hf_to_gguf.py" in said and (tmp_path / "model" / "model.safetensors").exists()


def test_an_export_that_answers_otherwise_is_an_error_and_leaves_nothing(trained, tmp_path, monkeypatch):
    real = export.adapters.with_adapter

    def spoiled(base, path):
        model = real(base, path)
        model.get_input_embeddings().weight.data[:200] *= 1.5
        return model

    monkeypatch.setattr(export.adapters, "with_adapter", spoiled)
    with pytest.raises(
        ExportError, match="the merged model beside the trained one.*and rounding stays below 0.01 at any token"
    ):
        export.export(str(trained("dpo")), str(tmp_path / "model"), None, "trained")
    assert not list(tmp_path.iterdir())


def test_without_its_data_a_run_is_asked_a_prompt_of_our_own(trained, tmp_path, capsys):
    run = shutil.copytree(trained("dpo"), tmp_path / "moved")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("pairs.jsonl", "gone.jsonl"))
    assert "1 of 1 greedy answers" in export.export(str(run), str(tmp_path / "model"), None, "trained")
    assert "held-out prompts: not available" in capsys.readouterr().out
