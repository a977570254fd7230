"""Benchmarks of EleutherAI's lm-evaluation-harness on a loaded model, by its own library."""

import importlib.util

from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import UserError


class TasksError(UserError):
    """Why benchmarks cannot run, and what they need."""


def require(tasks: list[str]) -> None:
    """Raise TasksError where tasks are wanted and lm-eval is not installed: before a model is loaded."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise TasksError(
            f"tasks=[{','.join(tasks)}] runs in lm-eval, which is not installed: pip install 'preftune[lm-eval]'"
        )


def results(
    model: Module, tokenizer: PreTrainedTokenizerBase, tasks: list[str], limit: int | None, include_path: str | None
) -> dict[str, dict]:
    """What `lm_eval.simple_evaluate` finds for each task: its metrics with their standard errors, by lm-eval's names.

    `limit`: rows a task; `include_path`: a folder of task files beside lm-eval's own.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=tasks,
        limit=limit,
        task_manager=TaskManager(include_path=include_path),
        log_samples=False,
    )
    return {
        task: {name: value for name, value in figures.items() if isinstance(value, float)}
        for task, figures in found["results"].items()
    }
