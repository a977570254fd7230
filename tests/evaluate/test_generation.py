"""Answers are drawn to the prompt that the trainer renders: with the row's tools and template arguments."""

from datasets import Dataset

from preftune.data.shapes import PAIRS
from preftune.data.token_checks import tokenized
from preftune.evaluate import generation
from preftune.models.load import load_model, load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{{ mood or 'plain' }}:"
TEMPLATE += "{% for m in messages %}{{ m.role }}={{ m.content }}<|im_end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant={% endif %}"


def test_prompts_are_rendered_as_the_trainer_renders_them(composed):
    cfg = composed("dpo")
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.chat_template = TEMPLATE
    row = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": [{"role": "assistant", "content": "So."}]}
    row |= {"rejected": [{"role": "assistant", "content": "No."}], "tools": TOOLS}
    rows = Dataset.from_list(
        [row | {"chat_template_kwargs": {"mood": "glad"}}, row | {"tools": None, "chat_template_kwargs": {}}],
        on_mixed_types="use_json",
    )
    model = load_model(cfg.model, cfg.lora, True)
    drawn = generation.generated(model, tokenizer, generation.prompts(rows), 2, False, do_sample=False)
    wanted = [each.prompt for each in tokenized(rows, PAIRS, tokenizer)]
    assert [prompt for prompt, _ in drawn] == wanted
    assert [tokenizer.decode(ids) for ids in wanted] == [
        "look;glad:user=Why?<|im_end|>assistant=",
        "plain:user=Why?<|im_end|>assistant=",
    ]
