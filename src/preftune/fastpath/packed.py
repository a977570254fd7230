"""The packed form: a pair's unique tokens side by side in one row, under a mask that hides each answer from the other.

Rows that begin alike become a tree: the tokens they begin with, once, then the rest of each row. Trees of different
lengths stand side by side in the rows of the packed batch::

    TRL's rows                         one tree
    chosen    p p p c c c .            p p p c c r r r
    rejected  p p p r r r r            0 1 2 3 4 3 4 5    position ids

A row that shares nothing is a tree by itself. The form needs layers of plain attention that take any mask.
"""

import heapq
import inspect

import numpy as np
import torch
from transformers import PreTrainedModel

from preftune.fastpath.attention import FULL, IMPLEMENTATIONS, SLIDING, masks, row_multiple
from preftune.fastpath.layout import Packed, Ran, Rows, way_back


def why_not(model: PreTrainedModel, backbone: PreTrainedModel) -> str | None:
    """Why `model`, whose text runs through `backbone`, cannot be packed, as far as its code tells; else None."""
    config = backbone.config
    odd = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if getattr(model, "_is_stateful", False) or odd:
        return f"layers that are not plain attention ({', '.join(sorted(odd)) or 'recurrent'})"
    if config._attn_implementation not in IMPLEMENTATIONS:
        return f"attn_implementation={config._attn_implementation} takes no mask; {', '.join(IMPLEMENTATIONS)} do"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(model).__name__} takes no position ids"
    if any(buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] > 1 for buffer in model.buffers()):
        return "layers that build their own masks"
    return None


def place(sizes: np.ndarray, width: int, multiple: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Fit trees of these sizes into rows: the flat position at which each begins, and the packed batch's (R, C).

    Few long rows waste the least on padding but the most on masked attention, so every number of rows is tried, the
    longest tree going first into the emptiest row, and the cheapest kept: R·C tokens at 6·width + C each, which is what
    a transformer layer of 12·width² weights computes, but for a factor.
    """
    order = np.argsort(-sizes, kind="stable").tolist()
    longest = int(sizes.max())
    best = None
    for rows in range(-(-int(sizes.sum()) // max(longest, 4 * width)), len(sizes) + 1):
        loads, begins = [(0, row) for row in range(rows)], {}
        for tree in order:
            load, row = loads[0]
            begins[tree] = (row, load)
            heapq.heapreplace(loads, (load + int(sizes[tree]), row))
        columns = max(loads)[0]
        columns += -columns % multiple
        cost = rows * columns * (6 * width + columns)
        if best is None or cost < best[0]:
            best = (cost, begins, (rows, columns))
        if columns < longest + multiple:
            break
    _, begins, (rows, columns) = best
    return np.array([begins[tree][0] * columns + begins[tree][1] for tree in range(len(sizes))]), (rows, columns)


@torch.compiler.disable
def lay_out(rows: Rows, width: int, multiple: int = 1) -> Packed:
    """Pack a batch; `width` is the model's hidden size, by which the cost of longer rows is weighed.

    The packed rows' length is a multiple of `multiple`.
    """
    moved = np.zeros_like(rows.used)  # a row's own tokens follow those of the rows before it in its tree
    sizes = np.zeros(rows.group.max() + 1, dtype=int)
    for row, tree in enumerate(rows.group):
        moved[row] = max(sizes[tree] - rows.shared[row], 0)
        sizes[tree] = rows.used[row] + moved[row]
    starts, shape = place(sizes, width, multiple)
    source = starts[rows.group][:, None] + rows.steps + rows.own * moved[:, None]

    def packed(values: np.ndarray, empty: int = 0) -> torch.Tensor:
        flat = np.full(shape[0] * shape[1], empty, dtype=np.int64)
        flat[source[rows.kept]] = np.broadcast_to(values, rows.kept.shape)[rows.kept]
        return torch.from_numpy(flat.reshape(shape))

    return Packed(
        input_ids=packed(rows.ids),
        position_ids=packed(rows.steps),
        tree=packed(rows.group[:, None], empty=-1),
        branch=packed(rows.own * np.arange(1, len(rows.ids) + 1)[:, None]),
        **way_back(rows, source, shape[0] * shape[1]),
    )


def lay_out_for(backbone: PreTrainedModel, rows: Rows) -> Packed:
    """Pack a batch for the attention of `backbone`."""
    return lay_out(rows, backbone.config.hidden_size, row_multiple(backbone.config, backbone.device))


def run(backbone: PreTrainedModel, layout: Packed, **options: object) -> Ran:
    """Run a batch; N = R·C."""
    outputs = backbone(
        input_ids=layout.input_ids,
        attention_mask=masks(layout, backbone.config, backbone.dtype),
        position_ids=layout.position_ids,
        use_cache=False,
        **options,
    )
    return Ran(outputs.last_hidden_state.flatten(0, 1), getattr(outputs, "router_logits", None))
