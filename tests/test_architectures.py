"""One architecture of each kind is trained as plain TRL trains it (benchmarks/models.py has all of them)."""

import pytest

from benchmarks.models import build, matrix_row

KINDS = {
    "dense": "qwen3",
    "mixture of experts": "qwen3_moe",
    "sliding window": "gemma3_text",
    "sinks": "gpt_oss",
    "latent attention": "deepseek_v3",
    "state space": "mamba",
    "linear attention": "qwen3_next",
    "convolution": "lfm2",
    "multimodal": "gemma3",
    "tied": "gemma",
    "absolute positions": "gpt2",
    "its own dropout": "opt",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS.keys())
def test_what_trl_trains_is_trained_with_its_losses(name, tmp_path):
    row = matrix_row(name, tmp_path)
    for way in ("full", "lora"):
        assert row[way]["preftune"] >= row[way]["trl"], row[way]
        assert row[way].get("difference", 0.0) < 1e-4
    assert row["full"]["trl"]


@pytest.mark.slow
def test_a_model_without_gradient_checkpointing_trains_under_the_defaults(typed, pairs_file, small, tmp_path):
    build("openai-gpt", tmp_path / "model")
    given = ["model=path", f"model.path={tmp_path / 'model'}", "data=file", f"data.path={pairs_file}", "output_dir=run"]
    done = typed("recipes.dpo", *small, *given)
    assert done.returncode == 0, done.stderr
    assert "gradient checkpointing: off, which OpenAIGPTLMHeadModel does not support" in done.stdout
