"""Several ways from one start on one budget, scored alike: conf/pipeline/rlhf_or_dpo.yaml, docs/rlhf.md.

The preferences are cut in two by prompt: the ways and the reward model that they follow see one half, and the reward
model that judges them at the end is trained on the other.
"""

import json
import math
import time
from dataclasses import replace
from functools import partial
from statistics import fmean

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table

from preftune.config.files import write_json
from preftune.config.processes import main_process
from preftune.data.load import Data
from preftune.data.views import keys
from preftune.evaluate import evaluation, generation
from preftune.evaluate.judge import ByScore, RewardModel, Rule
from preftune.evaluate.statistics import interval
from preftune.models.load import load_model, load_tokenizer
from preftune.pipeline.rounds import HELD_OUT, SCORES, drawn, trained_in_rounds, write_rows
from preftune.pipeline.stages import PipelineError, Progress, defaults, trained, whole_model
from preftune.report.record import write_text
from preftune.report.rendering import render
from preftune.runs.work import Work
from preftune.trainers.build import load_data

TITLE = "One start, one budget"
COLUMNS = {  # of the table: what it is, and its format
    "judge_score": ("judge's reward", "+.3f"),
    "judge_win_rate": ("wins by judge", ".0%"),
    "rule_score": ("rule", ".2f"),
    "rule_win_rate": ("wins by rule", ".0%"),
    "kl": ("KL, nats per answer", ".2f"),
    "flop": ("FLOP", ".2e"),
    "seconds": ("seconds", ".0f"),
    "peak_memory_gb": ("peak GB", ".2f"),
    "models": ("models in memory", "d"),
}


def halved(progress: Progress, name: str) -> None:
    """The `halves` stage: the training pairs in two files, by prompt in turn, and the held-out ones in a third."""
    data = pairs_of(progress)
    folder, seen = progress.run / name, {}
    folder.mkdir(exist_ok=True)
    turns = [seen.setdefault(key, len(seen)) % 2 for key in keys(data.train).tolist()]
    for turn, half in enumerate("ab"):
        write_rows(folder / f"{half}.jsonl", (row for row, own in zip(data.train, turns, strict=True) if own == turn))
    write_rows(folder / HELD_OUT, data.eval_pairs)


def pairs_of(progress: Progress) -> Data:
    """The pairs of the whole pipeline. Raises PipelineError where none are held out."""
    cfg = OmegaConf.merge(progress.cfg, {"loss": {"view": "paired"}})
    data = load_data(cfg, load_tokenizer(cfg.model))
    if data.eval_pairs is None:
        raise PipelineError("pipeline=rlhf_or_dpo compares on held-out pairs: data.eval_split or data.eval_fraction")
    return data


def branch(progress: Progress, name: str) -> None:
    """A stage from the common start: on its half of the pairs, within the budget less what its reward model took."""
    settings, halves = progress.cfg.pipeline.ways, progress.run / "halves"
    half = "b" if name == settings.judge else "a"
    own = {"path": str(halves / f"{half}.jsonl"), "eval_split": str(halves / HELD_OUT), "columns": {}, "max_rows": None}
    charged = progress.summaries[settings.reward]["flop"] if name in settings.rewarded else 0.0
    budget = math.inf if name in (settings.reward, settings.judge) else float(settings.flop) - charged
    if budget <= 0:
        raise PipelineError(f"pipeline.ways.flop={float(settings.flop):g}: the reward model alone took more; raise it")
    cfg = OmegaConf.merge(progress.cfg, {"data": own, "flop_budget": budget})
    start = progress.run / settings.start / "model"
    within = replace(progress, cfg=cfg, summaries={}, result=start)
    (trained_in_rounds if name == "rounds" else trained)(within, name)
    progress.summaries |= within.summaries


def compared(progress: Progress, name: str) -> None:
    """The `compare` stage: every way and best-of-n under the judge and a rule, as a table, JSON and a page."""
    cfg, run, settings = progress.cfg, progress.run, progress.cfg.pipeline.ways
    judge, rule = RewardModel(str(run / settings.judge)), Rule(settings.rule, "pipeline.ways.rule")
    start = whole_model(run / settings.start / "model", run / f"{settings.start}-model", cfg.model.dtype, cfg.lora).path
    stages = {way: of_way(progress, way) for way in settings.ways}
    own = {
        "models": [str(run / made[-1]) for made in stages.values()],
        "reference": start,
        "generations": settings.prompts,
        "output": str(run / "evaluation.json"),
        **{key: settings[key] for key in ("kl_prompts", "max_new_tokens")},
    }
    evaluation.run(OmegaConf.merge(defaults("evaluate"), own))
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    prompts = generation.prompts(pairs_of(progress).eval_pairs, settings.prompts)
    theirs = [each["reference"] for each in found[0]["generations"]]

    def scored(way: str, answers: list[str]) -> dict:
        all_of = (prompts, answers, theirs)
        return {"way": way} | under("judge", judge, *all_of) | under("rule", rule, *all_of)

    rows = [scored(settings.start, theirs) | {"kl": 0.0, "models": 1}]
    for (way, made), each in zip(stages.items(), found, strict=True):
        answers = [one["policy"] for one in each["generations"]]
        rows.append(scored(way, answers) | {"kl": each["kl"]} | costs(progress, way, made))
    answers, cost = best_of(progress, start, prompts)
    rows.append(scored(f"best of {settings.best_of}", answers) | cost)
    if main_process():
        write_json(run / "ways.json", rows)
        labels, shown = [label for label, _ in COLUMNS.values()], [(each, cells(each)) for each in rows]
        values = {"title": TITLE, "kicker": [run.name], "rows": shown, "labels": labels}
        write_text(run / "ways.html", render("ways.html.jinja", **values))
    print(table(rows))


