"""Scores of answers, and the pairs that they make."""

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from preftune.evaluate.scoring import ScoringError, scorer, short_answer
from preftune.pipeline.rounds import best_against_worst

ASKED = [{"role": "user", "content": "How do I boil an egg?"}]
NOTHING = {"rule": None, "reward_model": None, "judge": {}}


def settings(**given):
    return OmegaConf.create(NOTHING | given)


def longer(prompt, first, second):
    return float(len(first) > len(second))


def test_the_short_answer_rule_wants_few_words_in_one_paragraph_without_a_list():
    assert short_answer(ASKED, "Boil the egg for eight minutes.") == 1
    bad = ["", "Boil it.", "1. Boil the water, then the egg.", "Boil the water.\n\nThen the egg in it.", "egg " * 31]
    for answer in [*bad, "**Boil** the egg for eight minutes.", "- Boil the egg for eight minutes"]:
        assert short_answer(ASKED, answer) == 0, answer


def test_exactly_one_scorer_must_be_given():
    for given in ({}, {"rule": "a.b", "reward_model": "c"}):
        with pytest.raises(ScoringError, match="give one of rule, reward_model, judge"):
            scorer(settings(**given), "pairs")


def test_a_judge_scores_an_answer_by_the_share_of_the_others_that_it_beats():
    judge = {"_target_": "hydra.utils.get_method", "path": f"{__name__}.longer"}
    score = scorer(settings(judge=judge), "pairs")
    assert score(ASKED, ["aaa", "a", "aa"]) == pytest.approx([1, 0, 0.5])


def test_a_reward_model_scores_the_dialogue_by_its_logit(tmp_path):
    letters = {chr(code): code - 32 for code in range(32, 127)}
    inner = Tokenizer(models.WordLevel(letters, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="~", eos_token="}")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_labels=1, pad_token_id=letters["~"])
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    score = scorer(settings(reward_model=str(tmp_path)), "pairs")
    ids = tokenizer(ASKED[0]["content"] + "Eight minutes.", return_tensors="pt", add_special_tokens=False)
    wanted = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits.item()
    assert score(ASKED, ["Eight minutes.", "No."])[0] == pytest.approx(wanted, abs=1e-6)


def test_the_best_is_paired_with_the_worst_of_similar_length():
    row = {"prompt": ASKED, "answers": ["x" * 10, "y" * 11, "z" * 90, ""], "scores": [0.9, 0.4, 0.1, 0.0]}
    pair = best_against_worst(row, 2.0)
    assert pair["chosen"][0]["content"] == "x" * 10
    assert pair["rejected"][0]["content"] == "y" * 11  # z is worse, and nine times as long
    assert best_against_worst({**row, "scores": [0.5] * 4}, 2.0) is None


def first_place(prompt, first, second):
    return 1.0


def test_a_judge_that_prefers_a_place_scores_all_answers_alike():
    judge = {"_target_": "hydra.utils.get_method", "path": f"{__name__}.first_place"}
    assert scorer(settings(judge=judge), "pairs")([], ["one", "two", "three"]) == [0.5, 0.5, 0.5]
