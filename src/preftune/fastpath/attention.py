"""The mask of a packed batch, in the form that the model's attention takes."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from preftune.fastpath.layout import Packed

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the two kinds of layer
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")  # those that take a mask of any pattern
BLOCK = 128  # flex_attention's block


def row_multiple(config: PreTrainedConfig, device: torch.device) -> int:
    """What the length of a packed row should be a multiple of, for the attention's kernels to run at full speed."""
    if config._attn_implementation == "flex_attention":
        return BLOCK
    return 8 if device.type == "cuda" else 1


def sees(layout: Packed, window: int | None = None) -> Callable:
    """A function of (row, head, query, key) indices: whether that query attends to that key.

    It does where both are in one tree, the key is shared or in the query's own branch, and in the row that TRL would
    have run it comes no later, nor `window` tokens or more before. Padding attends to padding: no query lacks a key.
    """
    tree, branch, position = layout.tree, layout.branch, layout.position_ids

    def visible(row, head, query, key):
        ahead = position[row, query] - position[row, key]
        seen = (tree[row, query] == tree[row, key]) & (ahead >= 0)
        seen = seen & ((branch[row, key] == 0) | (branch[row, key] == branch[row, query]))
        return seen if window is None else seen & (ahead < window)

    return visible


def mask(layout: Packed, implementation: str, dtype: torch.dtype, window: int | None = None) -> object:
    """What to give as `attention_mask`: a (R, 1, C, C) boolean or additive tensor, or flex_attention's BlockMask."""
    rows, columns = layout.tree.shape
    device = layout.tree.device
    visible = sees(layout, window)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(visible, rows, None, columns, columns, device=device, BLOCK_SIZE=BLOCK)
    row = torch.arange(rows, device=device)[:, None, None]
    column = torch.arange(columns, device=device)
    seen = visible(row, None, column[:, None], column[None, :])[:, None]
    if implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


def masks(layout: Packed, config: PreTrainedConfig, dtype: torch.dtype) -> object:
    """The mask of every layer: one where all layers are of a kind, else a dict of two by transformers' layer types."""
    implementation = config._attn_implementation
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ([FULL] if window is None else [SLIDING]))
    built = {kind: mask(layout, implementation, dtype, window if kind == SLIDING else None) for kind in kinds}
    return built if len(built) > 1 else next(iter(built.values()))
