"""Selective checkpointing: the gradients of plain training, almost its work, and less of its memory."""

import json
from functools import partial

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from equality import assert_same, batch_of, outcome
from peft import LoraConfig
from tiny_models import FAMILIES, SIZES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from preftune.fastpath import checkpointing
from preftune.fastpath.checkpointing import keep_products, policy
from preftune.plan.measure import Setting, footprint

LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
SELECTIVE = {"gradient_checkpointing": True}


@pytest.fixture
def all_wide(monkeypatch):
    """Tiny models' products are kept as large ones' are."""
    monkeypatch.setattr(checkpointing, "NARROW", 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_trl_without_checkpointing(family, trainers, pairs, all_wide):
    models = {"model": tiny_model(family), "ref_model": tiny_model(family, seed=1)}
    plain, ours = trainers(DPOTrainer, DPOConfig, rows=pairs, **models, **SELECTIVE)
    keep_products(ours.model)
    plain.args.gradient_checkpointing = False
    assert_same(plain, ours)


@pytest.mark.parametrize(
    ("kind", "config"), [(KTOTrainer, KTOConfig), (SFTTrainer, SFTConfig), (ORPOTrainer, ORPOConfig)]
)
def test_other_trainers_too(kind, config, trainers, pairs, all_wide):
    rows = pairs
    if kind is KTOTrainer:
        rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    if kind is SFTTrainer:
        rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    plain, ours = trainers(kind, config, tiny_model("llama"), rows, peft_config=LORA, **SELECTIVE)
    for trainer in (plain, ours):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # rows that are laid out in another way draw other numbers
    keep_products(ours.model)
    plain.args.gradient_checkpointing = False
    assert_same(plain, ours, skip=("logits/chosen", "logits/rejected"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_draws_the_same_again(family, trainers, pairs, all_wide):
    found = []
    for kept in (False, True):
        arguments = {"disable_dropout": False, "precompute_ref_log_probs": True}
        _, trainer = trainers(DPOTrainer, DPOConfig, tiny_model(family), pairs, peft_config=LORA, **arguments)
        trainer.args.gradient_checkpointing = kept
        keep_products(trainer.model)
        batch = batch_of(trainer)
        torch.manual_seed(0)
        found.append(outcome(trainer, batch)[2])
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[1][name], gradient, atol=1e-6) for name, gradient in found[0].items())


def test_experts_that_add_their_bias_in_place_are_computed_again(all_wide):
    config = CONFIG_MAPPING["gpt_oss"](**SIZES | {"hidden_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2})
    model, found = AutoModelForCausalLM.from_config(config).train(), []
    for kept in (False, True):
        if kept:
            keep_products(model)
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[1][name], gradient, atol=1e-6) for name, gradient in found[0].items())


def test_an_attention_that_drops_is_computed_again():
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    states = [torch.zeros(1, 1, 2, 4)] * 3
    assert policy(None, attention, *states) is CheckpointPolicy.MUST_SAVE
    assert policy(None, attention, *states, 0.1) is CheckpointPolicy.PREFER_RECOMPUTE
    assert policy(None, attention, *states, dropout_p=0.1) is CheckpointPolicy.PREFER_RECOMPUTE


def test_products_are_computed_once(trainers, pairs, all_wide):
    work = []
    for given in (False, True, "selective"):
        _, trainer = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, ref_model=tiny_model("llama"))
        trainer.args.gradient_checkpointing = bool(given)
        if given == "selective":
            keep_products(trainer.model)
        batch = batch_of(trainer)
        with FlopCounterMode(display=False) as counter:
            outcome(trainer, batch)
        work.append(counter.get_total_flops())
    none, full, selective = work
    assert selective == none < full


def test_products_with_four_bit_weights_are_computed_once(all_wide):
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    hidden = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op.name())
            return op(*args, **(kwargs or {}))

    kept = partial(create_selective_checkpoint_contexts, policy)
    with Watch():
        checkpoint(lambda x: layer(x).sin(), hidden, use_reentrant=False, context_fn=kept).sum().backward()
    assert sum(name in ("bitsandbytes::gemm_4bit", "aten::mm") for name in seen) == 2, seen  # forward, and backward


def test_training_turns_it_on_and_the_reference_pass_leaves_it_on(trainers, pairs, all_wide):
    _, trainer = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, peft_config=LORA, max_steps=2, **SELECTIVE)
    keep_products(trainer.model)
    trainer.train()
    trainer.evaluate(Dataset.from_list(pairs))
    layer = trainer.model.get_base_model().model.layers[0]
    assert layer.gradient_checkpointing and "context_fn" in layer._gradient_checkpointing_func.keywords


def test_a_layer_keeps_less_than_half_of_what_it_would():
    config = AutoConfig.for_model("llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
                                  num_attention_heads=9, num_key_value_heads=3, vocab_size=1000)  # fmt: skip
    adapter = json.dumps({"r": 16, "target_modules": "all-linear"})
    none, selective, full = (
        footprint(config, Setting(2, 128, "float32", "bfloat16", "sdpa", adapter, False, given)).kept
        for given in (False, "selective", True)
    )
    assert full < selective < none / 2
