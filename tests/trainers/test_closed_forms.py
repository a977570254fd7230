"""What TRL computes under each file of conf/loss is the loss of the paper, value and gradient."""

import inspect
from pathlib import Path

import closed_forms
import pytest
import torch
import trl_batches
from datasets import Dataset
from hydra import compose, initialize_config_module
from hydra.utils import get_class

from preftune.config.stages import RESERVED
from preftune.data.load import Data
from preftune.runs.training import build_trainer

OTHERS = ("reward", "rloo", "grpo", "online_dpo")  # test_rewards.py compares these with TRL
FILES = (Path(__file__).parents[2] / "conf" / "loss").glob("*.yaml")
LOSSES = sorted(path.stem for path in FILES if path.stem not in OTHERS)
ANSWERS = [
    ("What is two plus two?", "Four.", "That is a very good question, thank you."),
    ("Name a colour.", "Blue, like the sky.", "No."),
    ("Is water wet?", "Yes.", "I could not possibly say."),
    ("Where does the sun rise?", "In the east.", "Somewhere."),
    ("How many legs has a spider?", "Eight legs.", "Who knows"),
    ("Say hello.", "Hello!", "I would rather talk about the weather today."),
    ("Capital of France?", "Paris is the capital.", "Lyon"),
    ("Opposite of up?", "Down.", "It depends on many things."),
]


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def rows(view: str) -> Dataset:
    """The eight pairs as the trainers of a view eat them; unpaired, good and bad answers take turns."""
    sides = {"paired": ("chosen", "rejected"), "unpaired": ("completion",), "demonstrations": ("completion",)}
    made = []
    for number, (prompt, *answers) in enumerate(ANSWERS):
        good = number % 2 == 0 or view != "unpaired"
        answers = answers if good else answers[::-1]
        row = {side: said("assistant", text) for side, text in zip(sides[view], answers, strict=False)}
        made.append({"prompt": said("user", prompt), **row, **({"label": good} if view == "unpaired" else {})})
    return Dataset.from_list(made)


def config(*overrides: str):
    """A composed recipe on the tiny model, its forward TRL's own, for three steps of four rows."""
    small = ["train.max_steps=3", "train.learning_rate=3e-3", "train.save_strategy=no", "output_dir=???"]
    machine = ["hardware=cpu", "hardware.bf16=false", "hardware.per_device_train_batch_size=4", "tracking=none"]
    with initialize_config_module("preftune.conf", version_base="1.3"):
        return compose("dpo", ["model=tiny", "lora=none", "fastpath.enabled=false", *small, *machine, *overrides])


def trainer_of(cfg, output_dir):
    """The trainer that preftune builds from `cfg`, on the eight pairs."""
    cfg.output_dir = str(output_dir)
    return build_trainer(cfg, Data(train=rows(cfg.loss.view)))


def closed_form(name: str, loss, batch: dict, policy, reference) -> torch.Tensor:
    """The paper's loss on a trainer's batch, from log-probs of our own and the hyperparameters of the loss file."""
    formula = getattr(closed_forms, name)
    values = {key: loss[key] for key in inspect.signature(formula).parameters if key in loss}
    return formula(getattr(trl_batches, loss.view)(batch, policy, reference), **values)


def assert_equal(trainer, name: str, loss, reference) -> float:
    """TRL's loss on a batch of the trainer is the closed form, in value and in gradient; returns it."""
    batch = next(iter(trainer.get_train_dataloader()))
    policy = trl_batches.plain(trainer.model)
    trainer.model.zero_grad()
    got = trainer.compute_loss(trainer.model, dict(batch))
    got.backward()
    want = closed_form(name, loss, batch, policy, reference)
    want.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-5)
    ours, theirs = (torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (policy, trainer.model))
    assert (theirs - ours).norm() < 1e-4 * ours.norm()
    return got.item()


@pytest.mark.parametrize("name", LOSSES)
def test_trl_computes_the_papers_loss_before_and_after_some_steps(name, tmp_path):
    cfg = config(f"loss={name}")
    trainer = trainer_of(cfg, tmp_path)
    reference = trl_batches.plain(trainer.model)
    before = assert_equal(trainer, name, cfg.loss, reference)
    if name in closed_forms.AT_STEP_0:
        assert before == pytest.approx(closed_forms.AT_STEP_0[name](cfg.loss), rel=1e-5)
    trainer.train()
    if cfg.loss.get("sync_ref_model"):
        reference = trl_batches.plain(trainer.ref_model)
    after = assert_equal(trainer, name, cfg.loss, reference)
    assert after != pytest.approx(before, rel=1e-7)


