import shutil

import pytest
import torch
from peft import PeftModel

from preftune.evaluate import subjects
from preftune.evaluate.subjects import SubjectError, find, moved_with

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 33, 34]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_run_its_model_and_its_checkpoint_are_found(trained):
    run = trained("dpo")
    for name, weights in ((run, "model"), (run / "model", "model"), (run / "checkpoint-3", "checkpoint-3")):
        found = find(str(name))
        assert (found.run, found.weights, found.adapter) == (run, str(run / weights), True)
        assert found.beta == 0.1 and not found.bf16


def test_the_reference_of_an_adapter_is_its_base(trained):
    loaded = subjects.load(find(str(trained("dpo"))))
    base = subjects.weights(find("embedded://tiny"))
    assert loaded.other is None and isinstance(loaded.model, PeftModel)
    with loaded.reference() as reference:
        torch.testing.assert_close(logits(reference), logits(base))
    assert (logits(loaded.model) - logits(base)).abs().max() > 1e-3


def test_a_pipeline_is_its_last_stage_measured_against_the_sft_result(trained):
    run = trained("sft_dpo")
    loaded = subjects.load(found := find(str(run)))
    assert found.run == run / "preference"
    sft = subjects.weights(find(str(run / "sft")))
    with loaded.reference() as reference:
        torch.testing.assert_close(logits(reference), logits(sft), rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_was_moved_finds_its_sft_result(trained, tmp_path):
    copied = tmp_path / "elsewhere"
    shutil.copytree(trained("sft_dpo"), copied)
    (tmp_path / "gone").mkdir()
    found = find(str(copied))
    assert moved_with(copied / "preference", "/no/such/sft-model") == str(copied / "sft-model")
    assert found.run == copied / "preference"


def test_the_reference_of_a_fully_trained_run_is_what_it_started_from(trained):
    loaded = subjects.load(find(str(trained("dpo", "lora=none"))))
    base = subjects.weights(find("embedded://tiny"))
    with loaded.reference() as reference:
        torch.testing.assert_close(logits(reference), logits(base))
    assert (logits(loaded.model) - logits(base)).abs().max() > 1e-3


def test_a_whole_model_needs_a_reference(trained):
    with pytest.raises(SubjectError, match="name that, reference=PATH"):
        subjects.load(find("embedded://tiny"))
    loaded = subjects.load(find("embedded://tiny"), str(trained("dpo")))
    assert isinstance(loaded.other, PeftModel)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(SubjectError, match=f"there is no {tmp_path.name}/typo"):
        find(f"{tmp_path.name}/typo")
    assert find("somebody/model").weights == "somebody/model"
    with pytest.raises(SubjectError, match="there is no ./nowhere"):
        find("./nowhere")
    with pytest.raises(SubjectError, match="holds neither a run"):
        find(str(tmp_path))
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(SubjectError, match="has no model yet"):
        find(str(tmp_path))
