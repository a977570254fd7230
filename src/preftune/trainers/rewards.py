"""What the trainers that sample score answers by: reward models, functions of TRL's form, and rules for one answer."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import Dataset
from hydra.utils import get_method
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preftune.config.errors import UserError, brief
from preftune.data.findings import DataError
from preftune.data.load import Data
from preftune.data.messages import said
from preftune.models.load import load_reward_model

WATCHED = "watched_"  # before the name of a reward of weight 0: logged, and never trained on


class RewardError(UserError):
    """What is wrong with one of loss.rewards, and what it should be."""


def arguments(cfg: DictConfig, data: Data) -> dict:
    """What TRL's trainer takes beside the others: `reward_funcs`, and the tokenizers of those that are models.

    Raises RewardError where one is neither a model nor a function; DataError where rows have tools of their own.
    """
    if "rewards" not in cfg.loss:
        return {}
    if isinstance(data.train, Dataset) and "tools" in data.train.column_names:
        raise DataError("TRL's trainers that sample give no tools to the template: data.columns={tools: null}")
    weights = cfg.loss.get("reward_weights") or [1.0] * len(cfg.loss.rewards)
    found = [reward(name, watched=weight == 0) for name, weight in zip(cfg.loss.rewards, weights, strict=True)]
    return {
        "reward_funcs": [each for each, _ in found],
        "reward_processing_classes": [tokenizer for _, tokenizer in found],
    }


def template_arguments(data: Data, cfg: DictConfig) -> dict:
    """The rows' chat_template_kwargs as a trainer that samples takes them. Raises DataError where they differ."""
    rows = data.train if isinstance(data.train, Dataset) and "rewards" in cfg.loss else None
    if rows is None or "chat_template_kwargs" not in rows.column_names:
        return {}
    first, *others = rows["chat_template_kwargs"]
    if any(each != first for each in others):
        raise DataError("rows with different chat_template_kwargs: TRL's trainers that sample take one for all rows")
    return {"chat_template_kwargs": first}


def reward(name: str, watched: bool) -> tuple[PreTrainedModel | Callable, PreTrainedTokenizerBase | None]:
    """A reward as TRL's trainers take it, with the tokenizer of a model: by its path, or the name of a function."""
    if Path(name).exists() or "/" in name or "." not in name:
        model, tokenizer = load_reward_model(name)
        if tokenizer.chat_template is None:
            raise RewardError(f"loss.rewards: the tokenizer of {name} has no chat template to write dialogues by")
        model.config._name_or_path = (WATCHED if watched else "") + (Path(name).name or name)
        return model, tokenizer
    try:
        function = get_method(name)
    except (ImportError, ValueError) as error:
        raise RewardError(f"loss.rewards: {name} is neither a model nor a function ({brief(error)})") from None
    if "completions" not in inspect.signature(function).parameters:
        function = partial(each_answer, function)

    def checked(**given):
        return numbers(function, name, given)

    checked.__name__ = (WATCHED if watched else "") + name.rpartition(".")[2]
    return checked, None


def each_answer(rule: Callable, prompts: list, completions: list, **_: object) -> list[float | None]:
    """A rule for one answer, (prompt messages, answer) → number, as a reward of TRL's form."""
    return [rule(prompt, said(answer[-1])) for prompt, answer in zip(prompts, completions, strict=True)]


def numbers(function: Callable, name: str, given: dict) -> list[float | None]:
    """What a reward function gives, checked: a number or None (it does not apply) for each answer.

    Raises RewardError, with the first prompt that it was asked about, where it fails or gives something else.
    """
    asked = given["prompts"]
    try:
        found = list(function(**given))
    except Exception as error:
        raise RewardError(f"loss.rewards: {name} raised {type(error).__name__}: {error} ({shown(asked[0])})") from error
    if len(found) != len(asked):
        raise RewardError(f"loss.rewards: {name} gave {len(found)} values for {len(asked)} answers")
    for prompt, value in zip(asked, found, strict=True):
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise RewardError(f"loss.rewards: {name} gave {value!r}, which is no finite number ({shown(prompt)})")
    return found


def shown(prompt: list) -> str:
    return f"prompt: {said(prompt[-1])[:60]!r}"
