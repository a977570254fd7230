"""What the benchmarks train: Anthropic's HH dialogues or the shipped demo data, on SmolLM2, a GPT-2 or a tiny model."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from preftune.models import embedded

ROOT = Path(__file__).parents[1]
HH = ROOT.parent / "shared/data/hh-harmless-2000.jsonl.gz"
DEMO = ROOT / "src/preftune/data/demo/train.jsonl"
DEEP = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 12}
SHAPES = {  # of about 100M parameters, with SmolLM2's tokenizer and random weights
    "gpt2": ("gpt2", {"n_positions": 1024}),
    "moe": ("qwen3_moe", DEEP | {"head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
                                 "moe_intermediate_size": 256, "router_aux_loss_coef": 0.001}),
    "hybrid": ("lfm2", DEEP | {"intermediate_size": 1536, "full_attn_idxs": [2, 5, 8, 11]}),
    "gemma3": ("gemma3_text", DEEP | {"head_dim": 64, "intermediate_size": 2048, "sliding_window": 256}),
}  # fmt: skip
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages(dialogue: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant): ?", dialogue)[1:]
    return [{"role": ROLES[role], "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def pairs(case) -> Dataset:
    """The rows of a case, as messages; HH pairs whose answers agree or whose prompts do not are left out."""
    if case.source.startswith("synthetic"):
        return synthetic(*map(int, case.source.split("-")[1:]), case.rows)
    if case.source == "demo":
        rows = [json.loads(line) for line in DEMO.open(encoding="utf-8")]
        return Dataset.from_list(
            [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows[: case.rows]]
        )
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        both = [[messages(json.loads(line)[side]) for side in ("chosen", "rejected")] for line in file]
    rows = [
        {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        for chosen, rejected in both
        if chosen[:-1] == rejected[:-1] and chosen != rejected and chosen[-1]["role"] == "assistant"
    ]
    return Dataset.from_list(rows[: case.rows])


def synthetic(prompt: int, answer: int, rows: int) -> Dataset:
    """Rows of about as many tokens as asked for, ± a quarter, each word of one token."""
    words = np.array(
        ["time", "people", "way", "water", "day", "part", "sound", "work", "place", "year", "back", "thing"]
    )
    rng = np.random.default_rng(0)

    def say(role: str, tokens: int) -> list[dict]:
        count = int(tokens * rng.uniform(0.75, 1.25))
        return [{"role": role, "content": " ".join(rng.choice(words, count))}]

    return Dataset.from_list(
        [
            {"prompt": say("user", prompt)} | {side: say("assistant", answer) for side in ("chosen", "rejected")}
            for _ in range(rows)
        ]
    )


def model_of(case):
    """Model, tokenizer and adapter of a case; those of SHAPES have random weights."""
    name = "tiny" if case.model == "tiny" else "smollm2"
    folder = embedded.folder(f"embedded://{name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if case.model in SHAPES:
        kind, sizes = SHAPES[case.model]
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return model, tokenizer, lora if case.tuning == "lora" else None


def calibration(trainer, count: int) -> list[dict]:
    """Small batches of two or three of the shorter rows, of different lengths, for counting."""
    dataset = trainer.train_dataset
    name = "chosen_ids" if "chosen_ids" in dataset.column_names else "prompt_ids"
    name = name if name in dataset.column_names else "prompt_input_ids"
    order = np.argsort([len(ids) for ids in dataset[name]], kind="stable")
    rng = np.random.default_rng(0)
    rows = [rng.choice(order[: max(3, len(order) // 4)], 2 + i % 2, replace=False).tolist() for i in range(count)]
    return [trainer.data_collator([dataset[row] for row in each]) for each in rows]
