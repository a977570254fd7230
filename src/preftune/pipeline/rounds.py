"""Iterative preference training: sample answers from the current policy, score them, pair them, train, and again.

Xu et al. 2023 (arXiv:2312.16682), Yuan et al. 2024 (arXiv:2401.10020), Dong et al. 2024 (arXiv:2405.07863). Each
round is two stages with lineage: <run>/round-N-pairs (answers.jsonl, pairs.jsonl) and <run>/round-N.
"""

import contextlib
import json
import time
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from statistics import fmean

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from preftune.config.files import write_json, write_text
from preftune.config.processes import main_process
from preftune.data.load import Data, load
from preftune.data.views import ASKED
from preftune.evaluate import generation
from preftune.evaluate.scoring import Scorer, ScoringError, scorer
from preftune.models.load import load_model, load_tokenizer, quiet
from preftune.pipeline import lineage
from preftune.pipeline.stages import Progress, model_at_hand, model_section, needed, trained
from preftune.runs.work import Work
from preftune.trainers.build import load_data

ANSWERS, PAIRS, HELD_OUT, SCORES = "answers.jsonl", "pairs.jsonl", "held_out.jsonl", "scores.json"


def trained_in_rounds(progress: Progress, name: str) -> None:
    """The `rounds` stage: `pipeline.rounds.number` times sampling and training, then the last score, if wanted."""
    cfg = progress.cfg
    settings = cfg.pipeline.rounds
    progress.model = model_at_hand(progress)
    first, scores = progress.model, []
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(OmegaConf.merge(cfg, {"loss": {"view": "paired"}}), tokenizer)
    held_out = progress.run / HELD_OUT
    write_rows(held_out, data.eval_pairs)
    for number in range(1, settings.number + 1):
        sampled = sample(progress, data, tokenizer, f"round-{number}-pairs", number)
        scores.append(sampled["score"])
        counts = f"{sampled['pairs']} pairs of {sampled['prompts']} prompts"
        print(f"round {number}: score {sampled['score']:.4f} before, {counts}", flush=True)
        own = {"path": str(progress.run / f"round-{number}-pairs" / PAIRS), "eval_split": str(held_out), "columns": {}}
        own["on_bad_rows"] = "skip"  # what a model says may hold anything; the rows are listed in skipped_rows.jsonl
        own |= {"max_rows": None, "sft_path": None, "sft_fraction": 0.0}
        changes = {"data": OmegaConf.to_container(OmegaConf.merge(cfg.data, own), resolve=True)}
        if cfg.flop_budget:  # an equal share of it for each round, drawing included
            changes["flop_budget"] = max(cfg.flop_budget / settings.number - (sampled.get("flop") or 0), 1.0)
        if settings.reference == "fixed" and number > 1:
            changes["model"] = {**model_section(progress), "reference": first.path}
        trained(progress, f"round-{number}", **changes)
        progress.model = model_at_hand(progress)
    if settings.score_last:
        scores.append(sample(progress, data, tokenizer, "last-answers", settings.number + 1)["score"])
    if main_process():
        write_json(progress.run / SCORES, scores)
    print("scores of the policies in turn: " + ", ".join(f"{score:.4f}" for score in scores))


def sample(progress: Progress, data: Data, tokenizer: PreTrainedTokenizerBase, name: str, number: int) -> dict:
    """Several answers of the policy at hand to each prompt, scored, and the pairs that they make; kept like any stage.

    Returns {score, pairs, prompts, flop, seconds}: `score` is the mean over all answers; FLOP within a budget alone.
    """
    cfg, settings, folder = progress.cfg, progress.cfg.pipeline.rounds, progress.run / name
    wanted = OmegaConf.to_container(settings, resolve=True)
    made_of = {"policy": progress.model.digest, "data": data.fingerprint, "seed": cfg.train.seed + number, **wanted}
    if not needed(folder, made_of):
        return json.loads((folder / SCORES).read_text(encoding="utf-8"))
    score = scorer(settings, "pipeline.rounds")
    model = load_model(OmegaConf.create(model_section(progress)), OmegaConf.create({}), cfg.hardware.use_cpu)
    each_once = {json.dumps([prompt, prompt.options]): prompt for prompt in generation.prompts(data.train)}
    prompts, started, work = list(each_once.values())[: settings.prompts], time.time(), Work()
    with work if cfg.flop_budget else contextlib.nullcontext():
        rows = scored(prompts, drawn(model, tokenizer, prompts, settings, cfg, number), score)
    pairs = best_pairs(rows, settings)
    if not pairs and number <= settings.number:
        raise nothing_to_learn(name, "pipeline.rounds")
    found = {
        "score": fmean(each for row in rows for each in row["scores"]),
        "pairs": len(pairs),
        "prompts": len(rows),
        "flop": work.flop or None,
        "seconds": round(time.time() - started, 1),
    }
    if main_process():
        folder.mkdir(exist_ok=True)
        write_rows(folder / ANSWERS, rows)
        write_rows(folder / PAIRS, pairs)
        write_json(folder / SCORES, found)
        lineage.record(folder, made_of, lineage.Artifact(str(folder), lineage.content(str(folder / PAIRS))))
    return found


