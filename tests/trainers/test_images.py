"""Rows with images on tiny vision models: read in every form that they come in, trained with plain TRL's numbers."""

import base64
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import vision
from datasets import Dataset, Image
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from preftune.data.findings import DataError
from preftune.models.load import ModelError, load_model, load_tokenizer
from preftune.pipeline.run import run_stages
from preftune.runs.training import build_trainer, stage
from preftune.trainers import build

QUESTIONS = ["What is shown?", "Which colour is it?", "What is shown?", "Is it large?"] * 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return {name: vision.saved(name, folder / name) for name in vision.MODELS}


@pytest.fixture
def pictures(tmp_path):
    """pictures(): rows of pairs with the name of a picture each, all but one, beside the pictures."""
    rows = []
    for number, question in enumerate(QUESTIONS):
        vision.picture(number).save(tmp_path / f"{number}.png")
        chosen, rejected = f"It is number {number}.", f"Nobody knows{'!' * (number % 4)}"
        rows.append({"prompt": question, "chosen": chosen, "rejected": rejected, "images": [f"{number}.png"]})
    rows[5]["images"] = []
    return rows


@pytest.fixture
def run(composed, models, tmp_path):
    """run("dpo", rows, model="llava"): that recipe's config on these rows."""

    def configured(recipe, rows, *overrides, model="llava"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = ["model=path", f"model.path={models[model]}", f"data.path={path}", "data.eval_fraction=0"]
        return composed(recipe, *chosen, "train.max_steps=3", "train.warmup_steps=0", *overrides)

    return configured


def opened(rows, folder):
    """The rows as plain TRL takes them: messages, and pictures in memory."""
    for row in rows:
        sides = {name: [{"role": "assistant", "content": row[name]}] for name in row.keys() & {"chosen", "rejected"}}
        asked = [{"role": "user", "content": row["prompt"]}]
        yield {"prompt": asked, "images": [str(folder / name) for name in row["images"]]} | sides


def plain(trainer_class, cfg, rows, trainer):
    """The losses and gradients of plain TRL with the same settings."""
    model = load_model(cfg.model, cfg.lora, use_cpu=True)
    data = Dataset.from_list(rows)
    data = data.cast_column("images", [Image()])
    processor = AutoProcessor.from_pretrained(cfg.model.path)
    theirs = trainer_class(
        model=model,
        args=trainer.args,
        processing_class=processor,
        train_dataset=data,
        peft_config=build.adapter(cfg.lora, model),
    )
    return history(theirs)


def history(trainer):
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("model", vision.MODELS)
@pytest.mark.parametrize("lora", ["lora", "none"])
def test_dpo_on_images_gives_plain_trls_numbers(run, pictures, tmp_path, model, lora):
    cfg = run("dpo", pictures, f"lora={lora}", model=model)
    trainer = build_trainer(cfg)
    theirs = plain(DPOTrainer, cfg, list(opened(pictures, tmp_path)), trainer)
    for ours, wanted in zip(history(trainer), theirs, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_kto_and_sft_on_images_give_plain_trls_numbers(run, pictures, tmp_path):
    cfg = run("sft", pictures)
    trainer = build_trainer(cfg)
    rows = [{"completion": row.pop("chosen")} | row for row in opened(pictures, tmp_path)]
    rows = [{name: value for name, value in row.items() if name != "rejected"} for row in rows]
    for ours, wanted in zip(history(trainer), plain(SFTTrainer, cfg, rows, trainer), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    cfg = run("kto", pictures, "fastpath.enabled=false")  # whose batches are shuffled
    trainer = build_trainer(cfg)
    order = [int(name.split("/")[0].rpartition(":")[2]) - 1 for name in trainer.train_dataset["id"]]
    labels = trainer.train_dataset["label"]
    rows = list(opened(pictures, tmp_path))
    rows = [
        {"prompt": rows[at]["prompt"], "images": rows[at]["images"], "label": label}
        | {"completion": rows[at]["chosen" if label else "rejected"]}
        for at, label in zip(order, labels, strict=True)
    ]
    for ours, wanted in zip(history(trainer), plain(KTOTrainer, cfg, rows, trainer), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def forms(picture, file):
    """One picture in the forms that rows hold it in: what stands beside the prompt, and inside it."""
    address = "data:image/png;base64," + base64.b64encode(picture).decode()
    text = {"type": "text", "text": "What is shown?"}
    return {
        "a file": ({"images": [file]}, "What is shown?"),
        "one file, as image": ({"image": file}, "What is shown?"),
        "a place in the prompt": ({"images": [file]}, [{"type": "image"}, text]),
        "a mark in the text": ({"images": [file]}, "<image>What is shown?"),
        "base64 in the prompt": ({}, [{"type": "image", "base64": address.partition(",")[2], "text": ""}, text]),
        "in the prompt": ({}, [{"type": "image", "image": file}, text]),
        "OpenAI's data address": ({}, [{"type": "image_url", "image_url": {"url": address}}, text]),
    }


def test_every_form_of_an_image_is_the_same_row(run, tmp_path):
    vision.picture(1).save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    found = []
    for beside, prompt in forms(content, "1.png").values():
        asked = prompt if isinstance(prompt, str) else [{"role": "user", "content": prompt}]
        cfg = run("dpo", [{"prompt": asked, "chosen": "A dot.", "rejected": "No."} | beside])
        found.append(build_trainer(cfg).train_dataset[0])
    struct = pa.array([[{"bytes": content, "path": "x.png"}]])  # as datasets embeds it
    columns = {"prompt": ["What is shown?"], "chosen": ["A dot."], "rejected": ["No."], "images": struct}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    cfg = run("dpo", [])
    cfg.data.path = str(tmp_path / "rows.parquet")
    found.append(build_trainer(cfg).train_dataset[0])
    for row in found:
        part, text = row["prompt"][0]["content"]
        assert part.keys() == {"type", "id"} and text == {"type": "text", "text": "What is shown?"}
        assert row["images"][0].convert("RGB").tobytes() == vision.picture(1).tobytes()


def test_a_run_on_images_ends_well_and_its_model_loads(run, pictures, capsys):
    evaluated = ["data.eval_fraction=0.25", "train.eval_strategy=steps", "train.eval_steps=3"]
    cfg = run("dpo", pictures, "fit_check=true", *evaluated)
    summary = stage(cfg, {})
    said = capsys.readouterr().out
    assert "with images" in said and "rows with images are not counted" in said
    assert 0 <= summary["held_out"]["eval_rewards/accuracies"] <= 1
    assert AutoProcessor.from_pretrained(Path(cfg.output_dir) / "model").image_processor


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"images": ["gone.png"]}, "there is no file 'gone.png'"),
        ({"images": ["https://example.org/a.png"]}, "' is an address: download"),
        ({"images": ["rows.jsonl"]}, "cannot be opened"),
        ({"images": [{"image_url": 5}]}, "neither a file nor an image"),
        ({"images": [{"image_url": None}]}, "neither a file nor an image"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]}, "no image for it"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image", "image": "0.png"}]}]}, "answers are texts"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "more than texts and images"),
    ],
)
def test_bad_images_are_named_with_their_row(run, pictures, changed, says):
    pictures[2] |= changed
    with pytest.raises(DataError, match=rf"images, 1: .*rows.jsonl:3: .*{says}"):
        stage(run("dpo", pictures), {})
    cfg = run("dpo", pictures, "data.on_bad_rows=skip")
    assert len(build_trainer(cfg).train_dataset) == len(pictures) - 1


