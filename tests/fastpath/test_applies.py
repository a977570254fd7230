"""Where the packed forward does not apply, the run says so in one line and keeps TRL's results."""

import math

import pytest
import torch
from datasets import Dataset
from equality import batch_of, close, outcome
from peft import PromptTuningConfig, TaskType
from tiny_models import SIZES, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, OpenAIGPTConfig
from trl import DPOConfig, DPOTrainer

from preftune.fastpath import trainer_class

NAMES = {"vocab_size": SIZES["vocab_size"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SMALL = NAMES | {"hidden_size": 32, "num_hidden_layers": 2}
CASES = {
    "states that cannot be continued": lambda: MambaConfig(**SMALL, state_size=4),
    "no cache": lambda: OpenAIGPTConfig(vocab_size=SIZES["vocab_size"], n_embd=32, n_layer=1, n_head=4),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_model_that_cannot_share_prompts_runs_its_rows_as_they_are(kind, trainers, pairs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CASES[kind]())
    plain, ours = trainers(DPOTrainer, DPOConfig, model, pairs, ref_model=model)
    assert ours.form == "rows"
    batch = batch_of(plain)
    assert close(outcome(ours, batch)[0], outcome(plain, batch)[0])


def test_prompt_learning_takes_trls_path(trainers, pairs, capsys):
    virtual = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    plain, ours = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, peft_config=virtual)
    assert "prompt-learning" in capsys.readouterr().out
    batch = batch_of(plain)
    assert close(outcome(ours, batch)[0], outcome(plain, batch)[0])


def test_an_attention_that_takes_no_mask_is_named(trainers, pairs):
    _, ours = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, ref_model=tiny_model("llama"))
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    from preftune.fastpath.applies import choose

    assert (
        "attn_implementation=flash_attention_2 takes no mask; sdpa, eager, flex_attention do" in choose(model, ours)[1]
    )
    assert choose(tiny_model("llama"), ours) == ("packed", "")


def test_a_model_that_reads_masks_in_its_own_way_is_found_out(trainers, pairs, monkeypatch):
    _, ours = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, ref_model=tiny_model("llama"))
    from preftune.fastpath.applies import choose

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.forward = ignoring_masks(layer.self_attn.forward)
    form, reason = choose(model, ours)
    assert form == "rows" and reason == ""


def ignoring_masks(forward):
    return lambda *args, attention_mask=None, **inputs: forward(*args, attention_mask=None, **inputs)


def test_a_batch_padded_on_the_left_takes_trls_path_and_says_so_once(trainers, pairs, capsys):
    plain, ours = trainers(DPOTrainer, DPOConfig, tiny_model("llama"), pairs, ref_model=tiny_model("llama"))
    batch = {
        name: tensor.flip(1) if name in ("attention_mask", "completion_mask") else tensor
        for name, tensor in batch_of(plain).items()
    }
    assert close(outcome(ours, batch)[0], outcome(plain, batch)[0])
    outcome(ours, batch)
    assert capsys.readouterr().out.count("rows that are not padded on the right") == 1


def test_rows_past_what_the_rotary_scaling_keeps_fixed_take_trls_path(trainers, pairs, capsys):
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sizes = SIZES | NAMES | {"max_position_embeddings": 24}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, rope_parameters=rope))
    plain, ours = trainers(DPOTrainer, DPOConfig, model, pairs, ref_model=model)
    batch = batch_of(plain)
    assert close(outcome(ours, batch)[0], outcome(plain, batch)[0])
    assert "rows longer than 24 tokens" in capsys.readouterr().out


def test_a_trainer_without_a_fast_path_is_left_alone():
    assert trainer_class(torch.nn.Linear) is torch.nn.Linear


def test_the_whole_fast_path_trains_and_says_how_much_it_pads(tokenizer, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    trainer = trainer_class(type("Mine", (DPOTrainer,), {}))(
        model=tiny_model("llama"),
        args=DPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            precompute_ref_log_probs=True,
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.form == "packed" and trainer.reference_forwards == len(pairs)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert all(0 <= entry["padding_fraction"] < 0.5 for entry in trainer.state.log_history[:2])
