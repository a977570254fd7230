"""Which of two answers is better: an endpoint, a local model or a function of one's own is asked, both ways round."""

import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from statistics import fmean
from urllib.parse import urlsplit

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import UserError
from preftune.data.messages import Messages
from preftune.evaluate.statistics import at_equal_length, interval
from preftune.evaluate.subjects import find, on_device, weights
from preftune.models.load import load_reward_model
from preftune.models.tokenizer import token_ids

# (prompt, first answer, second answer) → how sure it is that the first one is better, 0 to 1; 0.5 is a tie
Judge = Callable[[Messages, str, str], float]
Answered = list[tuple[Messages, str, str]]  # (prompt, the policy's answer, the reference's)

INSTRUCTION = """Two assistants answered the same request. Say which answer is better: more helpful, correct, direct. \
Neither its place nor its length makes an answer better. Reply with one letter alone: A, B, or T for a tie.

[Request]
{request}

[Answer A]
{first}

[Answer B]
{second}

Better answer:"""
VERDICTS = {"A": 1.0, "B": 0.0, "T": 0.5}
LETTER = re.compile(r"\W*(?:better )?(?:answer\W+)?([ABT])\W*", re.IGNORECASE)


class JudgeError(UserError):
    """Why a judge gives no verdict, and how to go on. Never holds a key."""


def build(settings: DictConfig) -> Judge | None:
    """The judge that a file of conf/judge describes: the object or function under its `_target_`; None for `none`.

    Raises JudgeError where what it names cannot be imported.
    """
    if not settings:
        return None
    if "_target_" not in settings:
        example = "'{_target_: hydra.utils.get_method, path: my_judge.shorter}'"
        raise JudgeError(f"judge={','.join(settings)}: wants what a file of conf/judge holds, such as {example}")
    try:
        made = instantiate(settings)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise JudgeError(f"judge: {cause}") from None
    if not callable(made):
        raise JudgeError(f"judge: {settings._target_} gives no function to call")
    return made


def request(prompt: Messages, first: str, second: str) -> Messages:
    """What a judging model is asked about two answers to a dialogue."""
    told = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return [{"role": "user", "content": INSTRUCTION.format(request=told, first=first, second=second)}]


def win_rate(judge: Judge, answered: Answered, tokenizer: PreTrainedTokenizerBase) -> dict:
    """How often the judge prefers the policy's answer.

    Each row is judged both ways round and its two verdicts are averaged, so that a judge who prefers a place gives a
    half (Zheng et al. 2023, arXiv:2306.05685). Beside the plain rate stands the one at equal length, for judges prefer
    long answers. Raises JudgeError where there is no verdict, or none from 0 to 1.
    """
    wins = [both_ways(judge, *row) for row in answered]
    longer = [len(tokenizer(mine)["input_ids"]) - len(tokenizer(theirs)["input_ids"]) for _, mine, theirs in answered]
    return {
        "win_rate": fmean(wins),
        "win_rate_ci": list(interval(fmean(wins), len(wins))),
        "length_controlled_win_rate": at_equal_length(wins, longer),
        "judged": len(wins),
    }


def both_ways(judge: Judge, prompt: Messages, first: str, second: str) -> float:
    """How sure the judge is that the first is better, the mean of both orders; scores have no order."""
    if isinstance(judge, ByScore):
        return verdict(judge, prompt, first, second)
    return (verdict(judge, prompt, first, second) + 1 - verdict(judge, prompt, second, first)) / 2


def verdict(judge: Judge, prompt: Messages, first: str, second: str) -> float:
    """One verdict, checked; equal answers are a tie and need no judge."""
    if first == second:
        return 0.5
    found = judge(prompt, first, second)
    if not isinstance(found, (int, float)) or not 0 <= found <= 1:
        raise JudgeError(f"the judge gave {found!r}; it must say from 0 to 1 how sure it is that the first is better")
    return float(found)


class ByScore:
    """A judge that scores one answer at a time: the better one is that with the higher score."""

    def score(self, prompt: Messages, answer: str) -> float:
        raise NotImplementedError

    def __call__(self, prompt: Messages, first: str, second: str) -> float:
        return float(np.sign(self.score(prompt, first) - self.score(prompt, second)) / 2 + 0.5)


