"""Where each token of a padded batch goes, so that a pair shares what its rows have in common and padding all but goes.

A pair becomes a tree: the tokens that both rows begin with, once, then the rest of each row. Trees of different lengths
stand side by side in the rows of the packed batch::

    TRL's rows                         one tree
    chosen    p p p c c c .            p p p c c r r r
    rejected  p p p r r r r            0 1 2 3 4 3 4 5    position ids

A row's last token is left out: nothing is predicted from it. A batch without pairs has one row a tree.
"""

import heapq
from dataclasses import dataclass, replace

import numpy as np
import torch

IGNORED = -100  # the label of a token that is not scored, as in PyTorch's cross-entropy


@dataclass(frozen=True)
class Layout:
    """A packed batch of R rows and C columns, and the way back to the (rows, columns − 1) of the batch it came from."""

    input_ids: torch.Tensor  # (R, C)
    position_ids: torch.Tensor  # (R, C), as in the row that the token came from
    tree: torch.Tensor  # (R, C), the tree that a token belongs to; −1 is padding
    branch: torch.Tensor  # (R, C), the row that a token came from, counted from 1; 0 where both rows of a pair share it
    picks: torch.Tensor  # (N,), flat positions in (R, C) whose hidden states are scored
    targets: torch.Tensor  # (N,), the token that each of them is to predict
    scored: torch.Tensor  # (rows, columns − 1), True where the batch has a label
    slots: torch.Tensor  # (scored.sum(),), the pick that answers each True of `scored`, row by row
    source: torch.Tensor  # (rows, columns − 1), the flat position in (R, C) of each token kept; −1 elsewhere

    def to(self, device: torch.device) -> "Layout":
        """The same layout on another device."""
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    def tokens_run(self) -> tuple[int, int]:
        """How many tokens of the packed batch are padding, and how many there are."""
        return int((self.tree < 0).sum()), self.tree.numel()


def common_start(first: np.ndarray, second: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """How many tokens the rows of two (pairs, columns) arrays begin with in common, at most `limit` (pairs,)."""
    same = (first == second) & (np.arange(first.shape[1]) < limit[:, None])
    return np.logical_and.accumulate(same, axis=1).sum(axis=1)


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
def lay_out(input_ids: torch.Tensor, labels: torch.Tensor, pairs: bool, width: int, multiple: int = 1) -> Layout:
    """Pack a right-padded batch, on the CPU; where `pairs`, row i of its second half is the other answer to row i.

    `width` is the model's hidden size, by which the cost of longer rows is weighed; the packed rows' length is a
    multiple of `multiple`. At least one token has a label, and no token of the padding.
    """
    ids, labels = input_ids.cpu().numpy(), labels.cpu().numpy()[:, 1:]
    rows, steps = len(ids), np.arange(labels.shape[1])
    tree = np.arange(rows) % (rows // 2 if pairs else rows)
    used = np.where(labels != IGNORED, steps + 1, 0).max(axis=1)  # tokens that a row's last label is predicted from
    shared, moved = np.zeros_like(used), np.zeros_like(used)
    if pairs:
        first, second = used.reshape(2, -1)
        chosen, rejected = ids[:, :-1].reshape(2, rows // 2, -1)
        begin = common_start(chosen, rejected, np.minimum(first, second))
        shared = np.tile(begin, 2)
        moved[rows // 2 :] = first - begin  # the second row's own tokens follow all of the first's
    sizes = np.zeros(tree.max() + 1, dtype=int)
    np.maximum.at(sizes, tree, used + moved)
    starts, shape = place(sizes, width, multiple)

    own = steps >= shared[:, None]
    kept = steps < used[:, None]
    source = starts[tree][:, None] + steps + own * moved[:, None]

    def packed(values: np.ndarray, empty: int = 0) -> torch.Tensor:
        flat = np.full(shape[0] * shape[1], empty, dtype=np.int64)
        flat[source[kept]] = np.broadcast_to(values, kept.shape)[kept]
        return torch.from_numpy(flat.reshape(shape))

    scored = labels != IGNORED
    # A token that both rows score after the same tokens is scored once
    tokens = labels.max() + 1
    wanted, slots = np.unique(source[scored] * tokens + labels[scored], return_inverse=True)
    return Layout(
        input_ids=packed(ids[:, :-1]),
        position_ids=packed(steps),
        tree=packed(tree[:, None], empty=-1),
        branch=packed(own * np.arange(1, rows + 1)[:, None]),
        picks=torch.from_numpy(wanted // tokens),
        targets=torch.from_numpy(wanted % tokens),
        scored=torch.from_numpy(scored),
        slots=torch.from_numpy(slots),
        source=torch.from_numpy(np.where(kept, source, -1)),
    )
