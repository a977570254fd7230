"""SFT, then DPO: the second stage starts from the first one's result, and is measured against it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import open_dict
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from preftune.pipeline.run import run_stages

STAGES = [
    *("sft.train.learning_rate=0.02", "train.learning_rate=0.01"),
    *("pipeline.evaluate.generations=1", "pipeline.evaluate.max_new_tokens=8", "pipeline.evaluate.kl_prompts=4"),
]
IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 33, 34]])


ALL = "pipeline.stages=[sft,preference,evaluate,export]"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Where the pipeline of these tests runs, and a copy of its first run with its summary; filled by `finished`."""
    folder = tmp_path_factory.mktemp("pipeline")
    return folder / "run", folder / "copy", {}


@pytest.fixture
def finished(composed, pristine):
    """(config, summary) of a finished pipeline: run once, and put back to what it was then for every test."""
    run, copy, summary = pristine
    cfg = composed("sft_dpo", *STAGES, ALL, f"output_dir={run}")
    if not summary:
        summary |= run_stages(cfg)
        shutil.copytree(run, copy)
    shutil.rmtree(run)
    shutil.copytree(copy, run)
    return cfg, summary


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
    start, after_sft, after_dpo = summary["snapshots"]
    assert summary["logp_accuracy_before"] == start["logp_accuracy"]
    assert summary["perplexity"] == after_sft["perplexity"] < start["perplexity"]
    assert summary["accuracy_after"] == after_dpo["reward_accuracy"]
    assert summary["margin_before"] == 0
    assert {"prompt", "before", "after"} == summary["samples"][0].keys()
    assert summary["seconds"] > 0
    assert len(summary["stages"]["sft"]["snapshots"]) == 1  # the next stage's start is its end
    assert "The next stage measured the result" in (Path(cfg.output_dir) / "sft" / "report.html").read_text()


def again(composed, finished, *overrides):
    where = f"output_dir={finished[0].output_dir}"
    return run_stages(composed("sft_dpo", *STAGES, ALL, where, "resume=true", *overrides))


def test_what_is_finished_and_unchanged_is_kept(composed, finished, capsys):
    said = ["train.logging_steps=2", "health.action=stop"]  # and not what is learnt
    summary = again(composed, finished, *said)
    assert capsys.readouterr().out.count("finished before of the same inputs, kept") == 5  # with the merged model
    assert {**summary, "seconds": 0} == {**finished[1], "seconds": 0}


def test_only_what_a_change_concerns_is_redone_and_the_reason_is_said(composed, finished, capsys):
    again(composed, finished, "loss.beta=0.3")
    told = capsys.readouterr().out
    assert "sft: finished before" in told and "preference: rerun: loss.beta changed" in told
    assert "exported: rerun: model changed" in told
    run = Path(finished[0].output_dir)
    assert len(list(run.glob("preference-replaced-*"))) == 1 and not list(run.glob("sft-replaced-*"))


def test_changed_data_redoes_every_stage(composed, finished, pairs_file, tmp_path, capsys):
    lines = pairs_file.read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]))
    again(composed, finished, f"data.path={tmp_path / 'rows.jsonl'}")
    told = capsys.readouterr().out
    assert "sft: rerun: data.path, the content of" in told
    assert "sft-model: rerun: adapter changed" in told and "preference: rerun" in told


def test_a_damaged_result_is_redone(composed, finished, capsys):
    weights = Path(finished[0].output_dir) / "preference" / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    again(composed, finished)
    assert "preference: rerun: model: adapter_model.safetensors is damaged" in capsys.readouterr().out


def test_an_unfinished_stage_goes_on_alone(composed, finished, capsys):
    run = Path(finished[0].output_dir)
    record = json.loads((run / "preference" / "lineage.json").read_text())
    (run / "preference" / "lineage.json").write_text(json.dumps(record | {"finished": False}))
    (run / "preference" / "summary.json").unlink()
    assert again(composed, finished)["snapshots"] == finished[1]["snapshots"]
    told = capsys.readouterr().out
    assert "sft: finished before" in told and "resume: checkpoint-2" in told


