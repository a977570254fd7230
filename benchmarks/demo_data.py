"""Draw the demo's preference pairs from the embedded model itself: `python -m benchmarks.demo_data`.

The rule, which a reader sees at a glance: an answer is short, at most 30 words in one paragraph without a list.
*chosen* is the model's own answer to the prompt with REQUEST behind it, where it keeps the rule and ends as a sentence;
*rejected* is its answer to the bare prompt, up to the last whole sentence within 80 tokens, where that breaks the rule.
REQUEST is not in the data. The same seed draws the same pairs on the same machine.
"""

import json
import re
from pathlib import Path

import torch
from omegaconf import OmegaConf

from preftune.evaluate.generation import generated
from preftune.evaluate.scoring import short_answer
from preftune.models.load import load_model, load_tokenizer
from preftune.models.tokenizer import stop_tokens

REQUEST = " Answer in one short sentence."
TRIES, SEED, BATCH = 4, 0, 32
PAIRS = 144  # spread over the prompts; every third is held out
SAMPLING = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
TOKENS = {"chosen": 48, "rejected": 80}
HERE = Path(__file__).parent
FOLDER = HERE.parent / "src/preftune/data/demo"


def drawn(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[tuple[str, bool]]:
    """(answer, whether it ended by itself) to each prompt."""
    found = []
    for start in range(0, len(prompts), BATCH):
        batch = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
        for _, ids in generated(model, tokenizer, batch, max_new_tokens, False, **SAMPLING):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            found.append((text, ids[-1] in stop_tokens(tokenizer)))
        print(f"{min(start + BATCH, len(prompts))} of {len(prompts)} prompts answered", flush=True)
    return found


def good(answer: str, ended: bool) -> str | None:
    """An answer that keeps the rule and ends as a sentence; None otherwise."""
    return answer if ended and short_answer([], answer) and answer[-1] in ".!?" else None


def bad(answer: str, ended: bool) -> str | None:
    """An answer that breaks the rule, up to its last whole sentence; None otherwise."""
    whole = answer if ended else "".join(re.findall(r".*?[.!?](?=\s)", answer, re.DOTALL))
    return whole.strip() if whole and not short_answer([], whole) else None


def tried(model, tokenizer, prompts: list[str], side: str) -> dict[str, str]:
    """An answer of this side to as many prompts as give one in TRIES draws."""
    found: dict[str, str] = {}
    for _ in range(TRIES):
        left = [prompt for prompt in prompts if prompt not in found]
        asked = [prompt + REQUEST for prompt in left] if side == "chosen" else left
        answers = drawn(model, tokenizer, asked, TOKENS[side])
        kept = [good(*each) if side == "chosen" else bad(*each) for each in answers]
        found |= {prompt: answer for prompt, answer in zip(left, kept, strict=True) if answer}
    return found


def main() -> None:
    base = OmegaConf.load(HERE.parent / "conf/base.yaml").model
    base.path = "embedded://smollm2"
    torch.manual_seed(SEED)
    model, tokenizer = load_model(base, OmegaConf.create({}), use_cpu=True), load_tokenizer(base)
    prompts = (HERE / "demo_prompts.txt").read_text(encoding="utf-8").splitlines()
    chosen = tried(model, tokenizer, prompts, "chosen")
    rejected = tried(model, tokenizer, prompts, "rejected")
    both = [prompt for prompt in prompts if prompt in chosen and prompt in rejected]
    rows = [{"prompt": prompt, "chosen": chosen[prompt], "rejected": rejected[prompt]} for prompt in both]
    rows = [rows[number * len(rows) // PAIRS] for number in range(PAIRS)]
    for name, picked in (("eval", rows[1::3]), ("train", rows[::3] + rows[2::3])):
        lines = [json.dumps(row, ensure_ascii=False) for row in picked]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}.jsonl: {len(lines)} pairs of {len(prompts)} prompts")


if __name__ == "__main__":
    main()
