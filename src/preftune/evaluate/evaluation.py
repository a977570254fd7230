"""recipes.evaluate: every model of a list on its held-out pairs, as one table or as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import UserError
from preftune.config.files import write_json
from preftune.data.findings import DataError, Findings
from preftune.data.load import load as load_data
from preftune.data.shapes import DEMONSTRATIONS, PAIRS
from preftune.data.token_checks import answered, sequences, tokenized
from preftune.data.views import KINDS
from preftune.evaluate import generation, judge, lm_tasks, pairs, subjects
from preftune.evaluate.judge import Answered, ByScore, Judge, RewardModel, win_rate
from preftune.evaluate.kept import Scorer
from preftune.evaluate.pairs import PairScores, implicit_rewards
from preftune.evaluate.statistics import at_equal_length, interval
from preftune.evaluate.subjects import Subject, find
from preftune.models.load import quiet

FORMATS = ("table", "json")
ROWS = {  # of a model's figures: what it is called in the table, and its format
    "pairs": ("held-out pairs", "d"),
    "accuracy": ("accuracy of rewards (implicit ones of a policy)", ".1%"),
    "accuracy_ci": ("  95% interval", ".1%"),
    "length_controlled_accuracy": ("  at equal length", ".1%"),
    "margin": ("margin", ".4f"),
    "logratio_chosen_per_token": ("log-ratio chosen, nats per token", "+.4f"),
    "logratio_rejected_per_token": ("log-ratio rejected, nats per token", "+.4f"),
    "kl": ("KL to the reference, nats per answer", ".3f"),
    "kl_error": ("  standard error", ".3f"),
    "kl_per_token": ("  nats per token", ".4f"),
    "perplexity": ("perplexity of SFT data", ".2f"),
    "reference_perplexity": ("  the reference's", ".2f"),
    "rule_score": ("mean of the rule or reward", ".2f"),
    "rule_score_ci": ("  95% interval", ".2f"),
    "reference_rule_score": ("  the reference's", ".2f"),
    "reference_rule_score_ci": ("  95% interval", ".2f"),
    "win_rate": ("win rate against the reference", ".1%"),
    "win_rate_ci": ("  95% interval", ".1%"),
    "length_controlled_win_rate": ("  at equal length", ".1%"),
}


class EvaluationError(UserError):
    """A setting of recipes.evaluate that cannot be followed."""


@dataclass(frozen=True)
class HeldOut:
    """What a model is evaluated on: pairs, and demonstrations for the perplexity (None: the pairs' chosen answers)."""

    pairs: Dataset
    demonstrations: Dataset | None
    prompts: list[generation.Prompt]  # to be answered: as many as are shown or judged
    max_length: int | None
    cache: str | None  # the run's own folder of reference log-probs, where scores are kept


@dataclass(frozen=True)
class Measured:
    """What one model makes of held-out data: scores of pairs, perplexity, greedy answers, lm-eval's results."""

    scores: PairScores
    perplexity: float
    answers: list[str]
    tasks: dict[str, dict]


def run(cfg: DictConfig) -> str:
    """Evaluate `cfg.models`; returns the table or the JSON. `cfg.output` is a file for the JSON, whatever is returned.

    Raises SubjectError, DataError, ModelError and EvaluationError, most of them before a model is loaded.
    """
    quiet()
    if cfg.format not in FORMATS:
        raise EvaluationError(f"format={cfg.format}: wants table or json")
    lm_tasks.require(list(cfg.tasks))
    named = [cfg.models] if isinstance(cfg.models, str) else list(cfg.models)
    if not named:
        raise EvaluationError("models=[]: name at least one, such as models=[runs/demo]")
    found = [find(name) for name in named]
    decide = judge.build(cfg.judge)
    first = next((each for each in found if each.cfg is not None), None)
    seen: dict[tuple, Measured] = {}
    rows = []
    for each in found:  # what its own run does not say (β, data, precision) is the first run's
        teacher = each if each.cfg is not None else first or each
        rows.append(reward_row(each, teacher, cfg) if each.scores_texts else row(each, teacher, cfg, decide, seen))
    if cfg.output is not None:
        write_json(Path(cfg.output), rows)
    return json.dumps(rows, indent=2, ensure_ascii=False) if cfg.format == "json" else table(rows)


def row(subject: Subject, teacher: Subject, cfg: DictConfig, decide: Judge | None, seen: dict) -> dict:
    """The figures of one model, with β, data and precision of `teacher`. Raises what `run` raises.

    `seen` keeps what is measured of a reference for the other models of the table.
    """
    bf16 = teacher.bf16 if cfg.bf16 is None else cfg.bf16
    beta = cfg.beta or teacher.beta or 0.1  # TRL's default, where neither a run nor the user names one
    loaded = subjects.load(subject, cfg.reference)
    data = held_out(cfg, teacher, loaded.tokenizer)
    against = (cfg.reference or subject.start.path, subject.start.revision, data.pairs._fingerprint, bf16)
    policy = measured(loaded.model, loaded.tokenizer, data, cfg, bf16)
    if against not in seen:
        with loaded.reference() as other:
            seen[against] = measured(other, loaded.tokenizer, data, cfg, bf16)
    reference, drift = seen[against], dict.fromkeys(("kl", "kl_error", "kl_per_token", "kl_tokens"))
    if cfg.kl_prompts:
        prompts = generation.prompts(data.pairs, cfg.kl_prompts)
        drawn = generation.sampled(loaded.model, loaded.tokenizer, prompts, cfg.max_new_tokens, bf16, cfg.seed)
        drift = generation.divergence(loaded.model, loaded.reference, drawn, bf16)
    answered = list(zip(data.prompts, policy.answers, reference.answers, strict=True))
    return {
        "model": subject.name,
        "reference": cfg.reference or subject.start.path,
        "beta": beta,
        **preferences(policy.scores, reference.scores, beta),
        **drift,
        "perplexity": policy.perplexity,
        "reference_perplexity": reference.perplexity,
        **judged(answered, cfg, decide, loaded.tokenizer),
        "tasks": policy.tasks,
        "reference_tasks": reference.tasks,
    }


def measured(model: Module, tokenizer: PreTrainedTokenizerBase, data: HeldOut, cfg: DictConfig, bf16: bool) -> Measured:
    """One model on the held-out data."""
    scores = Scorer(tokenizer, data.max_length, bf16, root=data.cache).score(model, data.pairs)
    perplexity = scores.perplexity()
    if data.demonstrations is not None:  # what their perplexity rises by was forgotten
        rows = [sequences(row, data.max_length) for row in tokenized(data.demonstrations, DEMONSTRATIONS, tokenizer)]
        perplexity = pairs.perplexity(*pairs.log_probs(model, tokenizer, rows, bf16))
    answers = generation.answers(model, tokenizer, data.prompts, cfg.max_new_tokens, bf16)
    tasks = lm_tasks.results(model, tokenizer, list(cfg.tasks), cfg.tasks_limit, cfg.tasks_path) if cfg.tasks else {}
    return Measured(scores, perplexity, answers, tasks)


def reward_row(subject: Subject, teacher: Subject, cfg: DictConfig) -> dict:
    """The figures of a reward model: how often it gives the chosen answer the higher reward, and by how much."""
    scorer = RewardModel(subject.weights)
    data = held_out(cfg, teacher, scorer.tokenizer)
    rows = list(tokenized(data.pairs, PAIRS, scorer.tokenizer))
    rewards = torch.tensor([[scorer.of(row.prompt + ids) for ids in row.answers.values()] for row in rows])
    tokens = torch.tensor([[len(ids) for ids in row.answers.values()] for row in rows])
    margins, longer_by = (each[:, 0] - each[:, 1] for each in (rewards, tokens))
    right = (margins > 0).double()
    return {
        "model": subject.name,
        "reference": subject.start.path,
        "pairs": len(rows),
        "accuracy": right.mean().item(),
        "accuracy_ci": list(interval(right.mean().item(), len(right))),
        "length_controlled_accuracy": at_equal_length(right, longer_by),
        "margin": margins.mean().item(),
        "generations": [],
    }


def held_out(cfg: DictConfig, teacher: Subject, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """The pairs that the run held out, by its own data, seed and fraction, or all rows of `eval_data`.

    Raises DataError where they cannot be read, and EvaluationError where there are none.
    """
    length = subjects.base().train.max_length if teacher.cfg is None else teacher.cfg.train.max_length
    shown = whole_set(cfg.sft_data, "demonstrations", tokenizer, length) if cfg.sft_data else None
    if cfg.eval_data:
        found = whole_set(cfg.eval_data, "paired", tokenizer, length)
    elif teacher.cfg is None:
        raise EvaluationError(f"{teacher.name} is no run, and holds no data out: name some, eval_data=FILE")
    else:
        try:
            found = teacher.data(tokenizer, length).eval_pairs
        except DataError as error:
            if not any(each.code == "images" for each in error.findings):
                raise
            raise EvaluationError(
                f"{teacher.name} holds out rows with images, which are not evaluated here: TRL's own figures of them "
                "are in its metrics.jsonl; eval_data=FILE names pairs of text"
            ) from None
    if found is None or not len(found):
        raise EvaluationError(f"{teacher.name} held no pairs out (data.eval_split, data.eval_fraction): eval_data=FILE")
    found = found.select(range(min(len(found), cfg.max_pairs or len(found))))
    prompts = generation.prompts(found, max(cfg.generations, cfg.judged_prompts if cfg.judge else 0))
    cache = None if teacher.cfg is None else OmegaConf.select(teacher.cfg, "fastpath.reference_cache")
    return HeldOut(found, shown, prompts, length, cache)


def whole_set(path: object, view: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """All rows of a data set (anything that data.path takes) in the form of a view. Raises DataError."""
    settings = OmegaConf.merge(subjects.base().data, {"path": path, "eval_fraction": 0.0, "skipped_file": None})
    rows = load_data(settings, view=view, tokenizer=tokenizer, max_length=max_length, seed=0).train
    return answered(rows, KINDS[view], tokenizer, max_length, Findings())


def preferences(policy: PairScores, reference: PairScores, beta: float) -> dict:
    """How the implicit rewards rank the pairs, and where the log-probs went; log-ratios in nats per token."""
    count, rewards = len(policy.chosen), implicit_rewards(policy, reference, beta)
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return {
        "pairs": count,
        "accuracy": rewards["reward_accuracy"],
        "accuracy_ci": list(interval(rewards["reward_accuracy"], count)),
        "length_controlled_accuracy": rewards["length_controlled_accuracy"],
        "logp_accuracy": policy.logp_accuracy(),
        "margin": rewards["reward_margin"],
        "logratio_chosen_per_token": (chosen.sum() / policy.chosen_tokens.sum()).item(),
        "logratio_rejected_per_token": (rejected.sum() / policy.rejected_tokens.sum()).item(),
        "by_length": rewards["by_length"],
    }


def judged(answered: Answered, cfg: DictConfig, decide: Judge | None, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Answers of policy and reference side by side, and how often the judge prefers the policy's."""
    shown = [{"prompt": p[-1]["content"], "policy": a, "reference": b} for p, a, b in answered[: cfg.generations]]
    asked = answered[: cfg.judged_prompts]
    rate = win_rate(decide, asked, tokenizer) if decide else {}
    scored = rule_scores(decide, asked) if isinstance(decide, ByScore) else {}
    return rate | scored | {"generations": shown}


def rule_scores(rule: ByScore, answered: Answered) -> dict:
    """The mean of a rule or reward over the answers of policy and reference; of a share with Wilson's interval."""
    found: dict[str, float | list[float]] = {}
    for place, name in ((1, "rule_score"), (2, "reference_rule_score")):
        scores = [rule.score(row[0], row[place]) for row in answered]
        found[name] = mean = fmean(scores)
        if all(0 <= score <= 1 for score in scores):
            found[f"{name}_ci"] = list(interval(mean, len(scores)))
    return found


def table(rows: list[dict]) -> str:
    """The models side by side, then their answers."""
    console = Console(width=110, force_terminal=False, markup=False, emoji=False)
    with console.capture() as captured:
        models = [Column(each["model"], justify="right", overflow="fold") for each in rows]
        numbers = Table(Column(), *models, title="Held-out data", title_justify="left")
        for key, (label, form) in ROWS.items():
            if any(each.get(key) is not None for each in rows):
                numbers.add_row(label, *(written(each.get(key), form) for each in rows))
        for task, metric in dict.fromkeys((t, m) for each in rows for t, f in each.get("tasks", {}).items() for m in f):
            for label, key in ((f"{task} {metric}", "tasks"), ("  the reference's", "reference_tasks")):
                numbers.add_row(label, *(written(each.get(key, {}).get(task, {}).get(metric), ".4f") for each in rows))
        numbers.add_section()
        numbers.add_row("reference", *(each["reference"] for each in rows))
        console.print(numbers)
        for each in rows:
            for shown in each["generations"]:
                sides = [Column(name, ratio=1, overflow="fold") for name in (each["model"], "reference")]
                title = f"“{shown['prompt']}”"
                grid = Table(*sides, title=title, title_justify="left", show_lines=True, width=110)
                grid.add_row(shown["policy"], shown["reference"])
                console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def written(value: object, form: str) -> str:
    if isinstance(value, list):
        return "–".join(format(each, form) for each in value)
    return "–" if value is None else format(value, form)
