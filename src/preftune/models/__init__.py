"""Model, tokenizer and template: loaded, quantized, merged, sharded, identified; the embedded models."""
