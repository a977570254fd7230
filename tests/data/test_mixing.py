import copy

import pytest
import torch
from base_section import pair
from omegaconf import ListConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from preftune.data.findings import DataError
from preftune.models.embedded import folder


def named(name, count):
    return [pair(f"{name} {i}?", f"good {i}", f"bad {i}", id=f"{name}{i}") for i in range(count)]


def sources(data):
    return [name.rstrip("0123456789") for name in data.train["id"]]


def test_a_mixture_keeps_the_stated_proportion_with_no_row_twice(write, loaded):
    a, b = write("a.jsonl", named("a", 100)), write("b.jsonl", named("b", 50))
    path = ListConfig([{"path": a, "weight": 0.8}, {"path": b, "weight": 0.2}])
    data = loaded(path)
    assert (sources(data).count("a"), sources(data).count("b")) == (100, 25)
    assert len(set(data.train["id"])) == 125
    assert all(sources(data)[i : i + 5].count("b") <= 2 for i in range(120))
    assert loaded(path).fingerprint == data.fingerprint


def test_sources_of_different_shapes_and_columns_meet_in_one_form(write, loaded):
    labelled = [
        {"q": f"Which {i}?", "completion": text, "label": text == "yes"} for i in range(4) for text in ("yes", "no")
    ]
    path = ListConfig(
        [write("a.jsonl", named("a", 3)), {"path": write("b.jsonl", labelled), "columns": {"prompt": "q"}}]
    )
    assert len(loaded(path).train) == 7
    data = loaded(path, view="unpaired")
    assert len(data.train) == 14 and sum(data.train["label"]) == 7


def test_weights_for_some_sources_alone_are_refused(write, loaded):
    a = write("a.jsonl", named("a", 3))
    with pytest.raises(DataError, match="each source of a mixture needs a weight"):
        loaded(ListConfig([{"path": a, "weight": 0.8}, a]))
    with pytest.raises(DataError, match="data.pairs_rule: best is none of .*; did you mean best_rest"):
        loaded(ListConfig([a, {"path": a, "pairs_rule": "best"}]))
    with pytest.raises(DataError, match="wieght is none of .*; did you mean weight"):
        loaded(ListConfig([{"path": a, "wieght": 0.8}]))


SHOWN = [
    {"messages": [{"role": "user", "content": f"Show {i}"}, {"role": "assistant", "content": "Like so."}]}
    for i in range(5)
]


def test_demonstrations_make_the_stated_fraction_and_stand_spread_among_the_pairs(write, loaded):
    data = loaded(named("a", 80), sft_fraction=0.2, sft_path=write("sft.jsonl", SHOWN))
    shown = [row for row in data.train if row["id"].startswith("sft:")]
    assert len(shown) == 20 and len(data.train) == 100
    assert all(row["chosen"] == row["rejected"] for row in shown)
    assert all(sum(name.startswith("sft:") for name in data.train["id"][i : i + 5]) <= 2 for i in range(95))
    assert "identical_pair" not in [finding.code for finding in data.findings]


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(folder("embedded://tiny"), dtype=torch.float32)


@pytest.fixture
def gradient(tiny, byte_tokenizer, tmp_path):
    """gradient(DPOTrainer, DPOConfig, rows, …): the gradient of one batch of all rows, as one vector."""

    def of(trainer_class, config_class, rows, **arguments):
        model = copy.deepcopy(tiny)
        torch.manual_seed(1)
        reference = copy.deepcopy(model)
        for weight in model.parameters():  # a policy that is not its reference, so that margins are not 0
            weight.data += 0.02 * torch.randn_like(weight)
        args = config_class(
            str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", max_length=None,
            per_device_train_batch_size=len(rows), disable_tqdm=True, **arguments,
        )  # fmt: skip
        more = {"ref_model": reference} if trainer_class is DPOTrainer else {}
        trainer = trainer_class(model, args=args, train_dataset=rows, processing_class=byte_tokenizer, **more)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        return torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None])

    return of


def two_sets(write, loaded):
    """(pairs and demonstrations, demonstrations alone)."""
    both = loaded(named("a", 2), sft_fraction=0.5, sft_path=write("sft.jsonl", SHOWN)).train
    return both, both.filter(lambda row: row["id"].startswith("sft:"))


CANCELLING = [["sigmoid"], ["hinge"], ["ipo"], ["robust"], ["sigmoid_norm"], ["discopop"], ["exo_pair"], ["apo_zero"]]


@pytest.mark.parametrize("loss_type", CANCELLING, ids=lambda names: names[0])
def test_demonstrations_have_no_gradient_in_the_preference_term(loss_type, write, loaded, gradient):
    both, shown = two_sets(write, loaded)
    more = {"label_smoothing": 0.1} if loss_type[0] in ("robust", "exo_pair") else {}
    alone = gradient(DPOTrainer, DPOConfig, shown, loss_type=loss_type, **more)
    mixed = gradient(DPOTrainer, DPOConfig, both, loss_type=loss_type, **more)
    assert alone.abs().max() < 1e-6 < mixed.abs().max() / 100


def test_demonstrations_have_exactly_the_gradient_of_the_sft_term(write, loaded, gradient):
    both, shown = two_sets(write, loaded)
    with_sft = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    sft = {"loss_type": ["sft"], "loss_weights": [0.5]}
    assert torch.allclose(
        gradient(DPOTrainer, DPOConfig, shown, **with_sft), gradient(DPOTrainer, DPOConfig, shown, **sft), atol=1e-6
    )
    preference = gradient(DPOTrainer, DPOConfig, both, loss_type=["sigmoid"])
    whole = gradient(DPOTrainer, DPOConfig, both, **with_sft)
    assert torch.allclose(whole - preference, gradient(DPOTrainer, DPOConfig, both, **sft), atol=1e-5)


@pytest.mark.parametrize(
    ("trainer", "config", "arguments"),
    [(ORPOTrainer, ORPOConfig, {}), (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 1.0})],
    ids=["orpo", "cpo_simpo"],
)
def test_orpo_and_cpo_learn_demonstrations_by_their_nll_term_alone(trainer, config, arguments, write, loaded, gradient):
    _, shown = two_sets(write, loaded)
    mild, strong = (gradient(trainer, config, shown, beta=beta, **arguments) for beta in (0.1, 2.0))
    assert mild.norm() > 1e-2
    assert torch.allclose(mild, strong, atol=1e-5)  # β weighs the preference term, which is constant here
