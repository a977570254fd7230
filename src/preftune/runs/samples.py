"""What the policy says to fixed prompts, from time to time while it trains."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from preftune.config.errors import advice
from preftune.config.processes import main_process
from preftune.evaluate import generation
from preftune.health.findings import Finding
from preftune.health.rules import length_drift

TOKENS = 64


class Samples(TrainerCallback):
    """Answers the first held-out prompts every `every` steps, into <run>/samples.jsonl, and watches their length.

    `first` are the answers before training, by prompt. `act` takes a length_drift finding, `tell` the rows.
    """

    def __init__(self, run: Path, tokenizer, prompts: list[list[dict]], first: dict[str, str], every: int, limit: float,
                 act: Callable[[Finding, object], None], tell: Callable[[int, list[dict]], None]):  # fmt: skip
        self.path, self.tokenizer, self.prompts, self.first = run / "samples.jsonl", tokenizer, prompts, first
        self.every, self.limit, self.act, self.tell = every, limit, act, tell

    @advice("samples")
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or not self.prompts:
            return
        texts = generation.answers(model, self.tokenizer, self.prompts, TOKENS)
        rows = [
            {"step": state.global_step, "prompt": asked, "before": before, "answer": text, "tokens": self.count(text)}
            for (asked, before), text in zip(self.first.items(), texts, strict=True)
        ]
        if main_process():
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.tell(state.global_step, rows)
        before = sum(map(self.count, self.first.values())) / len(self.first)
        if finding := length_drift(
            state.global_step, before, sum(row["tokens"] for row in rows) / len(rows), self.limit
        ):
            self.act(finding, control)

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
