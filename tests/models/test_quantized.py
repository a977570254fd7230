"""Checkpoints with weights in few bits: trained dequantized, or refused in one line that names the way on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from preftune.models import embedded

FP8_MOST = 448.0


pytestmark = pytest.mark.slow  # real quantized checkpoints are written and trained


@pytest.fixture
def stored(tmp_path):
    """stored(quantization, change): the tiny model's folder with that quantization_config and its weights changed."""

    def make(quantization, change=None, source=None):
        folder = tmp_path / "model"
        shutil.copytree(source or embedded.folder("embedded://tiny"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        if change:
            weights = {key: each.contiguous() for key, each in change(load_file(folder / "model.safetensors")).items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def trained(typed, small, pairs_file, tmp_path):
    """trained(folder, *overrides): recipes.dpo on a checkpoint as it is typed."""

    def run(folder, *overrides):
        given = ["model=path", f"model.path={folder}", "data=file", f"data.path={pairs_file}", "output_dir=run"]
        done = typed("recipes.dpo", *small, *given, "samples=0", "train.max_steps=1", *overrides)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


NEEDS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "gptqmodel"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors"),
}


@pytest.mark.parametrize("method", NEEDS)
def test_a_checkpoint_that_needs_a_package_is_one_line_that_names_it(stored, trained, method):
    quantization, package = NEEDS[method]
    folder = stored(quantization)
    done = trained(folder, "lora=lora")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith(f"model.path={folder}")]
    assert package in line.lower()


def in_fp8(weights):
    """Every matrix of the layers in float8, with one scale for it all."""
    made = {}
    for key, weight in weights.items():
        if "proj" in key:
            scale = weight.abs().max() / FP8_MOST
            made[f"{key}_scale_inv"] = scale.reshape(1, 1).float()
            weight = (weight / scale).to(torch.float8_e4m3fn)
        made[key] = weight
    return made


@pytest.mark.parametrize("lora", ["none", "lora"])
def test_fp8_weights_are_trained_dequantized(stored, trained, lora):
    folder = stored({"quant_method": "fp8", "weight_block_size": [128, 128]}, in_fp8)
    done = trained(folder, f"lora={lora}")
    assert done.returncode == 0, done.stderr
    assert "is stored in fp8, and is trained dequantized" in done.stdout + done.stderr


def in_mxfp4(weights):
    """The experts' matrices as blocks of 32 values of 4 bits with one exponent each."""
    made = {}
    for key, weight in weights.items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = weight.shape
            made[f"{key}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            made[f"{key}_scales"] = torch.full((experts, outer, inner // 32), 120, dtype=torch.uint8)
        else:
            made[key] = weight
    return made


def test_mxfp4_weights_are_trained_dequantized(stored, trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    unconverted = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": unconverted}
    done = trained(stored(quantization, in_mxfp4, tmp_path / "whole"), "lora=none")
    assert done.returncode == 0, done.stderr
    assert "is stored in mxfp4, and is trained dequantized" in done.stdout + done.stderr
