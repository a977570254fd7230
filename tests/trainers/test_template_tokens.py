"""ORPO, CPO and SimPO train the tokens that DPO trains: those of the chat template, cut where max_length says."""

import json
from pathlib import Path

import pytest
import torch
from shared_cases import case, checkpoints
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from preftune.data.token_checks import sequences, tokenized
from preftune.models.load import load_tokenizer
from preftune.runs.training import build_trainer, train
from preftune.trainers.build import load_data

ODDS = ["orpo", "cpo", "simpo"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("models"))


def dpo_rows(trainer) -> list[tuple]:
    return [
        (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"], len(row["prompt_ids"]))
        for row in trainer.train_dataset
    ]


def odds_rows(trainer) -> list[tuple]:
    rows = trainer.train_dataset
    for row in rows:
        for side in ("chosen", "rejected"):
            labels, ids, start = row[f"{side}_labels"], row[f"{side}_input_ids"], len(row["prompt_input_ids"])
            assert labels == [-100] * start + ids[start:] and row[f"{side}_attention_mask"] == [1] * len(ids)
    return [(row["chosen_input_ids"], row["rejected_input_ids"], len(row["prompt_input_ids"])) for row in rows]


@pytest.mark.parametrize("name", ["chatml-bos", "bos-in-template"])
@pytest.mark.parametrize("loss", ODDS)
@pytest.mark.parametrize("fast", [True, False])
def test_trained_tokens_are_those_of_dpo_of_inspection_and_of_evaluation(composed, made, name, loss, fast):
    model = ["model=path", f"model.path={made / name}", f"fastpath.enabled={fast}"]
    wanted = dpo_rows(build_trainer(composed("dpo", *model)))
    cfg = composed("dpo", f"loss={loss}", *model)
    trained = odds_rows(build_trainer(cfg))
    assert trained == wanted
    tokenizer = load_tokenizer(cfg.model)
    shown = list(tokenized(load_data(cfg, tokenizer).train, "pairs", tokenizer))
    scored = [sequences(row, None) for row in shown]
    assert [(sides[0][0], sides[1][0], sides[0][1]) for sides in scored] == wanted
    text = tokenizer.decode(trained[0][0])
    assert text.count("<s>") == (name == "bos-in-template") and text.count("<|im_end|>") == 2


@pytest.mark.parametrize("loss", ODDS)
def test_on_the_same_ids_losses_and_metrics_equal_trl(composed, loss):
    ours = build_trainer(composed("dpo", f"loss={loss}", "fastpath.enabled=false"))
    classes = {"orpo": (ORPOTrainer, ORPOConfig)}.get(loss, (CPOTrainer, CPOConfig))
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}]  # TRL's own needs rows to start with
    given = ours.args.to_dict() | {"output_dir": ours.args.output_dir, "report_to": "none"}
    known = {
        name: given[name] for name in ("beta", "max_length", "loss_type", "cpo_alpha", "simpo_gamma") if name in given
    }
    from datasets import Dataset

    plain = classes[0](
        model=ours.model,
        args=classes[1](use_cpu=True, bf16=False, output_dir=ours.args.output_dir, report_to="none", **known),
        train_dataset=Dataset.from_list(texts),
        processing_class=ours.processing_class,
    )
    batch = ours._prepare_inputs(ours.data_collator(list(ours.train_dataset)[:5]))
    with torch.no_grad():
        mine, logged = ours.get_batch_loss_metrics(ours.model, batch)
        theirs, wanted = plain.get_batch_loss_metrics(plain.model, batch)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert {name: logged[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)


@pytest.fixture
def long_rows(tmp_path):
    """Twelve rows, of which two have a prompt of more than 256 tokens, as a training and as a held-out file."""
    rows = [
        {"prompt": f"Say {i}. " + "word " * 60 * (i % 6 == 0), "chosen": f"It is {i}.", "rejected": "No."}
        for i in range(12)
    ]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.path={tmp_path}/train.jsonl", f"data.eval_split={tmp_path}/eval.jsonl", "train.max_length=256"]


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft", *ODDS])
def test_rows_without_an_answer_token_left_are_left_out_and_counted(composed, long_rows, loss, capsys):
    cfg = composed("dpo", f"loss={loss}", *long_rows)
    summary = train(cfg)
    told = capsys.readouterr().out
    count = "4 of 24" if loss == "kto" else "2 of 12"
    assert f"left out: {count} training rows" in told and "held_out_loses_everything" in told
    assert torch.isfinite(torch.tensor(summary["held_out"]["eval_loss"]))
    if loss not in ("kto", "sft"):
        looks = summary["snapshots"][-1]["by_length"]
        assert sum(each["pairs"] for each in looks) == 10
        accuracy = summary["held_out"]["eval_rewards/accuracies"]
        assert accuracy == pytest.approx(summary["accuracy_after"]) or loss != "dpo"


@pytest.mark.parametrize("loss", ODDS)
def test_without_a_max_length_nothing_is_cut(composed, tmp_path, loss):
    rows = [{"prompt": f"Say {i}.", "chosen": "word " * 200, "rejected": "No. " * 150} for i in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.path={tmp_path}/long.jsonl", "data.eval_fraction=0", "train.max_length=null"]
    trainer = build_trainer(composed("dpo", f"loss={loss}", *data))
    assert all(len(row["chosen_input_ids"]) > 1000 for row in trainer.train_dataset)
    eos = trainer.processing_class.eos_token_id
    assert all(eos in row["chosen_input_ids"][-3:] for row in trainer.train_dataset)


@pytest.mark.parametrize("loss", ODDS)
def test_the_cases_of_long_rows_train(composed, loss):
    folder = case("19-long-prompt")
    data = [f"data.path={folder}/train.jsonl", f"data.eval_split={folder}/eval.jsonl", "train.max_length=256"]
    summary = train(composed("dpo", f"loss={loss}", *data))
    assert torch.isfinite(torch.tensor(summary["held_out"]["eval_loss"]))
    other = Path(composed("dpo").output_dir).with_name("other")
    cfg = composed("dpo", f"loss={loss}", f"data.path={case('25-max-length-none')}/x.jsonl", "train.max_length=null",
                   f"output_dir={other}", "data.eval_fraction=0")  # fmt: skip
    assert max(len(row["chosen_input_ids"]) for row in build_trainer(cfg).train_dataset) > 512
