"""The forked form: prompts once, their cache copied for both answers, gives what TRL's forward gives."""

import pytest
import torch
from equality import assert_same, batch_of, close, outcome
from peft import LoraConfig
from tiny_models import FAMILIES, VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.models import shrunk
from preftune.fastpath import trainer_class
from preftune.fastpath.checkpointing import keep_products

LORA = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
FORKED = {
    "position biases": "bloom",
    "linear attention": "qwen3_next",
    "linear attention in a multimodal shell": "qwen3_5",
    "convolution": "lfm3",
    "state space": "nemotron_h",
    "two kinds of state in a layer": "zaya",
    "indexed attention": "deepseek_v32",
    "masks of its own": "gpt_neo",
}
PACKED = {"router": "qwen3_moe", "sinks and router": "gpt_oss", "multimodal shell": "gemma3", "KV sharing": "gemma4"}


def random_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A small model of an architecture, its weights large enough for attention and routing to matter."""
    torch.manual_seed(seed)
    config = shrunk(kind, len(VOCABULARY), more=False)
    for part in (config, config.get_text_config()):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, 1, 1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", FORKED.values(), ids=FORKED)
def test_a_model_that_cannot_be_packed_is_forked_and_equals_trl(kind, checkpointing, trainers, pairs):
    model = random_model(kind)
    made = trainers(
        DPOTrainer, DPOConfig, model, pairs, ref_model=random_model(kind, seed=1), gradient_checkpointing=checkpointing
    )
    assert made[1].form == "forked"
    assert_same(*made, gradients_to=1e-3)  # gradients of decay rates are small differences of large numbers


@pytest.mark.parametrize("kind", PACKED.values(), ids=PACKED)
def test_experts_and_text_models_within_others_are_packed_and_equal_trl(kind, trainers, pairs):
    made = trainers(DPOTrainer, DPOConfig, random_model(kind), pairs, ref_model=random_model(kind, seed=1))
    assert made[1].form == "packed"
    assert_same(*made, gradients_to=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_forked_and_equals_trl(family, trainers, pairs):
    """Windows shorter than a prompt among them."""
    models = {"model": tiny_model(family), "ref_model": tiny_model(family, seed=1)}
    assert_same(*trainers(DPOTrainer, DPOConfig, rows=pairs, form="forked", **models))


@pytest.mark.parametrize("form", ["packed", "forked"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_either_form_can_be_asked_for(form, checkpointing, trainers, pairs):
    plain, ours = trainers(
        DPOTrainer,
        DPOConfig,
        tiny_model("llama"),
        pairs,
        peft_config=LORA,
        gradient_checkpointing=checkpointing,
        form=form,
    )
    assert ours.form == form
    assert_same(plain, ours)


def test_the_routers_loss_counts_each_rows_tokens_in_either_form(trainers, pairs):
    found = {}
    for form in ("packed", "forked"):
        made = trainers(
            DPOTrainer,
            DPOConfig,
            random_model("qwen3_moe"),
            pairs,
            ref_model=random_model("qwen3_moe", seed=1),
            form=form,
        )
        assert_same(*made, gradients_to=1e-4)
        found[form] = outcome(made[1], batch_of(made[0]))[1]["aux_loss"]
    assert found["packed"] == pytest.approx(found["forked"], rel=1e-6)


def test_a_routers_loss_reaches_odds_too(trainers, pairs):
    model = random_model("qwen3_moe")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    assert_same(
        *trainers(ORPOTrainer, ORPOConfig, model, pairs, disable_dropout=True),
        skip=("logits/chosen", "logits/rejected"),
    )


def test_labelled_rows_run_as_they_are(trainers, pairs):
    rows = [
        {"prompt": each["prompt"], "completion": each["chosen"], "label": bool(n % 2)} for n, each in enumerate(pairs)
    ]
    made = trainers(
        KTOTrainer, KTOConfig, random_model("qwen3_next"), rows, ref_model=random_model("qwen3_next", seed=1)
    )
    assert made[1].form == "forked"
    assert_same(*made, gradients_to=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_next", "bloom", "qwen3_moe"])
def test_labelled_rows_with_one_prompt_share_it_however_many(kind, trainers, pairs):
    answers = ["No.", "Because it is so.", "Yes", "Who knows, maybe it is."]
    rows = [{"prompt": pairs[0]["prompt"], "completion": each, "label": len(each) > 3} for each in answers[:3]]
    rows += [{"prompt": pairs[1]["prompt"], "completion": each, "label": len(each) > 3} for each in answers]
    rows.append({"prompt": pairs[2]["prompt"], "completion": answers[0], "label": True})
    given = {"ref_model": random_model(kind, seed=1), "per_device_train_batch_size": 8}
    plain, ours = trainers(KTOTrainer, KTOConfig, random_model(kind), rows, **given)
    tokens = []
    forward = ours.model.forward
    ours.model.forward = lambda *a, **k: (forward(*a, **k), tokens.append(ours.model.tokens_run))[0]
    assert_same(plain, ours, gradients_to=1e-3)
    assert tokens[-1][1] - tokens[-1][0] < batch_of(plain)["attention_mask"].sum() - 8


def test_equal_answers_and_rows_that_begin_apart_are_forked(trainers):
    rows = [{"prompt": "Hm", "chosen": "Yes", "rejected": "Yes"}, {"prompt": "", "chosen": "A", "rejected": "Bee"}]
    for given in (rows[:1], rows):
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
        models = {"model": tiny_model("llama"), "ref_model": tiny_model("llama", seed=1)}
        assert_same(*trainers(DPOTrainer, DPOConfig, rows=given, form="forked", **models, **losses))


def test_selective_checkpoints_keep_a_cache(trainers, pairs):
    made = trainers(
        DPOTrainer, DPOConfig, random_model("qwen3_next"), pairs, peft_config=LORA, gradient_checkpointing=True
    )
    keep_products(made[1].model)
    assert_same(*made, gradients_to=1e-3)


def test_selective_checkpoints_cast_what_runs_twice_as_the_backward_does(trainers, pairs):
    arguments = {"peft_config": LORA, "bf16": True}
    plain = trainers(DPOTrainer, DPOConfig, random_model("qwen3_next"), pairs, **arguments)[1]
    more = arguments | {"gradient_checkpointing": True}
    ours = trainers(DPOTrainer, DPOConfig, random_model("qwen3_next"), pairs, **more)[1]
    keep_products(ours.model)
    wanted, found = (outcome(trainer, batch_of(trainer)) for trainer in (plain, ours))
    assert ours.form == "forked" and found[0] == wanted[0]


def test_a_form_that_does_not_apply_is_refused(trainers, pairs):
    with pytest.raises(ValueError, match="fastpath.form=packed does not apply: .*linear_attention"):
        trainers(DPOTrainer, DPOConfig, random_model("qwen3_next"), pairs, peft_config=LORA, form="packed")


def test_off_leaves_trls_forward(trainers, pairs, capsys):
    plain, ours = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, peft_config=LORA, form="off")
    assert ours.form is None and "Fast forward" not in capsys.readouterr().out
    assert close(outcome(ours, batch_of(plain))[0], outcome(plain, batch_of(plain))[0])
    assert trainer_class(DPOTrainer, form="off").form == "off"
