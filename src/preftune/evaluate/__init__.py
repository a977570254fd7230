"""Models on held-out data: log-probs, accuracies and their intervals, KL, answers, win rates; several in one table."""

from preftune.evaluate.generation import answers
from preftune.evaluate.pairs import PairScores, implicit_rewards, score

__all__ = ["PairScores", "answers", "implicit_rewards", "score"]
