"""Scores that are kept: of the same weights alone, proved before they are believed, and what fresh ones would be."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.data.load import load
from preftune.evaluate import kept, pairs
from preftune.evaluate.kept import Scorer
from preftune.evaluate.pairs import PairScores
from preftune.fastpath.reference_identity import model_identity
from preftune.models import embedded
from preftune.runs.training import train

LORA = LoraConfig(r=4, target_modules=["q_proj"])


@pytest.fixture
def tiny():
    """The tiny model, its tokenizer and four pairs."""
    folder = embedded.folder("embedded://tiny")
    said = [[[{"role": "assistant", "content": text}] for text in both] for both in (("A", "B b"), ("C c c", "D"))] * 2
    asked = [[{"role": "user", "content": text}] for text in ("Which?", "What?", "Who?", "Why is it?")]
    rows = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, (a, b) in zip(asked, said, strict=True)]
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), Dataset.from_list(rows)


@pytest.fixture
def scored(monkeypatch):
    """How many pairs each call has scored."""
    counts, log_probs = [], pairs.log_probs

    def counted(model, tokenizer, rows, *given):
        counts.append(len(rows))
        return log_probs(model, tokenizer, rows, *given)

    monkeypatch.setattr(kept, "log_probs", counted)
    return counts


def equal(first: PairScores, second: PairScores) -> None:
    for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-6, atol=1e-5)


def test_the_same_weights_are_scored_once_whatever_holds_them(tiny, scored, tmp_path):
    model, tokenizer, rows = tiny
    scorer = Scorer(tokenizer, 256, False, root=str(tmp_path))
    fresh = Scorer(tokenizer, 256, False, keeps=False).score(model, rows)
    for expected in (4, 1):  # the second time one pair, as a proof
        equal(scorer.score(model, rows), fresh)
        assert scored[-1] == expected
    scorer.score(model, rows.select([0, 2]))
    assert scored[-1] == 1
    replace(scorer, max_length=8).score(model, rows)
    assert scored[-1] == 4  # rows that are cut are others
    replace(scorer, bf16=True).score(model, rows)
    assert scored[-1] == 4


def test_an_adapter_is_its_base_until_it_has_learned_and_where_it_is_off(tiny, scored, tmp_path):
    model, tokenizer, rows = tiny
    scorer = Scorer(tokenizer, 256, False, root=str(tmp_path))
    before = scorer.score(model, rows)
    base = model_identity(model, "no")[0]
    adapted = get_peft_model(model, LORA)
    assert model_identity(adapted, "no")[0] == base
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight += 0.1
    assert model_identity(adapted, "no")[0] != base
    after = scorer.score(adapted, rows)
    assert scored == [4, 4] and (after.chosen - before.chosen).abs().max() > 1e-3
    with adapted.disable_adapter():
        equal(scorer.score(adapted, rows), before)
    assert scored == [4, 4, 1]


AT_ONCE = [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}]


@pytest.mark.parametrize("change", AT_ONCE)
def test_an_adapter_that_may_differ_from_its_base_at_once_is_itself(tiny, change):
    model = tiny[0]
    base = model_identity(model, "no")[0]
    assert model_identity(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **change)), "no")[0] != base


def test_numbers_that_are_not_the_models_are_not_believed(tiny, scored, tmp_path):
    model, tokenizer, rows = tiny
    sides = [kept.sequences(row, 256) for row in kept.tokenized(rows, kept.PAIRS, tokenizer)]
    wrong = {kept.row_key(ids, start): -1.0 for row in sides for ids, start in row}
    scorer = Scorer(tokenizer, 256, False, root=str(tmp_path))
    found = scorer.score(model, rows, just_now=wrong)
    assert scored == [1, 4]
    equal(found, Scorer(tokenizer, 256, False, keeps=False).score(model, rows))
    equal(scorer.score(model, rows), found)


def test_what_is_no_number_is_not_kept(tiny, scored, tmp_path):
    model, tokenizer, rows = tiny
    scorer = Scorer(tokenizer, 256, False, root=str(tmp_path))
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    assert scorer.score(model, rows).chosen.isnan().all()
    scorer.score(model, rows)
    assert scored == [4, 4]


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_what_a_run_says_of_its_result_is_what_the_saved_model_says(composed, recipe, adapter):
    cfg = composed(recipe, f"lora={adapter}", "train.learning_rate=0.02")
    told = train(cfg)["snapshots"]
    kind = AutoPeftModelForCausalLM if adapter == "lora" else AutoModelForCausalLM
    model, tokenizer = (each.from_pretrained(f"{cfg.output_dir}/model") for each in (kind, AutoTokenizer))
    held = load(cfg.data, view=cfg.loss.view, tokenizer=tokenizer, max_length=1024, seed=cfg.train.seed).eval_pairs
    fresh = Scorer(tokenizer, 1024, False, keeps=False).score(model, held).summary()
    for name in ("perplexity", "logps_chosen", "logps_rejected"):
        assert told[1][name] == pytest.approx(fresh[name], rel=1e-5)
        assert told[0][name] != pytest.approx(fresh[name], rel=1e-4)
    assert json.loads(json.dumps(told[1]["by_length"]))[0]["pairs"] == fresh["by_length"][0]["pairs"]
