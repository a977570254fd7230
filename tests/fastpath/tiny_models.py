"""Tiny models of the families that the packed forward is held against TRL on."""

import torch
from tokenizers import pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: number for number, token in enumerate(["<pad>", "<eos>", *BYTES])}
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 64},
    "mistral-short-window": SIZES | {"sliding_window": 6},
    "qwen3": SIZES,
    "gemma2": SIZES
    | {
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "attn_implementation": "eager",
    },
    "gpt2": {
        "vocab_size": len(VOCABULARY),
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
    },
    "gpt_neox": {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
}


def tiny_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A causal LM of a few thousand random weights, large enough for attention to matter."""
    sizes = dict(FAMILIES[family])
    attention = sizes.pop("attn_implementation", "sdpa")
    config = CONFIG_MAPPING[family.split("-")[0]](
        **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=family != "gpt_neox"
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
