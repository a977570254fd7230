"""An adapter as model.path: merged into its base, or trained further; what its results stand on is always known."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from preftune.evaluate.subjects import find, load, weights
from preftune.models import adapters, embedded
from preftune.models.load import ModelError, load_model
from preftune.pipeline.export import export
from preftune.runs.training import train

IDS = torch.arange(3, 40)[None]
KINDS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "a head saved whole": {"modules_to_save": ["lm_head"]},
    "more tokens": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def tiny() -> Path:
    return embedded.folder("embedded://tiny")


def adapter_over(base: str, folder: Path, tokens: int | None = None, **settings) -> Path:
    """An adapter with random weights, saved in a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        model.resize_token_embeddings(tokens)
    given = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**given | settings)).save_pretrained(folder, save_embedding_layers=False)
    return folder


def section(path: str | Path, **more: object):
    return OmegaConf.merge(find("embedded://tiny").start, {"path": str(path)}, more)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_says_what_it_said_on_its_base(kind, tiny, tmp_path):
    tokens = 300 if kind == "more tokens" else None
    folder = adapter_over(tiny, tmp_path / "adapter", tokens, **KINDS[kind])
    base = AutoModelForCausalLM.from_pretrained(tiny)
    if tokens:
        base.resize_token_embeddings(tokens)
    expected = logits(PeftModel.from_pretrained(base, folder))
    merged = load_model(section(folder), OmegaConf.create({}), use_cpu=True)
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert merged.name_or_path == str(folder)


def test_an_adapter_over_an_adapter_is_merged_into_both(tiny, tmp_path):
    first = adapter_over(tiny, tmp_path / "first")
    model = load_model(section(first), OmegaConf.create({}), use_cpu=True)
    above = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    above.save_pretrained(tmp_path / "second")
    assert adapters.base_of(tmp_path / "second") == (str(first), None)
    assert adapters.whole(str(tmp_path / "second")) == (str(tiny), None)
    merged = load_model(section(tmp_path / "second"), OmegaConf.create({}), use_cpu=True)
    assert torch.allclose(logits(merged), logits(above), atol=1e-5)


@pytest.fixture(scope="module")
def sft(composed_in, tmp_path_factory):
    """A finished SFT run with an adapter."""
    cfg = composed_in(tmp_path_factory.mktemp("sft"), "sft", "lora.r=3", "train.learning_rate=1e-2")
    return Path(cfg.output_dir), train(cfg)


@pytest.fixture(scope="module")
def composed_in(pairs_file, small):
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    def make(folder, recipe, *overrides):
        GlobalHydra.instance().clear()
        given = [*small, "data=file", f"data.path={pairs_file}", "data.eval_fraction=0.25", f"output_dir={folder}/run"]
        with initialize_config_module("preftune.conf", version_base="1.3"):
            return compose(recipe, [*given, *overrides])

    return make


@pytest.mark.parametrize("how", ["merge", "continue"])
def test_a_preference_run_starts_where_the_adapter_ended(how, sft, composed_in, tmp_path, capsys):
    run, before = sft
    cfg = composed_in(tmp_path, "dpo", "model=path", f"model.path={run}/model", f"model.adapter={how}", "lora.r=5")
    summary = train(cfg)
    told = capsys.readouterr().out
    assert ("merged into its base" in told) == (how == "merge") and ("goes on with" in told) == (how == "continue")
    assert summary["snapshots"][0]["perplexity"] == pytest.approx(before["snapshots"][-1]["perplexity"], rel=1e-4)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # policy and reference start alike
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["adapter"] == how and manifest["model"]["base"]
    assert manifest["reference"].startswith("the model before its first step")
    saved = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert saved["r"] == (5 if how == "merge" else 3)
    assert not (tmp_path / "run" / "model" / "ref").exists()
    loaded = load(find(str(tmp_path / "run")))
    with loaded.reference() as reference:
        assert torch.allclose(logits(reference), logits(weights(find(str(run)))), atol=1e-4)
    export(str(tmp_path / "run"), str(tmp_path / "exported"), None, "trained")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.allclose(logits(served), logits(loaded.model), atol=1e-4)
    assert "started from: the adapter" in (tmp_path / "exported" / "README.md").read_text()


def test_continuing_loses_what_plain_trl_loses(sft, composed_in, pairs_file, tmp_path):
    run, _ = sft
    given = ("model=path", f"model.path={run}/model", "model.adapter=continue", "data.eval_fraction=0")
    cfg = composed_in(tmp_path, "dpo", *given, "hardware.per_device_train_batch_size=24", "train.warmup_steps=0")
    train(cfg)
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    turns = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in rows
    ]
    arguments = {name: cfg.train[name] for name in ("learning_rate", "max_length", "lr_scheduler_type", "warmup_steps")}
    model = AutoModelForCausalLM.from_pretrained(adapters.whole(f"{run}/model")[0])
    trainer = DPOTrainer(
        PeftModel.from_pretrained(model, run / "model", is_trainable=True),
        args=DPOConfig(
            str(tmp_path / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=24, max_steps=2,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, beta=cfg.loss.beta,
            optim="adamw_torch",
            gradient_checkpointing=False, weight_decay=cfg.train.get("weight_decay", 0.0), **arguments,
        ),
        processing_class=AutoTokenizer.from_pretrained(run / "model"),
        train_dataset=Dataset.from_list(turns),
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [row["loss"] for row in ours if "loss" in row] == pytest.approx(theirs, abs=1e-5)


def test_a_base_that_is_gone_is_named_with_its_adapter(tiny, tmp_path):
    folder = adapter_over(tiny, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(
        ModelError, match=r"adapter is an adapter over /nowhere/base, which cannot be loaded.*Write where"
    ):
        load_model(section(folder), OmegaConf.create({}), use_cpu=True)


def test_quantized_weights_take_continue(sft, composed_in, tmp_path):
    pytest.importorskip("bitsandbytes")
    run, _ = sft
    given = ("model=path", f"model.path={run}/model", "lora=qlora")
    with pytest.raises(ModelError, match="model.adapter=continue trains on the adapter itself, over quantized weights"):
        train(composed_in(tmp_path / "merge", "dpo", *given))
    train(composed_in(tmp_path / "continue", "dpo", *given, "model.adapter=continue"))
    assert find(str(tmp_path / "continue" / "run")).lora.quantization.load_in_4bit