def under(name: str, scorer: ByScore, prompts: list, answers: list[str], theirs: list[str]) -> dict:
    """What a scorer gives answers on average, and how often it prefers them to the start's, with Wilson's interval."""
    score = fmean(scorer.score(list(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True))
    rate = fmean(scorer(list(prompt), *both) for prompt, *both in zip(prompts, answers, theirs, strict=True))
    around = list(interval(rate, len(prompts)))
    return {f"{name}_score": score, f"{name}_win_rate": rate, f"{name}_win_rate_ci": around}


def of_way(progress: Progress, way: str) -> list[str]:
    """The training stages of a way, in order. Raises PipelineError where it has not run."""
    if way != "rounds" and way not in progress.summaries:
        raise PipelineError(f"pipeline.ways.ways: {way} has not run; there are {', '.join(progress.summaries)}")
    return [way] if way != "rounds" else [name for name in progress.summaries if name.startswith("round-")]


def costs(progress: Progress, way: str, stages: list[str]) -> dict:
    """What a way took: FLOP and seconds, its drawing and its reward model's training among them; peak memory."""
    made = [progress.summaries[stage] for stage in stages]
    drawn_for = [progress.run / f"{stage}-pairs" / SCORES for stage in stages]
    made += [json.loads(path.read_text(encoding="utf-8")) for path in drawn_for if path.exists()]
    rewarded = way in progress.cfg.pipeline.ways.rewarded
    made += [progress.summaries[progress.cfg.pipeline.ways.reward]] if rewarded else []
    return {
        "flop": sum(each["flop"] for each in made),
        "seconds": sum(each["seconds"] for each in made),
        "peak_memory_gb": max(each.get("peak_memory_gb", 0.0) for each in made),
        "models": 2 if rewarded else 1,  # the reference is the policy with its adapter off
    }


def best_of(progress: Progress, start: str, prompts: list[generation.Prompt]) -> tuple[list[str], dict]:
    """The best of several answers of the start to each prompt, by the reward model that the ways follow; its cost.

    KL is at most log n − (n − 1)/n (Beirami et al. 2024, arXiv:2401.01879). Its FLOP are those of these answers: it
    trains nothing but the reward model, and draws n answers wherever it is used.
    """
    cfg, settings, began = progress.cfg, progress.cfg.pipeline.ways, time.time()
    section = OmegaConf.merge(cfg.model, {"path": start, "revision": None})
    model = load_model(section, OmegaConf.create({}), bool(cfg.hardware.use_cpu))
    reward = RewardModel(str(progress.run / settings.reward))
    with Work() as work:
        drawn_for = OmegaConf.create({"answers": settings.best_of, "max_new_tokens": settings.max_new_tokens})
        several = drawn(model, load_tokenizer(section), prompts, drawn_for, cfg)
        both = zip(prompts, several, strict=True)
        best = [max(answers, key=partial(reward.score, list(prompt))) for prompt, answers in both]
    bound = math.log(settings.best_of) - (settings.best_of - 1) / settings.best_of
    return best, {"kl": bound, "flop": work.flop, "seconds": time.time() - began, "models": 2}


def cells(row: dict) -> list[str]:
    """A row of the table as text."""
    shown = []
    for key, (_, form) in COLUMNS.items():
        around = " ({:.0%}–{:.0%})".format(*row[f"{key}_ci"]) if f"{key}_ci" in row else ""
        shown.append("–" if row.get(key) is None else format(row[key], form) + around)
    return shown


def table(rows: list[dict]) -> str:
    """The ways side by side in the terminal."""
    console = Console(width=140, force_terminal=False, markup=False, emoji=False)
    labels = [Column(label, justify="right") for label, _ in COLUMNS.values()]
    shown = Table("", *labels, title=TITLE, title_justify="left")
    for each in rows:
        shown.add_row(each["way"], *cells(each))
    with console.capture() as captured:
        console.print(shown)
    return captured.get()