def test_images_that_would_be_cut_and_losses_that_read_none_are_refused(run, pictures):
    with pytest.raises(DataError, match="images_cut, .*fill train.max_length"):
        stage(run("dpo", pictures, "train.max_length=12"), {})
    with pytest.raises(DataError, match="CPOTrainer reads none"):
        stage(run("dpo", pictures, "loss=simpo"), {})
    only = run("dpo", pictures, "loss=simpo", "+data.columns.images=null")
    assert "images" not in build_trainer(only).train_dataset.column_names


def test_a_template_that_leaves_images_out_is_refused(run, pictures, models, tmp_path):
    folder = shutil.copytree(models["llava"], tmp_path / "deaf")
    (folder / "chat_template.jinja").write_text(vision.LLAVA_TEMPLATE.replace("'<image>\n'", "''"))
    cfg = run("dpo", pictures)
    cfg.model.path = str(folder)
    with pytest.raises(DataError, match="template_refuses, .*leaves the images out"):
        stage(cfg, {})


@pytest.mark.parametrize("recipe", ["rloo", "grpo"])
def test_drawn_answers_see_the_images(run, pictures, recipe):
    short = ["loss.num_generations=2", "loss.max_completion_length=8", "data.eval_fraction=0"]
    cfg = run(recipe, pictures, f"loss.rewards=[{__name__}.letters]", *short, "train.max_steps=2")
    found = history(build_trainer(cfg))
    assert len(found) == 2 and any(gradient > 0 for _, gradient in found)


