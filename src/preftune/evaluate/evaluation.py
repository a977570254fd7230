"""recipes.evaluate: every model of a list on its held-out pairs, as one table or as JSON."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import UserError
from preftune.config.files import write_json
from preftune.data.findings import DataError, Findings
from preftune.data.load import load as load_data
from preftune.data.shapes import DEMONSTRATIONS, PAIRS
from preftune.data.token_checks import answered, sequences, tokenized
from preftune.data.views import KINDS
from preftune.evaluate import generation, judge, lm_tasks, pairs, subjects
from preftune.evaluate.generation import divergence, sampled
from preftune.evaluate.judge import Judge, RewardModel, Rule, win_rate
from preftune.evaluate.kept import Scorer
from preftune.evaluate.lm_tasks import results
from preftune.evaluate.pairs import PairScores, implicit_rewards, log_probs, perplexity
from preftune.evaluate.statistics import at_equal_length, interval
from preftune.evaluate.subjects import Loaded, Subject, find
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
    max_length: int | None
    cache: str | None  # the run's own folder of reference log-probs, where scores are kept


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
    seen: dict[tuple, object] = {}
    rows = [
        reward_row(each, first or each, cfg) if each.scores_texts else row(each, first or each, cfg, decide, seen)
        for each in found
    ]
    if cfg.output is not None:
        write_json(Path(cfg.output), rows)
    return json.dumps(rows, indent=2, ensure_ascii=False) if cfg.format == "json" else table(rows)


def row(subject: Subject, first: Subject, cfg: DictConfig, decide: Judge | None, seen: dict) -> dict:
    """The figures of one model; what its own run does not say (β, data, precision) is the first run's.

    `seen` keeps what is measured of a reference for the other models of the table. Raises what `run` raises.
    """
    teacher = subject if subject.cfg is not None else first
    bf16 = teacher.bf16 if cfg.bf16 is None else cfg.bf16
    beta = cfg.beta or teacher.beta or 0.1  # TRL's default, where neither a run nor the user names one
    loaded = subjects.load(subject, cfg.reference)
    data = held_out(cfg, teacher, loaded.tokenizer)
    against = (cfg.reference or subject.start.path, subject.start.revision, data.pairs._fingerprint, bf16)

    def of_reference(measure: Callable) -> object:
        if (measure, against) not in seen:
            with loaded.reference() as other:
                seen[measure, against] = measure(other, loaded.tokenizer, data, cfg, bf16)
        return seen[measure, against]

    policy = scores(loaded.model, loaded.tokenizer, data, cfg, bf16)
    reference = of_reference(scores)
    return {
        "model": subject.name,
        "reference": cfg.reference or subject.start.path,
        "beta": beta,
        **preferences(policy, reference, beta),
        **drift(loaded, data, cfg, bf16),
        "perplexity": sft_perplexity(loaded.model, loaded.tokenizer, data, cfg, bf16) or policy.perplexity(),
        "reference_perplexity": of_reference(sft_perplexity) or reference.perplexity(),
        **judged(
            answers(loaded.model, loaded.tokenizer, data, cfg, bf16),
            of_reference(answers),
            cfg,
            decide,
            loaded.tokenizer,
        ),
        "tasks": benchmarks(loaded.model, loaded.tokenizer, data, cfg, bf16),
        "reference_tasks": of_reference(benchmarks),
    }


def reward_row(subject: Subject, first: Subject, cfg: DictConfig) -> dict:
    """The figures of a reward model: how often it gives the chosen answer the higher reward, and by how much."""
    scorer = RewardModel(subject.weights)
    data = held_out(cfg, subject if subject.cfg is not None else first, scorer.tokenizer)
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
        settings = OmegaConf.merge(subjects.base().data, teacher.cfg.data, {"skipped_file": None})
        settings.eval_sets = {}
        view, seed = teacher.cfg.loss.view, teacher.cfg.train.seed
        try:
            found = load_data(settings, view=view, tokenizer=tokenizer, max_length=length, seed=seed).eval_pairs
        except DataError as error:
            if not any(each.code == "images" for each in error.findings):
                raise
            raise EvaluationError(
                f"{teacher.name} holds out rows with images, which are not evaluated here: TRL's own figures of them "
                "are in its metrics.jsonl; eval_data=FILE names pairs of text"
            ) from None
    if found is None or not len(found):
        raise EvaluationError(f"{teacher.name} held no pairs out (data.eval_split, data.eval_fraction): eval_data=FILE")
    cache = None if teacher.cfg is None else OmegaConf.select(teacher.cfg, "fastpath.reference_cache")
    return HeldOut(found.select(range(min(len(found), cfg.max_pairs or len(found)))), shown, length, cache)


def whole_set(path: object, view: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """All rows of a data set (anything that data.path takes) in the form of a view. Raises DataError."""
    settings = OmegaConf.merge(subjects.base().data, {"path": path, "eval_fraction": 0.0, "skipped_file": None})
    rows = load_data(settings, view=view, tokenizer=tokenizer, max_length=max_length, seed=0).train
    return answered(rows, KINDS[view], tokenizer, max_length, Findings())


def preferences(policy: PairScores, reference: PairScores, beta: float) -> dict:
    """How the implicit rewards rank the pairs, and where the log-probs went; log-ratios in nats per token."""
    margins = pairs.margins(policy, reference, beta)
    right, rewards = (margins > 0).double(), implicit_rewards(policy, reference, beta)
    ratios = {side: getattr(policy, side) - getattr(reference, side) for side in ("chosen", "rejected")}
    return {
        "pairs": len(margins),
        "accuracy": rewards["reward_accuracy"],
        "accuracy_ci": list(interval(right.mean().item(), len(right))),
        "length_controlled_accuracy": at_equal_length(right, policy.chosen_tokens - policy.rejected_tokens),
        "logp_accuracy": policy.logp_accuracy(),
        "margin": rewards["reward_margin"],
        "logratio_chosen_per_token": (ratios["chosen"].sum() / policy.chosen_tokens.sum()).item(),
        "logratio_rejected_per_token": (ratios["rejected"].sum() / policy.rejected_tokens.sum()).item(),
        "by_length": rewards["by_length"],
    }


def drift(loaded: Loaded, data: HeldOut, cfg: DictConfig, bf16: bool) -> dict:
    """KL(policy ‖ reference) by sampling, in nats; null where no prompts are wanted for it."""
    if not cfg.kl_prompts:
        return {"kl": None, "kl_error": None, "kl_per_token": None, "kl_tokens": None}
    prompts = generation.prompts(data.pairs, cfg.kl_prompts)
    drawn = sampled(loaded.model, loaded.tokenizer, prompts, cfg.max_new_tokens, bf16, cfg.seed)
    found = divergence(loaded.model, loaded.reference, drawn, bf16)
    return {"kl": found.answer, "kl_error": found.error, "kl_per_token": found.token, "kl_tokens": found.tokens}


def scores(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: HeldOut, cfg: DictConfig, bf16: bool
) -> PairScores:
    """The log-probs that a model gives the held-out pairs."""
    return Scorer(tokenizer, data.max_length, bf16, root=data.cache).score(model, data.pairs)


def sft_perplexity(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: HeldOut, cfg: DictConfig, bf16: bool
) -> float | None:
    """Perplexity of the SFT data; what it rises by was forgotten. None where there is none."""
    if data.demonstrations is None:
        return None
    rows = [sequences(row, data.max_length) for row in tokenized(data.demonstrations, DEMONSTRATIONS, tokenizer)]
    return perplexity(*log_probs(model, tokenizer, rows, bf16))


def answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: HeldOut, cfg: DictConfig, bf16: bool
) -> list[tuple[list[dict], str]]:
    """(prompt, greedy answer) of a model for the first prompts, as many as are shown or judged."""
    wanted = max(cfg.generations, cfg.judged_prompts if cfg.judge else 0)
    prompts = generation.prompts(data.pairs, wanted) if wanted else []
    return list(zip(prompts, generation.answers(model, tokenizer, prompts, cfg.max_new_tokens, bf16), strict=True))


def judged(mine: list, theirs: list, cfg: DictConfig, decide: Judge | None, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Answers of policy and reference side by side, and how often the judge prefers the policy's."""
    both = [(prompt, answer, other) for (prompt, answer), (_, other) in zip(mine, theirs, strict=True)]
    shown = [{"prompt": p[-1]["content"], "policy": a, "reference": b} for p, a, b in both[: cfg.generations]]
    asked = both[: cfg.judged_prompts]
    rate = win_rate(decide, asked, tokenizer) if decide else {}
    scored = rule_scores(decide, asked) if isinstance(decide, (Rule, RewardModel)) else {}
    return rate | scored | {"generations": shown}


