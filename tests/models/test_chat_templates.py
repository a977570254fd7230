"""Chat templates as families write them: each renders, trains as TRL trains it, and ends where its turn ends."""

import json
import re
from pathlib import Path

import pytest
import trl
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from preftune.models import embedded
from preftune.models.load import load_tokenizer
from preftune.models.tokenizer import TokenizerError, end_of_turn, prepare, stop_tokens

SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
ENDS = {  # what families write behind an answer, by how their files begin; the others write <|im_end|>
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": None,
    "glm4moe_training": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}
# Families whose templates TRL does not ship, as far as the end of a turn goes
OTHERS = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content }}</s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "kimi": (
        "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}",
        "<|im_end|>",
    ),
    "minimax": (
        "{% for m in messages %}]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n{{ m.content }}[e~[\n{% endfor %}"
        "{% if add_generation_prompt %}]~b]ai\n{% endif %}",
        "[e~[",
    ),
}
MARKS = re.compile(r"<[|/\w｜▁]+>|<\|?\w+\|?>|\[e~\[|\]~b\]")


def section(**changes):
    return OmegaConf.create({"path": "x", "eos_token": None, "pad_token": None, "chat_template": None} | changes)


def family(template: str):
    """The tiny tokenizer with the tokens that a template writes."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*MARKS.findall(template), "</s>"})})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_template_that_trl_ships_renders_and_its_end_is_known(path):
    tokenizer = prepare(family(path.read_text()), section())
    known = [name for name in ENDS if path.stem.startswith(name)]
    wanted = ENDS[max(known, key=len)] if known else "<|im_end|>"
    assert end_of_turn(tokenizer) == (tokenizer.convert_tokens_to_ids(wanted) if wanted else None)
    assert stop_tokens(tokenizer)[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", OTHERS)
def test_the_ends_of_other_families_are_found(name):
    template, end = OTHERS[name]
    assert end_of_turn(prepare(family(template), section())) == family(template).convert_tokens_to_ids(end)


def test_trls_template_for_training_is_one_word_away():
    tokenizer = family((SHIPPED[0].parent / "glm4moe.jinja").read_text())
    assert end_of_turn(tokenizer) is None
    prepare(tokenizer, section(chat_template="training"))
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|user|>"
    with pytest.raises(TokenizerError, match="TRL ships none"):
        prepare(family(OTHERS["minimax"][0]), section(chat_template="training"))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}", "{% for"])
def test_a_template_that_leaves_the_answer_out_is_refused_in_one_line(template, tmp_path):
    (tmp_path / "bad.jinja").write_text(template)
    with pytest.raises(TokenizerError, match="model.chat_template=FILE") as error:
        prepare(family(OTHERS["kimi"][0]), section(chat_template=str(tmp_path / "bad.jinja")))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gemma3", "dpo"),
        ("glm4moe", "dpo"),
        ("gptoss", "dpo"),
        ("smolvlm", "dpo"),
        ("gemma3", "orpo"),
        ("glm4moe", "sft"),
    ],
)
def test_runs_train_with_templates_of_other_families(name, recipe, typed, pairs_file, small, tmp_path):
    template = (SHIPPED[0].parent / f"{name}.jinja").read_text()
    tokenizer = family(template)
    model = AutoModelForCausalLM.from_pretrained(embedded.folder("embedded://tiny"))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "family")
    tokenizer.save_pretrained(tmp_path / "family")
    given = ["data=file", f"data.path={pairs_file}", "data.eval_fraction=0.25", "output_dir=run"]
    done = typed(f"recipes.{recipe}", *small, "model=path", f"model.path={tmp_path / 'family'}", *given)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    findings = {each["code"] for each in json.loads((tmp_path / "run" / "data_findings.json").read_text())}
    assert ("missing_eos" in findings) == (name == "glm4moe")


@pytest.fixture
def base(tmp_path):
    """A folder with the tiny model as a base model has it: generation ends at <|endoftext|>, not where a turn does."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model = AutoModelForCausalLM.from_pretrained(embedded.folder("embedded://tiny"))
    set_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["lora=none", "lora=lora lora.r=64"])
def test_the_export_stops_where_the_trained_model_does(lora, typed, small, base, tmp_path):
    rows = [{"prompt": f"Is {n} a number?", "chosen": "Yes.", "rejected": "No " * 5} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["model=path", f"model.path={base}", "model.eos_token=<|im_end|>", "data=file", "data.path=rows.jsonl"]
    steps = [
        "train.max_steps=100",
        "train.learning_rate=0.005",
        "train.eval_strategy=no",
        "output_dir=run",
        "samples=2",
    ]
    done = typed("recipes.sft", *small, *given, *steps, *lora.split())
    assert done.returncode == 0, done.stderr
    assert typed("recipes.export", "run=run", "output=out").returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for sample in json.loads((tmp_path / "run" / "summary.json").read_text())["samples"]:
        turn = [{"role": "user", "content": sample["prompt"]}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].size(1) :]
        assert len(said) < 40 and tokenizer.convert_ids_to_tokens(said.tolist())[-1] == "<|im_end|>"
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == sample["after"].strip() != ""


@pytest.mark.slow
def test_what_ends_an_answer_is_in_every_artifact(typed, pairs_file, small, base, tmp_path):
    end = AutoTokenizer.from_pretrained(base).eos_token_id
    given = ["model=path", f"model.path={base}", "data=file", f"data.path={pairs_file}", "output_dir=run"]
    done = typed("recipes.sft_dpo", *small, *given)
    assert done.returncode == 0, done.stderr
    done = typed("recipes.export", "run=run", "output=out")
    assert done.returncode == 0, done.stderr
    turn = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    folders = [tmp_path / "out", *tmp_path.glob("run/**/generation_config.json")]
    assert len(folders) >= 4
    for folder in (each if each.is_dir() else each.parent for each in folders):
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert ends[0] == turn and end in ends, folder
        tokenizer = load_tokenizer(section(path=str(folder), revision=None, trust_remote_code=False))
        assert stop_tokens(tokenizer)[0] == turn
    assert turn in json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]