def test_ipo_is_per_token_and_not_the_papers_sum(tmp_path):
    cfg = config("loss=ipo")
    trainer = trainer_of(cfg, tmp_path)
    reference = trl_batches.plain(trainer.model)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = trl_batches.paired(batch, trl_batches.plain(trainer.model), reference)
    on_sums = (pairs.up - pairs.down - 1 / (2 * cfg.loss.beta)).square().mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(on_sums, rel=0.1)


def test_the_kl_term_of_kto_counts_after_some_steps(tmp_path):
    cfg = config("loss=kto", "loss.beta=0.5", "loss.desirable_weight=4")  # good rows lead: every answer gains
    trainer = trainer_of(cfg, tmp_path)
    reference = trl_batches.plain(trainer.model)
    trainer.train()
    assert_equal(trainer, "kto", cfg.loss, reference)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = trl_batches.unpaired(batch, trl_batches.plain(trainer.model), reference)
    assert (rows.mismatched - rows.ref_mismatched).mean() > 0.01
    rows.mismatched = rows.ref_mismatched
    without = closed_forms.kto(rows, cfg.loss.beta, 4.0, 1.0).item()
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(without, abs=1e-4)


def test_aot_compares_quantiles_where_training_has_changed_the_order_of_the_margins(tmp_path):
    longer = ["train.max_steps=12", "train.learning_rate=1e-2", "hardware.per_device_train_batch_size=8"]
    cfg = config("loss=aot", *longer)
    trainer = trainer_of(cfg, tmp_path)
    reference = trl_batches.plain(trainer.model)
    trainer.train()
    assert_equal(trainer, "aot", cfg.loss, reference)
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = trl_batches.paired(batch, trl_batches.plain(trainer.model), reference)
    policy, before = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    assert policy.argsort().tolist() != before.argsort().tolist()
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(closed_forms.dpo(pairs, 0.1).item())


def test_robust_with_a_negative_label_smoothing_is_cdpo(tmp_path):
    cfg = config("loss=robust", "loss.label_smoothing=-0.125")
    trainer = trainer_of(cfg, tmp_path)
    reference = trl_batches.plain(trainer.model)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = trl_batches.paired(batch, trl_batches.plain(trainer.model), reference)
    want = closed_forms.cdpo(pairs, cfg.loss.beta, label_smoothing=0.1).item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(want, rel=1e-5)


def test_scoring_the_reference_before_training_changes_no_loss(tmp_path):
    cfg = config("loss=dpo", "loss.precompute_ref_log_probs=false")
    trainer = trainer_of(cfg, tmp_path)
    reference = trl_batches.plain(trainer.model)
    trainer.train()
    assert_equal(trainer, "dpo", cfg.loss, reference)  # as it is with true, in the test above


def test_discopop_starts_on_a_slope_that_points_the_wrong_way():
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(1, dtype=torch.float64)
    pairs = closed_forms.Pairs(margin, nothing, nothing, nothing, *4 * [nothing])
    closed_forms.discopop(pairs, beta=0.05, discopop_tau=0.05).backward()
    assert margin.grad > 0


@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_every_key_of_a_loss_is_one_of_its_trainers_and_beta_can_be_set(name):
    loss = config(f"loss={name}").loss
    arguments = get_class(loss.trainer.removesuffix("Trainer") + "Config").__dataclass_fields__
    assert set(loss) - set(arguments) <= set(RESERVED["loss"])
    assert ("beta" in loss) == (name not in ("sft", "reward"))
    if "beta" in loss:
        assert config(f"loss={name}", "loss.beta=0.37").loss.beta == 0.37


def test_simpos_margin_follows_beta_through_the_papers_ratio():
    loss = config("loss=simpo", "loss.beta=10", "loss.gamma_beta_ratio=0.3").loss
    assert loss.simpo_gamma == pytest.approx(3)
    assert loss.cpo_alpha == 0


@pytest.mark.parametrize(
    ("name", "unit"), [("dpo", "sum"), ("ipo", "sum"), ("cpo", "sum"), ("simpo", "mean"), ("orpo", "mean")]
)
def test_the_logged_logps_are_sums_or_means_as_docs_losses_says(name, unit, tmp_path):
    cfg = config(f"loss={name}")
    trainer = trainer_of(cfg, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = trl_batches.paired(batch, trl_batches.plain(trainer.model), trl_batches.plain(trainer.model))
    trainer.compute_loss(trainer.model.train(), dict(batch))
    logged = (trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics)["train"]["logps/chosen"][
        -1
    ]
    want = pairs.chosen if unit == "sum" else pairs.chosen / pairs.chosen_tokens
    assert logged == pytest.approx(want.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "simpo"])
def test_the_fast_path_computes_the_same_loss(name, tmp_path):
    cfg = config(f"loss={name}", "fastpath.enabled=true")
    trainer = trainer_of(cfg, tmp_path)
    reference = trl_batches.plain(trainer.model)
    trainer.train()
    assert_equal(trainer, name, cfg.loss, reference)