def make_pairs(cfg: DictConfig) -> str:
    """recipes.make_pairs: pairs out of prompts and a scorer, into <output_dir>; returns what was made, and what next.

    Raises ScoringError where no pair comes of them, and what loading data and model raises.
    """
    quiet()
    settings, folder, score = cfg.pairs, Path(cfg.output_dir), scorer(cfg.pairs, "pairs")
    if (folder / PAIRS).exists():
        raise ScoringError(f"output_dir={folder} holds pairs already, and nothing is overwritten: output_dir=ANOTHER")
    tokenizer = load_tokenizer(cfg.model)
    data = load(cfg.data, view=ASKED, tokenizer=tokenizer, max_length=cfg.train.max_length, seed=cfg.train.seed)
    model = load_model(cfg.model, cfg.lora if "quantization" in cfg.lora else {}, bool(cfg.hardware.use_cpu))
    prompts = generation.prompts(data.train, settings.prompts)
    rows = scored(prompts, drawn(model, tokenizer, prompts, settings, cfg), score)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / ANSWERS, rows)
    pairs = best_pairs(rows, settings)
    if not pairs:
        raise nothing_to_learn(str(folder / ANSWERS), "pairs")
    write_rows(folder / PAIRS, pairs)
    mean = fmean(each for row in rows for each in row["scores"])
    return (
        f"{len(pairs)} pairs of {len(rows)} prompts, {settings.answers} answers each, mean score {mean:.4f}\n"
        f"Next  python -m recipes.dpo data=file data.path={folder / PAIRS}"
    )


def drawn(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[generation.Prompt],
    settings: DictConfig,
    cfg: DictConfig,
    number: int = 0,
) -> list[list[str]]:
    """`settings.answers` answers to each prompt, drawn from the run's seed and this number."""
    asked = [prompt for prompt in prompts for _ in range(settings.answers)]
    bf16, seed = bool(cfg.hardware.bf16), cfg.train.seed + number
    rows = generation.sampled(model, tokenizer, asked, settings.max_new_tokens, bf16, seed)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for _, ids in rows]
    return [texts[start : start + settings.answers] for start in range(0, len(texts), settings.answers)]


def scored(prompts: list[generation.Prompt], answers: list[list[str]], score: Scorer) -> list[dict]:
    """{prompt, answers, scores} for each prompt, with the tools and template arguments that it has."""
    rows = []
    for prompt, texts in zip(prompts, answers, strict=True):
        given = dict(prompt.options)
        beside = {"tools": given.pop("tools", None), "chat_template_kwargs": given}
        beside = {name: value for name, value in beside.items() if value}
        rows.append({"prompt": prompt, "answers": texts, "scores": score(prompt, texts)} | beside)
    return rows


def best_pairs(rows: list[dict], settings: DictConfig) -> list[dict]:
    """The pair of each prompt that has one."""
    return [pair for row in rows if (pair := best_against_worst(row, settings.length_ratio))]


def nothing_to_learn(what: str, section: str) -> ScoringError:
    return ScoringError(
        f"{what}: no two answers to one prompt differ in score and are of similar length, so there is nothing to "
        f"learn from; raise {section}.answers or {section}.length_ratio"
    )


def best_against_worst(row: dict, length_ratio: float) -> dict | None:
    """The pair of answers with the largest difference in score of which neither is over `length_ratio` times as long.

    So the preference cannot be one for length alone. None where there is no such pair.
    """
    scored = [(score, answer) for score, answer in zip(row["scores"], row["answers"], strict=True) if answer]
    candidates = [
        (better - worse, chosen, rejected)
        for (better, chosen), (worse, rejected) in permutations(scored, 2)
        if better > worse and 1 / length_ratio <= len(chosen) / len(rejected) <= length_ratio
    ]
    if not candidates:
        return None
    _, chosen, rejected = max(candidates, key=lambda candidate: candidate[0])
    kept = {name: value for name, value in row.items() if name not in ("answers", "scores")}
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return kept | dict(zip(("chosen", "rejected"), answers, strict=True))


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object per line, in place at once."""
    if main_process():
        write_text(path, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))
