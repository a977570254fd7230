"""What the policy says to fixed prompts, from time to time while it trains."""

import json

from transformers import PreTrainedTokenizerBase, TrainerCallback

from preftune.config.errors import advice
from preftune.config.processes import main_process
from preftune.evaluate import generation
from preftune.health.monitor import Monitor
from preftune.health.rules import length_drift

TOKENS = 64


class Samples(TrainerCallback):
    """Answers `prompts` every `sample_steps` steps, into <run>/samples.jsonl, and watches the length of the answers.

    `first` are the answers before training, by prompt; `monitor` acts on a length that drifts.
    """

    def __init__(
        self,
        run: object,
        monitor: Monitor,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[dict]],
        first: dict[str, str],
    ):
        self.run, self.monitor, self.tokenizer, self.prompts, self.first = run, monitor, tokenizer, prompts, first

    @advice("samples")
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.run.cfg.sample_steps or not self.prompts:
            return
        texts = generation.answers(model, self.tokenizer, self.prompts, TOKENS, bf16=args.bf16)
        rows = [
            {"step": state.global_step, "prompt": asked, "before": before, "answer": text, "tokens": self.count(text)}
            for (asked, before), text in zip(self.first.items(), texts, strict=True)
        ]
        if main_process():
            with (self.run.path / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.run.tracker.samples(state.global_step, rows)
        before = sum(map(self.count, self.first.values())) / len(self.first)
        now, limit = sum(row["tokens"] for row in rows) / len(rows), self.run.cfg.health.length_drift
        if finding := length_drift(state.global_step, before, now, limit):
            self.monitor.act(finding, control)

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
