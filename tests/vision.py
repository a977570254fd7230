"""Tiny vision models of random weights, with processors, and a few pictures."""

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from preftune.models import embedded

LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_TEMPLATE = LLAVA_TEMPLATE.replace("<image>\n", "<start_of_image>")
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


def tokenizer_with(*tokens):
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def llava():
    tokenizer = tokenizer_with("<image>")
    vision = CLIPVisionConfig(**WIDTHS, image_size=28, patch_size=14, projection_dim=32)
    text = LlamaConfig(**WIDTHS, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=512)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, image_token_index=image)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    kinds = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(pictures, tokenizer, **kinds, chat_template=LLAVA_TEMPLATE)
    return LlavaForConditionalGeneration(config), processor


def gemma3():
    tokenizer = tokenizer_with("<start_of_image>", "<image_soft_token>", "<end_of_image>")
    names = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    for name, token in names.items():
        tokenizer.init_kwargs[name] = token
        setattr(tokenizer, name, token)
    tokenizer._set_model_specific_special_tokens(names)
    of = tokenizer.convert_tokens_to_ids
    text = WIDTHS | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer), "sliding_window": 64}
    config = Gemma3Config(
        text_config=text,
        vision_config=WIDTHS | {"image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=of("<image_soft_token>"),
        boi_token_index=of("<start_of_image>"),
        eoi_token_index=of("<end_of_image>"),
    )
    pictures = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = Gemma3Processor(pictures, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    return Gemma3ForConditionalGeneration(config), processor


MODELS = {"llava": llava, "gemma3": gemma3}


def saved(name, folder):
    """The folder of a tiny vision model."""
    torch.manual_seed(0)
    model, processor = MODELS[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def picture(number):
    """A small picture, another one for each number."""
    return Image.new("RGB", (40, 30), (37 * number % 256, 91 * number % 256, 11 * number % 256))
