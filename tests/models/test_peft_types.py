"""Every method of PEFT that has a file in conf/lora trains what plain TRL trains with it."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from preftune.config.check import ConfigError, require
from preftune.models import embedded
from preftune.models.load import peft_config
from preftune.runs.training import train


@pytest.mark.parametrize("lora", ["oft", "ia3", "vera", "loha", "rslora"])
def test_a_method_by_its_file_loses_what_plain_trl_loses(lora, composed, pairs_file, tmp_path):
    every = ("data.eval_fraction=0", "hardware.per_device_train_batch_size=24", "train.warmup_steps=0")
    cfg = composed("dpo", f"lora={lora}", *every)
    train(cfg)
    lines = [json.loads(line) for line in Path(cfg.output_dir, "metrics.jsonl").read_text().splitlines()]
    folder = embedded.folder("embedded://tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    turns = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in map(json.loads, Path(pairs_file).read_text().splitlines())
    ]
    same = {
        name: cfg.train[name] for name in ("learning_rate", "max_length", "lr_scheduler_type", "warmup_steps", "seed")
    }
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, optim="adamw_torch",
            per_device_train_batch_size=24, max_steps=2, logging_steps=1, beta=cfg.loss.beta, report_to="none",
            save_strategy="no", disable_tqdm=True, weight_decay=cfg.train.get("weight_decay", 0.0), **same,
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(turns),
        peft_config=peft_config(OmegaConf.to_container(cfg.lora), model),
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = [row["loss"] for row in lines if "loss" in row]
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    if lora in ("ia3", "oft"):  # the others draw their start at random
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_type_that_peft_has_not_is_refused_with_those_it_has(composed):
    with pytest.raises(ConfigError, match=r"(?s)lora.peft_type  peft has no such type; one of .*LOHA, LOKR"):
        require(composed("dpo", "lora=oft", "lora.peft_type=OFF"))
