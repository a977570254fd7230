"""ORPO, CPO and SimPO: losses, metrics and gradients equal TRL's, without the logits."""

import pytest
import torch
from equality import assert_same, batch_of, close, outcome
from tiny_models import tiny_model
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

MEAN_LOGITS = ("logits/chosen", "logits/rejected")  # TRL's average over padding too
LOSSES = {
    "orpo": (ORPOTrainer, ORPOConfig, {}),
    "cpo": (CPOTrainer, CPOConfig, {}),
    "cpo hinge": (CPOTrainer, CPOConfig, {"loss_type": "hinge"}),
    "cpo ipo": (CPOTrainer, CPOConfig, {"loss_type": "ipo"}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "cpo-simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "gradient_checkpointing": True}),
    "alphapo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.1}),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_metrics_and_gradients_equal_trl(loss, family, trainers, pairs):
    cls, config, arguments = LOSSES[loss]
    assert_same(*trainers(cls, config, tiny_model(family), pairs, **arguments), skip=MEAN_LOGITS)


def test_mean_logits_equal_trl_where_no_row_is_padded(trainers):
    rows = [{"prompt": "Who?", "chosen": "The cat", "rejected": "The dog"}]
    assert_same(*trainers(ORPOTrainer, ORPOConfig, tiny_model("gemma2"), rows))


@pytest.mark.parametrize("loss", ["orpo", "cpo"])
def test_mean_logits_are_those_of_the_tokens_that_predict(loss, trainers, pairs):
    cls, config, arguments = LOSSES[loss]
    plain, packed = trainers(cls, config, tiny_model("gemma2"), pairs, **arguments)
    batch = batch_of(plain)
    _, metrics, _ = outcome(packed, batch)
    for side in ("chosen", "rejected"):
        ids, seen = batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]
        logits = plain.model(ids, attention_mask=seen).logits[:, :-1][seen[:, 1:].bool()]
        assert close(metrics[f"logits/{side}"], logits.mean())


def test_no_tensor_of_the_vocabulary_times_the_rows_is_built(trainers, pairs):
    shapes = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            shapes.extend(x.shape for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    plain, packed = trainers(ORPOTrainer, ORPOConfig, tiny_model("llama"), pairs)
    batch, vocabulary, found = batch_of(plain), plain.model.config.vocab_size, []
    for trainer in (plain, packed):
        shapes.clear()
        with Shapes():
            outcome(trainer, batch)
        found.append(max((len(shape) for shape in shapes if shape[-1:] == (vocabulary,)), default=0))
    assert found == [3, 2]