def test_a_stage_that_has_become_the_last_is_looked_at_without_training_it_again(composed, finished, capsys):
    summary = again(composed, finished, "pipeline.stages=[sft]")
    told = capsys.readouterr().out
    assert "sft: no stage follows that measured its result" in told and "resume: checkpoint-2" in told
    names = [each["name"] for each in summary["snapshots"]]
    assert names == ["start", "after sft"] and "after" in summary["samples"][0]
    assert summary["snapshots"][1]["perplexity"] == pytest.approx(finished[1]["snapshots"][1]["perplexity"], rel=1e-4)


def test_one_that_is_the_last_now_and_of_other_inputs_is_trained_anew(composed, finished, capsys):
    again(composed, finished, "pipeline.stages=[sft]", "sft.train.learning_rate=0.01")
    assert "sft: rerun: train.learning_rate changed" in capsys.readouterr().out


def test_a_pipeline_starts_from_an_adapter(composed, finished, tmp_path):
    adapter = Path(finished[0].output_dir) / "sft" / "model"
    more = ["pipeline.stages=[preference]", "model=path", f"model.path={adapter}", f"output_dir={tmp_path / 'onward'}"]
    summary = run_stages(composed("sft_dpo", *STAGES, *more))
    sft = finished[1]["snapshots"][1]  # at its end
    assert summary["snapshots"][0]["perplexity"] == pytest.approx(sft["perplexity"], rel=1e-5)


def test_a_stage_of_ones_own_is_a_section_with_a_loss(composed, tmp_path):
    cfg = composed("sft_dpo", *STAGES, "pipeline.stages=[sft,hinge]")
    with open_dict(cfg):
        cfg.hinge = {"loss": composed("dpo", "loss=hinge").loss}
    assert run_stages(cfg)["loss"] == ["hinge"]


def test_an_unknown_stage_is_refused_with_what_there_is(composed):
    with pytest.raises(ValueError, match="no stage sfft; there are rounds, evaluate, export, .*preference, sft"):
        run_stages(composed("sft_dpo", "pipeline.stages=[sfft]"))


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["sft_ipo", "sft_kto", "sft_simpo", "orpo"])
def test_every_list_of_stages_runs(composed, choice):
    cfg = composed("sft_dpo", f"pipeline={choice}", *STAGES)
    run_stages(cfg)
    assert (Path(cfg.output_dir) / "evaluation" / "evaluation.json").exists()


def distinct_letters(prompt, answer):
    return len(set(answer))


@pytest.mark.slow
def test_rounds_of_sampling_scoring_and_training_run_and_are_kept(composed, capsys):
    rounds = ["pipeline=iterative_dpo", "pipeline.rounds.number=2", "pipeline.rounds.prompts=8"]
    more = ["pipeline.rounds.reference=fixed", "pipeline.rounds.max_new_tokens=12", "pipeline.rounds.length_ratio=9"]
    more.append(f"pipeline.rounds.rule={__name__}.distinct_letters")
    line = [*STAGES, *rounds, *more]
    with pytest.raises(ValueError, match="pipeline.rounds.rule"):
        run_stages(composed("sft_dpo", *line, "pipeline.rounds.rule=no.such.rule"))
    cfg = composed("sft_dpo", *line, "resume=true")
    run_stages(cfg)
    run = Path(cfg.output_dir)
    assert len(json.loads((run / "scores.json").read_text())) == 3
    pairs = [json.loads(each) for each in (run / "round-1-pairs" / "pairs.jsonl").read_text().splitlines()]
    assert {"prompt", "chosen", "rejected"} == pairs[0].keys()
    manifest = json.loads((run / "round-2" / "manifest.json").read_text())
    assert manifest["model"]["path"] == str(run / "round-1-model")
    assert manifest["reference"] == f"another model, {run / 'sft-model'}"
    capsys.readouterr()
    run_stages(composed("sft_dpo", *line, "resume=true"))
    told = capsys.readouterr().out
    assert "round-2-pairs: finished before of the same inputs, kept" in told and "redone" not in told


def test_after_full_fine_tuning_the_second_stage_starts_from_the_saved_model(composed):
    cfg = composed("sft_dpo", "lora=none", "train.max_steps=1")
    run_stages(cfg)
    run = Path(cfg.output_dir)
    assert not (run / "sft-model").exists()
    assert json.loads((run / "preference" / "manifest.json").read_text())["model"]["path"] == str(run / "sft" / "model")
