"""How good an answer is: a rule of yours, a reward model, or a judge that compares answers; higher is better."""

import re
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf

from preftune.config.errors import UserError
from preftune.data.messages import Messages
from preftune.evaluate import judge
from preftune.evaluate.judge import ByScore, both_ways

Scorer = Callable[[Messages, Sequence[str]], list[float]]  # a prompt and several answers to it → a score each
LIST_OR_CODE = re.compile(r"^\s*(?:[-*•#>]|\d+[.)])\s|`|\*\*", re.MULTILINE)
MOST_WORDS, FEWEST_WORDS = 30, 4


class ScoringError(UserError):
    """Why answers cannot be scored, and what to set."""


def scorer(settings: DictConfig, section: str) -> Scorer:
    """The scorer that `rule`, `reward_model` or `judge` names. Raises ScoringError unless exactly one is given.

    JudgeError where the rule names no function, ModelError where there is no such reward model.
    """
    makers = {
        "rule": lambda path: one_by_one(judge.Rule(path, f"{section}.rule")),
        "reward_model": lambda path: one_by_one(judge.RewardModel(path)),
        "judge": by_judge,
    }
    given = [name for name in makers if settings[name]]
    if len(given) != 1:
        raise ScoringError(
            f"{section}: give one of {', '.join(makers)} to score answers by, not {len(given)}; for example "
            f"{section}.rule=preftune.evaluate.scoring.short_answer"
        )
    return makers[given[0]](settings[given[0]])


def one_by_one(judge: ByScore) -> Scorer:
    """What scores each answer by itself."""
    return lambda prompt, answers: [judge.score(list(prompt), answer) for answer in answers]


def by_judge(settings: DictConfig) -> Scorer:
    """A judge of conf/judge: an answer's score is the share of the others that it beats, judged both ways round."""
    decide = judge.build(OmegaConf.create(settings))

    def score(prompt: Messages, answers: Sequence[str]) -> list[float]:
        wins = [0.0] * len(answers)
        for i, first in enumerate(answers):
            for j, second in enumerate(answers[:i]):
                better = both_ways(decide, prompt, first, second)
                wins[i] += better
                wins[j] += 1 - better
        return [won / max(len(answers) - 1, 1) for won in wins]

    return score


def short_answer(prompt: Messages, answer: str) -> float:
    """The rule of the shipped pairs: 1 for 4 to 30 words in one paragraph without list, heading or code, else 0."""
    words, lines = len(answer.split()), answer.strip().splitlines()
    return float(FEWEST_WORDS <= words <= MOST_WORDS and len(lines) == 1 and not LIST_OR_CODE.search(answer))
