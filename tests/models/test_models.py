"""Model and tokenizer: templates close answers with EOS, and what cannot be had says how to go on."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from preftune.config.errors import UserError
from preftune.models import embedded
from preftune.models.identity import fingerprint
from preftune.models.load import load_model, load_tokenizer
from preftune.runs.training import build_trainer


@pytest.fixture
def tiny(composed):
    return composed("dpo").model


@pytest.mark.slow
def test_the_embedded_smollm2_answers_sensibly(tiny):
    tiny.path = "embedded://smollm2"
    tokenizer = load_tokenizer(tiny)
    model = load_model(tiny, OmegaConf.create({}), use_cpu=True)
    assert model.num_parameters() == 134_515_008
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
    assert "Paris" in text


def test_an_unknown_embedded_model_lists_the_known(tiny):
    tiny.path = "embedded://smolm"
    with pytest.raises(ValueError, match="there are smollm2, tiny"):
        load_tokenizer(tiny)


@pytest.mark.parametrize("made", ["model/config.json", "preference/model/adapter_config.json"])
def test_a_run_in_the_place_of_its_model_is_told_where_that_is(tiny, tmp_path, made):
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).write_text("{}")
    tiny.path = str(tmp_path)
    with pytest.raises(UserError, match=f": model.path={re.escape(str((tmp_path / made).parent))}$"):
        load_tokenizer(tiny)


def test_a_tokenizer_without_a_template_gets_the_plain_one(tiny, tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    bare.chat_template = None
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((embedded.folder("embedded://tiny") / "config.json").read_text())
    tiny.path = str(tmp_path)
    tokenizer = load_tokenizer(tiny)
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert (
        tokenizer.apply_chat_template(dialogue, tokenize=False) == "### User:\nHi\n\n### Assistant:\nHello.<|im_end|>"
    )
    prompt = tokenizer.apply_chat_template(dialogue[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(dialogue, tokenize=False).startswith(prompt)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_an_eos_token_that_is_no_token_is_refused(tiny):
    tiny.eos_token = "<|nothing|>"
    with pytest.raises(UserError, match="model.eos_token=<|nothing|>"):
        load_tokenizer(tiny)


def test_weights_that_were_cut_short_are_one_line(tiny, tmp_path):
    load_model(tiny, OmegaConf.create({}), use_cpu=True).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    tiny.path = str(tmp_path)
    with pytest.raises(UserError, match="its weights are damaged or half copied"):
        load_model(tiny, OmegaConf.create({}), use_cpu=True)


def test_the_fingerprint_tells_weights_apart(tiny):
    model = load_model(tiny, OmegaConf.create({}), use_cpu=True)
    before = fingerprint(model)
    assert before == fingerprint(load_model(tiny, OmegaConf.create({}), use_cpu=True))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert fingerprint(model) != before


def test_a_4_bit_layer_passes_gradients_after_a_forward_without_them(composed):
    trainer = build_trainer(composed("dpo", "lora=qlora"))
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(input_ids=torch.tensor([[1, 2, 3]]))
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    silent = [n for n, p in trainer.model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.slow
def test_tokens_without_an_embedding_are_one_line_whose_remedy_works(typed, small, pairs_file, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    tokenizer.add_tokens(["moon"])
    tokenizer.save_pretrained(tmp_path / "more")
    AutoModelForCausalLM.from_pretrained(embedded.folder("embedded://tiny")).save_pretrained(tmp_path / "more")
    run = [*small, "data=file", f"data.path={pairs_file}", "model=path"]
    refused = typed("recipes.dpo", *run, "model.path=more", "output_dir=one")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    [line] = [line for line in refused.stderr.splitlines() if "model.path=more" in line]
    command = re.search(r'python (-c ".*")', line)[1]
    subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, check=True, capture_output=True)
    saved = re.search(r"'(\+lora.modules_to_save=\[[^']*\])'", line)[1]
    for output, extra in (("two", []), ("three", [saved])):
        done = typed("recipes.dpo", *run, "model.path=resized", f"output_dir={output}", *extra)
        assert done.returncode == 0, done.stderr