class Rule(ByScore):
    """A rule for one answer, by its dotted path: (prompt messages, answer) → a number, the higher the better."""

    def __init__(self, path: str, key: str = "judge.path"):
        """`key` is where `path` was written. Raises JudgeError where it names no function."""
        self.path = path
        try:
            self.rule = get_method(path)
        except (ImportError, ValueError) as error:
            raise JudgeError(f"{key}={path}: {error}") from None

    def score(self, prompt: Messages, answer: str) -> float:
        """What the rule gives for an answer. Raises JudgeError where it fails, or gives no number."""
        try:
            found = float(self.rule(prompt, answer))
            if math.isnan(found):
                raise ValueError("it gives NaN, which is no score")
            return found
        except Exception as error:
            asked = f"prompt {prompt[-1].get('content', '')[:60]!r}, answer {answer[:60]!r}"
            raise JudgeError(f"{self.path}: {type(error).__name__}: {error} ({asked})") from error


class RewardModel(ByScore):
    """A reward model, by its run, folder or hub id: the better answer is the one with the higher reward."""

    def __init__(self, path: str):
        """Raises ModelError where there is none, or where it is a language model."""
        model, self.tokenizer = load_reward_model(path)
        self.model = on_device(model)

    def score(self, prompt: Messages, answer: str) -> float:
        """The reward of an answer."""
        return self.of(token_ids(self.tokenizer, [*prompt, {"role": "assistant", "content": answer}]))

    @torch.no_grad()
    def of(self, ids: list[int]) -> float:
        """The reward of a dialogue in tokens."""
        return self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits.item()


class Endpoint:
    """A model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, …); `options` go into each request.

    The key is read from the environment variable `api_key_env` and goes into one header; it is in no message of ours,
    and is not sent on when the server redirects.
    """

    def __init__(self, base_url: str, model: str, api_key_env: str, timeout: float, options: dict):
        if urlsplit(base_url).scheme not in ("http", "https"):
            such = "http:// or https://, such as http://localhost:8000/v1"
            raise JudgeError(f"{base_url}: an endpoint begins with {such}")
        self.url, self.model, self.timeout = f"{base_url.rstrip('/')}/chat/completions", model, timeout
        self.options, self.api_key_env = dict(options), api_key_env
        self._key = os.environ.get(api_key_env, "").strip()

    def __call__(self, prompt: Messages, first: str, second: str) -> float:
        said = self.answer(request(prompt, first, second))
        letter = LETTER.fullmatch(said.strip().rpartition("\n")[2])  # a model that thinks aloud ends with its verdict
        if letter is None:
            raise JudgeError(f"judge.model={self.model} did not end with A, B or T: {self._clean(said)[-200:]!r}")
        return VERDICTS[letter[1].upper()]

    def answer(self, messages: Messages) -> str:
        """What the served model says to a dialogue. Raises JudgeError where it says nothing."""
        body = {"model": self.model, "messages": messages, **self.options}
        asked = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self._key:
            asked.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(asked, timeout=self.timeout) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            why = f"{error.code} {self._clean(error.read(9999).decode(errors='replace'))[:300]}"
        except (OSError, ValueError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {self._clean(str(error))}"
        hint = "" if self._key else f". No key was sent: {self.api_key_env} is not set"
        raise JudgeError(f"the endpoint at {urlsplit(self.url).hostname} gave no answer ({why}){hint}")

    def _clean(self, text: str) -> str:
        """A text of the server's without the key that it may echo."""
        return text.replace(self._key, "***") if self._key else text


class LocalModel:
    """A chat model in this process: how much more likely it finds the letter A than B as its next token."""

    def __init__(self, path: str):
        found = find(path)
        self.model, self.tokenizer = weights(found), found.tokenizer()
        self.letters = [self.tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "AB"]

    @torch.no_grad()
    def __call__(self, prompt: Messages, first: str, second: str) -> float:
        ids = token_ids(self.tokenizer, request(prompt, first, second), add_generation_prompt=True)
        logits = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits
        return logits[0, -1, self.letters].float().softmax(0)[0].item()
