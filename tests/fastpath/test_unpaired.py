"""KTO and SFT: rows side by side instead of padded, with TRL's numbers."""

import pytest
from equality import assert_same, batch_of, close, outcome
from peft import LoraConfig
from tiny_models import FAMILIES, tiny_model
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

LORA = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(scope="session")
def judged(pairs) -> list[dict]:
    sides = [("chosen", True), ("rejected", False)]
    return [{"prompt": r["prompt"], "completion": r[side], "label": label} for side, label in sides for r in pairs]


@pytest.fixture(scope="session")
def shown(pairs) -> list[dict]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]


@pytest.mark.parametrize("family", FAMILIES)
def test_kto_equals_trl(family, trainers, judged):
    assert_same(*trainers(KTOTrainer, KTOConfig, tiny_model(family), judged, ref_model=tiny_model(family, seed=1)))


@pytest.mark.parametrize(
    "variant",
    [
        {"loss_type": "apo_zero_unpaired"},
        {"precompute_ref_log_probs": True},
        {"gradient_checkpointing": True},
        {"max_length": 20},
    ],
)
def test_every_variant_of_kto_equals_trl(variant, trainers, judged):
    assert_same(*trainers(KTOTrainer, KTOConfig, tiny_model("llama"), judged, peft_config=LORA, **variant))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sft_equals_trl(family, loss_type, trainers, shown):
    assert_same(*trainers(SFTTrainer, SFTConfig, tiny_model(family), shown, loss_type=loss_type))


def test_sft_on_whole_texts_equals_trl(trainers, pairs):
    rows = [{"text": row["prompt"] + row["chosen"]} for row in pairs]
    assert_same(*trainers(SFTTrainer, SFTConfig, tiny_model("llama"), rows, gradient_checkpointing=True))


@pytest.mark.parametrize("rows", ["shown", "texts"])
def test_sft_with_trls_packing_equals_trl_and_scores_answers_alone(rows, trainers, shown, pairs):
    data = shown if rows == "shown" else [{"text": row["prompt"] + row["chosen"]} for row in pairs]
    arguments = {"packing": True, "per_device_train_batch_size": 2}
    assert_same(*trainers(SFTTrainer, SFTConfig, tiny_model("llama"), data, **arguments))


def test_mismatched_completions_stay_as_kto_defines_them(trainers, judged):
    arguments = {"ref_model": tiny_model("llama", seed=1), "max_length": 128}
    plain, packed = trainers(KTOTrainer, KTOConfig, tiny_model("llama"), judged, **arguments)
    batch, rows = batch_of(packed), list(packed.train_dataset)
    for row in range(len(rows)):
        prompt, answer = rows[row]["prompt_ids"], rows[row - 1]["completion_ids"]
        assert batch["KL_input_ids"][row][batch["KL_attention_mask"][row].bool()].tolist() == prompt + answer
        assert batch["KL_completion_mask"][row].sum() == len(answer)
    assert close(packed._compute_kl_logps(packed.model, batch), plain._compute_kl_logps(plain.model, batch))
    assert outcome(packed, batch)[1]["kl"] > 0
