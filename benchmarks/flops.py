"""Floating-point operations, counted by PyTorch on a few batches and carried to all others by the shapes they run in.

What a batch costs is linear in three numbers of each forward: its tokens, its tokens × the length of its rows
(attention, dense, as kernels compute it), and the positions that the head scores. The factors are fitted to batches
that `FlopCounterMode` has counted, more than there are factors; `fit` says by how much the worst of these misses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from preftune.fastpath.applies import FORMS, backbone
from preftune.fastpath.host import IGNORED
from preftune.fastpath.layout import read_rows
from preftune.plan.measure import COUNTED

ANY_WIDTH = 10**6  # at which whatever rows begin with in common is run once

# No product that is added in place is counted by PyTorch, as the backward of TRL's head on CPU is
UNCOUNTED = COUNTED | {torch.ops.aten.addmm_: lambda added, left, right, **_: 2 * left[0] * left[1] * right[1]}


@dataclass(frozen=True)
class Forward:
    """One forward of a training step: padded ids and labels (rows, columns), and whether it is learned from."""

    ids: torch.Tensor
    labels: torch.Tensor
    pairs: bool = False
    learned: bool = True
    everywhere: bool = False  # the head runs over all positions, whatever the labels

    def shape(self, form: str | None, backbone: PreTrainedModel, width: int) -> list[float]:
        """Tokens, tokens × what attention runs each against, and positions scored; `form` None: as TRL runs it.

        `width` weighs what rows share against what attention runs more.
        """
        if form is None:
            rows, columns = self.ids.shape
            return [rows * columns, rows * columns * columns, rows * columns]
        layout = FORMS[form].lay_out_for(backbone, read_rows(self.ids, self.labels, width))
        scored = int((layout.counts > 0).sum()) if self.everywhere else len(layout.picks)
        if form == "packed":
            rows, columns = layout.input_ids.shape
            return [rows * columns, rows * columns * columns, scored]
        (pairs, before), (rows, after) = layout.prompt_ids.shape, layout.answer_ids.shape
        return [layout.counts.numel(), pairs * before * before + rows * after * (before + after), scored]


def forwards(trainer, inputs: dict) -> list[Forward]:
    """The forwards that a step on these inputs makes of the policy; the reference's have the same shapes."""
    if "chosen_input_ids" in inputs:  # ORPO
        joined = trainer.concatenated_inputs(inputs, device="cpu")
        ids, seen = joined["concatenated_input_ids"], joined["concatenated_attention_mask"]
        pairs = len(ids) // 2
        labels = torch.cat([ids.masked_fill(seen == 0, IGNORED)[:pairs], joined["concatenated_labels"][pairs:]])
        return [Forward(ids, labels, pairs=True, everywhere=True)]
    found = []
    for prefix in ("", "KL_"):
        if f"{prefix}input_ids" in inputs:
            ids = inputs[f"{prefix}input_ids"]
            labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, IGNORED)
            found.append(Forward(ids, labels, pairs="label" not in inputs, learned=not prefix))
    return found


def features(trainer, inputs: dict, form: str | None) -> list[float]:
    """What the cost of a step on these inputs is linear in, three numbers per forward.

    `form`: as preftune lays them out in it; "alone": a pair at a time, without padding; None: as TRL does.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    text = backbone(model.get_base_model() if is_peft_model(model) else model)
    shapes = []
    for forward in forwards(trainer, inputs):
        if form == "alone":
            shapes += np.sum([each.shape("packed", text, ANY_WIDTH) for each in alone(forward)], axis=0).tolist()
        else:
            shapes += forward.shape(form, text, text.config.hidden_size)
    return shapes


def alone(forward: Forward) -> list[Forward]:
    """The same forward, a pair or row at a time."""
    count = len(forward.ids) // 2 if forward.pairs else len(forward.ids)
    kept = [[i, i + count] if forward.pairs else [i] for i in range(count)]
    return [
        Forward(forward.ids[rows], forward.labels[rows], forward.pairs, forward.learned, forward.everywhere)
        for rows in kept
    ]


def no_reference(inputs: dict) -> dict:
    """Reference log-probs of zero, in the columns that the loss of these inputs reads."""
    zeros = torch.zeros(len(inputs["input_ids"]))
    if "label" in inputs:
        return {"ref_logps": zeros, "ref_KL_logps": zeros}
    half = zeros[: len(zeros) // 2]
    return {"ref_chosen_logps": half, "ref_rejected_logps": half}


def count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        run()
    return counter.get_total_flops()


def fit(run: Callable[[dict], None], examples: list[dict], trainer, form: str | None) -> tuple[np.ndarray, float]:
    """FLOP per feature, fitted to what `run` costs on the examples, and the largest relative error there."""
    shapes = np.array([features(trainer, inputs, form) for inputs in examples], dtype=float)
    counted = np.array([count(lambda inputs=inputs: run(inputs)) for inputs in examples], dtype=float)
    scale = shapes.max(axis=0)
    factors, *_ = np.linalg.lstsq(shapes / scale / counted[:, None], np.ones(len(counted)), rcond=None)
    factors /= scale
    return factors, float(np.abs(shapes @ factors / counted - 1).max())