def rule_scores(rule: Rule | RewardModel, answered: list[tuple[list[dict], str, str]]) -> dict:
    """The mean of a rule or reward over the answers of policy and reference; of a share with Wilson's interval."""
    found: dict[str, float | list[float]] = {}
    for place, name in ((1, "rule_score"), (2, "reference_rule_score")):
        scores = [rule.score(row[0], row[place]) for row in answered]
        found[name] = mean = fmean(scores)
        if all(0 <= score <= 1 for score in scores):
            found[f"{name}_ci"] = list(interval(mean, len(scores)))
    return found


def benchmarks(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: HeldOut, cfg: DictConfig, bf16: bool
) -> dict:
    """The results of lm-eval's tasks for a model; empty where none is wanted."""
    return results(model, tokenizer, list(cfg.tasks), cfg.tasks_limit, cfg.tasks_path) if cfg.tasks else {}


def table(rows: list[dict]) -> str:
    """The models side by side, then their answers."""
    console = Console(width=110, force_terminal=False)
    with console.capture() as captured:
        numbers = Table(title="Held-out data", title_justify="left")
        numbers.add_column()
        for each in rows:
            numbers.add_column(each["model"], justify="right", overflow="fold")
        for key, (label, form) in ROWS.items():
            if any(each.get(key) is not None for each in rows):
                numbers.add_row(label, *(written(each.get(key), form) for each in rows))
        for task, metric in dict.fromkeys((t, m) for each in rows for t, f in each.get("tasks", {}).items() for m in f):
            for label, key in ((f"{task} {metric}", "tasks"), ("  the reference's", "reference_tasks")):
                numbers.add_row(label, *(written(each[key][task].get(metric), ".4f") for each in rows))
        numbers.add_section()
        numbers.add_row("reference", *(each["reference"] for each in rows))
        console.print(numbers)
        for each in rows:
            for shown in each["generations"]:
                console.print(side_by_side(each["model"], shown))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def written(value: object, form: str) -> str:
    if isinstance(value, list):
        return "–".join(format(each, form) for each in value)
    return "–" if value is None else format(value, form)


def side_by_side(model: str, shown: dict) -> Table:
    """One prompt with both answers beside each other."""
    grid = Table(title=f"“{shown['prompt']}”", title_justify="left", show_lines=True, width=110)
    grid.add_column(model, ratio=1, overflow="fold")
    grid.add_column("reference", ratio=1, overflow="fold")
    grid.add_row(shown["policy"], shown["reference"])
    return grid
