"""What a chat template leaves out of the rows: no error there, but another model than was asked for."""

import re
from collections import Counter
from collections.abc import Iterator

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from preftune.data.findings import Findings
from preftune.data.messages import REASONING, Messages, said
from preftune.data.token_checks import dialogues_of

THOUGHT = re.compile(r"<think>\s*(.*?)\s*</think>", re.DOTALL)


def check(rows: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, findings: Findings) -> None:
    """Count the rows of which the template drops the system message, the tools or the reasoning of an answer."""
    for origin, dialogues, given in dialogues_of(rows, kind):
        codes = {code for dialogue in dialogues for code in dropped(dialogue, given, tokenizer)}
        for code in sorted(codes):
            findings.add(code, [origin], of=len(rows))


def dropped(dialogue: Messages, given: dict, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What of one dialogue its rendered text does not hold: codes of findings."""
    systems = [said(turn).strip() for turn in dialogue if turn["role"] == "system"]
    thoughts = [thought for turn in dialogue if turn["role"] == "assistant" for thought in reasoning(turn)]
    if not (systems or thoughts or given.get("tools")):
        return
    text = tokenizer.apply_chat_template(dialogue, tokenize=False, **given)
    if not all(system in text for system in systems):
        yield "system_ignored"
    if not all(thought in text for thought in thoughts):
        yield "reasoning_stripped"
    if given.get("tools") and text == tokenizer.apply_chat_template(
        dialogue, tokenize=False, **given | {"tools": None}
    ):
        yield "tools_ignored"


def reasoning(turn: dict) -> list[str]:
    """What an assistant thought before its answer, in fields of its own or in its text."""
    found = [turn[name] for name in REASONING if isinstance(turn.get(name), str)]
    return [each.strip() for each in found + THOUGHT.findall(turn.get("content") or "") if each.strip()]


def unread_fields(fields: Counter[str], rows: int, tokenizer: PreTrainedTokenizerBase, findings: Findings) -> None:
    """Count the fields of messages that the template does not name."""
    unread = {name: count for name, count in fields.items() if not re.search(rf"\b{name}\b", tokenizer.chat_template)}
    if unread:
        says = ", ".join(f"{name} ({count:,})" for name, count in sorted(unread.items()))
        says = f"fields of messages that the chat template does not name: {says}"
        findings.add("extra_message_fields", count=max(unread.values()), of=rows, says=says)
