"""DPO and its relatives: the packed forward gives what TRL's own gives."""

import functools

import pytest
import torch
from datasets import Dataset
from equality import assert_same, batch_of, close, outcome
from peft import LoraConfig
from tiny_models import FAMILIES, SIZES, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaModel, MixtralConfig
from trl import DPOConfig, DPOTrainer

from preftune.fastpath import head

LORA = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
VARIANTS = {
    "sigmoid": {},
    "ipo": {"loss_type": ["ipo"]},
    "sum of losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "truncated": {"max_length": 20},
    "end kept": {"max_length": 20, "truncation_mode": "keep_end"},
    "padded further": {"pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_metrics_and_gradients_equal_trl(family, trainers, pairs):
    assert_same(*trainers(DPOTrainer, DPOConfig, tiny_model(family), pairs, ref_model=tiny_model(family, seed=1)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_loss_equals_trl(variant, trainers, pairs):
    models = {"model": tiny_model("llama"), "ref_model": tiny_model("llama", seed=1)}
    assert_same(*trainers(DPOTrainer, DPOConfig, rows=pairs, **models, **VARIANTS[variant]))


def test_scoring_a_few_tokens_at_a_time_equals_trl(trainers, pairs, monkeypatch):
    monkeypatch.setattr(head, "CPU_TOKENS", 7)
    monkeypatch.setattr(head, "CPU_WORDS", 50)
    models = {"model": tiny_model("gemma2"), "ref_model": tiny_model("gemma2", seed=1)}
    assert_same(*trainers(DPOTrainer, DPOConfig, rows=pairs, **models))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_with_its_own_base_as_reference_equals_trl(family, checkpointing, trainers, pairs):
    arguments = {"peft_config": LORA, "gradient_checkpointing": checkpointing}
    assert_same(*trainers(DPOTrainer, DPOConfig, tiny_model(family), pairs, **arguments))


def test_lora_without_the_cast_that_autocast_undoes_is_bit_for_bit_the_same(trainers, pairs, monkeypatch):
    _, packed = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, peft_config=LORA, bf16=True)
    packed.current_gradient_accumulation_steps = 1
    batch = batch_of(packed)

    def step():
        packed.model.zero_grad()
        loss = packed.training_step(packed.model, dict(batch))
        return [loss, *(weight.grad.clone() for weight in packed.model.parameters() if weight.grad is not None)]

    assert packed._autocast_casts()
    spared = step()
    monkeypatch.setattr(type(packed), "_autocast_casts", lambda self: False)
    assert len(spared) > 1 and all(map(torch.equal, spared, step()))


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_twenty_steps_lose_as_trl_does(peft_config, trainers, pairs):
    arguments = {"peft_config": peft_config, "max_steps": 20, "per_device_train_batch_size": 2}
    if peft_config is None:
        arguments["ref_model"] = tiny_model("llama")
    histories = []
    for trainer in trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, **arguments):
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    plain, packed = histories
    assert len(plain) == 20
    assert plain[-1] < 0.9 * plain[0]
    assert close(packed, plain, tolerance=1e-4)


def test_reference_and_evaluation_equal_trl(trainers, pairs):
    arguments = {"per_device_eval_batch_size": 4, "eval_strategy": "no", "ld_alpha": 0.5}
    plain, packed = trainers(DPOTrainer, DPOConfig, tiny_model("qwen3"), pairs, peft_config=LORA, **arguments)
    batch = batch_of(plain)
    theirs, ours = (trainer.compute_ref_log_probs(trainer.model, dict(batch)) for trainer in (plain, packed))
    assert all(close(*both) for both in zip(ours, theirs, strict=True))
    theirs, ours = (trainer.evaluate(Dataset.from_list(pairs)) for trainer in (plain, packed))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert name.endswith(("time", "per_second")) or close(ours[name], theirs[name]), name


def test_reference_precomputed_within_init_is_packed_too(trainers, pairs, monkeypatch):
    arguments = {"precompute_ref_log_probs": True, "gradient_checkpointing": True}
    seen = []
    run = LlamaModel.forward

    @functools.wraps(run)
    def watched(*args, **inputs):
        seen.append(inputs)
        return run(*args, **inputs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    plain, packed = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, peft_config=LORA, **arguments)
    assert "position_ids" in seen[-1]
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert close(packed.train_dataset[column], plain.train_dataset[column])
    assert_same(plain, packed)


@pytest.mark.parametrize("lora", [False, True])
def test_mixture_of_experts_without_its_auxiliary_loss_equals_trl(lora, trainers, pairs):
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1))
    reference = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {"ref_model": model}
    assert_same(*trainers(DPOTrainer, DPOConfig, model, pairs, **reference))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast_to_bfloat16_is_as_close_as_bfloat16_is(implementation, trainers, pairs):
    model = tiny_model("llama")
    model.config._attn_implementation = implementation
    exact, _ = trainers(DPOTrainer, DPOConfig, model, pairs, ref_model=tiny_model("llama", seed=1))
    plain, packed = trainers(DPOTrainer, DPOConfig, model, pairs, ref_model=tiny_model("llama", seed=1), bf16=True)
    for trainer in (plain, packed):
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
    batch = batch_of(plain)
    expected, *results = [outcome(trainer, batch) for trainer in (exact, plain, packed)]
    errors = [
        [abs(float(loss - expected[0])), abs(metrics["logps/chosen"] - expected[1]["logps/chosen"])]
        for loss, metrics, _ in results
    ]
    assert packed.form
    assert all(ours <= 3 * theirs + 0.05 for ours, theirs in zip(errors[1], errors[0], strict=True)), errors


def test_a_base_in_four_bits_equals_trl(trainers, pairs, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits)
    # TRL keeps the adapter of a quantized model in bfloat16, and so its gradients
    assert_same(*trainers(DPOTrainer, DPOConfig, model, pairs, peft_config=LORA), gradients_to=1e-2)


def test_a_step_computes_a_pairs_unique_tokens_and_little_more(trainers, pairs):
    arguments = {"ref_model": tiny_model("llama"), "max_length": 128}
    plain, packed = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, **arguments)
    batch, work = batch_of(plain), []
    for trainer in (plain, packed):
        with FlopCounterMode(display=False) as counter:
            outcome(trainer, batch)
        work.append(counter.get_total_flops())
    unique = sum(
        len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) - 2 for row in packed.train_dataset
    )
    assert work[1] / work[0] < 1.25 * unique / batch["input_ids"].numel()
