"""How good an answer is: a rule of yours, a reward model, or a judge that compares answers; higher is better."""

import re
from collections.abc import Callable, Sequence

import torch
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from preftune.config.errors import UserError
from preftune.evaluate import judge
from preftune.evaluate.judge import verdict

Messages = list[dict]
Scorer = Callable[[Messages, Sequence[str]], list[float]]  # a prompt and several answers to it → a score each
WORD = re.compile(r"[a-z0-9']+")
COMMON = {
    "a",
    "an",
    "and",
    "are",
    "as",
    "at",
    "be",
    "by",
    "can",
    "do",
    "does",
    "for",
    "from",
    "how",
    "i",
    "if",
    "in",
    "is",
}
COMMON |= {
    "it",
    "me",
    "my",
    "of",
    "on",
    "or",
    "should",
    "so",
    "tell",
    "that",
    "the",
    "there",
    "this",
    "to",
    "was",
    "what",
}
COMMON |= {"when", "where", "which", "who", "why", "will", "with", "would", "you", "your"}


class ScoringError(UserError):
    """Why answers cannot be scored, and what to set."""


def scorer(settings: DictConfig) -> Scorer:
    """The scorer that `rule`, `reward_model` or `judge` names. Raises ScoringError unless exactly one of them is "
    "given."""
    makers = {"rule": by_rule, "reward_model": by_reward_model, "judge": by_judge}
    given = [name for name in makers if settings[name]]
    if len(given) != 1:
        raise ScoringError(
            f"pipeline.rounds: give one of {', '.join(makers)} to score answers by, not {len(given)}; for example "
            "pipeline.rounds.rule=preftune.scoring.plain_answer"
        )
    return makers[given[0]](settings[given[0]])


def by_rule(path: str) -> Scorer:
    """A function by its dotted path: (prompt messages, answer) → a number."""
    try:
        rule = get_method(path)
    except (ImportError, ValueError) as error:
        raise ScoringError(f"pipeline.rounds.rule={path}: {error}") from None
    return lambda prompt, answers: [float(rule(prompt, answer)) for answer in answers]


def by_reward_model(path: str) -> Scorer:
    """A sequence-classification model with one output: its logit for the dialogue."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()

    @torch.no_grad()
    def score(prompt: Messages, answers: Sequence[str]) -> list[float]:
        texts = [
            tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
            for answer in answers
        ]
        rows = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
        return [model(**row).logits.squeeze().item() for row in rows]

    return score


def by_judge(settings: DictConfig) -> Scorer:
    """A judge of conf/judge: an answer's score is the share of the others that it beats, each pair judged both ways "
    "round."""
    decide = judge.build(OmegaConf.create(settings))

    def score(prompt: Messages, answers: Sequence[str]) -> list[float]:
        wins = [0.0] * len(answers)
        for i, first in enumerate(answers):
            for j, second in enumerate(answers[:i]):
                better = verdict(decide, prompt, first, second)
                wins[i] += better
                wins[j] += 1 - better
        return [won / max(len(answers) - 1, 1) for won in wins]

    return score


def plain_answer(prompt: Messages, answer: str) -> float:
    """A rule for the shipped data, from 0 to 1: a complete answer of one to three sentences (1 or 0), that takes up the
    question's own words (half of them are enough) and does not repeat itself. The mean of the three."""
    words = WORD.findall(answer.lower())
    if not words:
        return 0.0
    asked = set(WORD.findall(prompt[-1]["content"].lower())) - COMMON
    sentences = re.findall(r"[.!?](?:\s|$)", answer)
    complete = float(answer.rstrip().endswith((".", "!")) and 1 <= len(sentences) <= 3)
    named = len(asked & set(words)) / len(asked) if asked else 1.0
    return (complete + min(2 * named, 1.0) + len(set(words)) / len(words)) / 3