def letters(prompt, answer):
    return float(len(set(answer)))


def test_streams_hold_images_too_and_refuse_those_that_come_later(run, pictures):
    cfg = run("dpo", pictures, "data.streaming=true", "lora=lora")
    assert len(history(build_trainer(cfg))) == 3
    words = [{"prompt": "Why?", "chosen": f"So {number}.", "rejected": "No."} for number in range(12)]
    later = ["data.streaming=true", "data.token_rows=4", "loss.precompute_ref_log_probs=false", "train.max_steps=6"]
    with pytest.raises(DataError, match="images, "):
        build_trainer(run("dpo", words + pictures, *later)).train()
    cfg = run("dpo", words + pictures, *later, "data.on_bad_rows=skip")
    assert len(history(build_trainer(cfg))) == 6


def test_a_dialogue_of_several_turns_and_a_picture_cut_short(run, pictures, tmp_path):
    turns = [("user", "Hello."), ("assistant", "Hi."), ("user", [{"type": "image"}, {"type": "text", "text": "What?"}])]
    pictures[0] |= {"prompt": [{"role": role, "content": content} for role, content in turns]}
    assert len(history(build_trainer(run("dpo", pictures)))) == 3
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"images, 1: .*rows.jsonl:2: an image cannot be opened"):
        build_trainer(run("dpo", pictures))


def test_rows_that_do_not_render_are_left_out_where_that_is_asked(run, pictures, tmp_path):
    pictures[3]["prompt"] = "What is shown? " * 60
    cfg = run("dpo", pictures, "data.on_bad_rows=skip", "train.max_length=200")
    trainer = build_trainer(cfg)
    assert len(trainer.train_dataset) == len(pictures) - 1
    assert "images_cut" in Path(cfg.data.skipped_file).read_text()


def test_a_pipeline_hands_the_images_on_and_exports_a_model_that_reads_them(run, pictures):
    stages = "pipeline.stages=[sft,preference,export]"
    cfg = run("sft_dpo", pictures, "data.eval_fraction=0.25", "lora=lora", "samples=1", stages)
    run_stages(cfg)
    assert AutoProcessor.from_pretrained(Path(cfg.output_dir) / "exported").image_processor


def test_same_words_about_other_images_are_other_prompts(run, pictures):
    for row in pictures:
        row |= {"prompt": "What is shown?", "rejected": "Nobody knows."}
    pictures.append(pictures[0] | {"chosen": pictures[0]["rejected"], "rejected": pictures[0]["chosen"]})
    cfg = run("dpo", pictures)
    found = build.load_data(cfg, load_tokenizer(cfg.model)).findings
    counted = {each.code: each.count for each in found}
    assert counted["contradictory_pairs"] == 2 and not counted.keys() & {"few_prompts", "duplicate_rows"}


def test_an_adapter_whose_base_is_gone_is_an_answer_of_the_models_loading(run, pictures, models, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(models["llava"])
    adapter = get_peft_model(base, LoraConfig(target_modules=r".*language_model.*q_proj"))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    adapter.save_pretrained(tmp_path / "adapter")
    AutoProcessor.from_pretrained(models["llava"]).tokenizer.save_pretrained(tmp_path / "adapter")
    cfg = run("dpo", [row | {"images": []} for row in pictures])
    cfg.model.path = str(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter over .*gone"):
        build_trainer(cfg)
