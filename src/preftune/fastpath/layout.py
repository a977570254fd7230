"""Where each token of a padded batch is run, and the way back: what the forms of the fast path have in common.

A form runs N tokens in place of the rows × columns of TRL's batch. The tokens that rows of a group begin with (a pair's
prompt) are among them once; a row's last token is left out unless asked for, as nothing is predicted from it.
"""

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from os.path import commonprefix
from typing import NamedTuple, Self

import numpy as np
import torch

from preftune.fastpath.host import IGNORED, on_device


@dataclass(frozen=True)
class Layout:
    """The way back from the N tokens that are run to the (rows, columns − 1) of the batch they came from.

    It is laid out in host memory, and moved.
    """

    picks: torch.Tensor  # (M,), which of the N hidden states are scored
    targets: torch.Tensor  # (M,), the token that each of them is to predict
    scored: torch.Tensor  # (rows, columns − 1), True where the batch has a label
    slots: torch.Tensor  # (scored.sum(),), the pick that answers each True of `scored`, row by row
    source: torch.Tensor  # (rows, columns − 1), which of the N each token kept is; −1 elsewhere
    counts: torch.Tensor  # (N,), how many tokens of the batch each of the N stands for; 0 is padding

    @torch.compiler.disable
    def to(self, device: torch.device) -> Self:
        """The same layout on another device."""
        return replace(self, **{each.name: on_device(getattr(self, each.name), device) for each in fields(self)})

    @torch.compiler.disable
    def others(self) -> torch.Tensor:
        """Which of the N are tokens of the batch and not scored, of a layout in host memory."""
        rest = self.counts > 0
        rest[self.picks] = False
        return rest.nonzero()[:, 0]

    @torch.compiler.disable
    def tokens_run(self) -> tuple[int, int]:
        """How many of the tokens that are run are padding, and how many there are."""
        return int((self.counts == 0).sum()), self.counts.numel()


@dataclass(frozen=True)
class Packed(Layout):
    """A packed batch of R rows and C columns, N = R·C."""

    input_ids: torch.Tensor  # (R, C)
    position_ids: torch.Tensor  # (R, C), as in the row that the token came from
    tree: torch.Tensor  # (R, C), the tree that a token belongs to; −1 is padding
    branch: torch.Tensor  # (R, C), the row that a token came from, counted from 1; 0 where all rows of a tree share it


class Ran(NamedTuple):
    """What a form gives: `hidden` (N, width) after the final norm, and the routers' logits where they are asked for."""

    hidden: torch.Tensor
    router_logits: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True)
class Rows:
    """A right-padded batch as arrays: what is run of each row, and how it begins.

    `labels` are those of the next token. Rows of a group begin alike: a pair, or more answers to one prompt. A row that
    shares nothing is a group of its own, and its `shared` is 0.
    """

    ids: np.ndarray  # (rows, steps)
    labels: np.ndarray  # (rows, steps)
    used: np.ndarray  # (rows,), tokens that are run of a row
    shared: np.ndarray  # (rows,), tokens that a row begins with as its group does
    group: np.ndarray  # (rows,), the number of a row's group, in the order of their first rows
    columns: int  # of the batch

    @property
    def steps(self) -> np.ndarray:
        return np.arange(self.ids.shape[1])

    @property
    def kept(self) -> np.ndarray:
        return self.steps < self.used[:, None]

    @property
    def own(self) -> np.ndarray:
        return self.steps >= self.shared[:, None]


def grouped(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(group, shared) of rows of tokens: those that begin alike are joined where that makes a step cheaper.

    In the order of their tokens, neighbours have the most in common; the longest common starts are joined first. T
    tokens that stand side by side cost T · (6·width + T): weights, and attention under a mask.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    common = [len(commonprefix([rows[i], rows[j]])) for i, j in pairwise(order)]
    parts = {i: [i] for i in order}  # a row's group, the same list for each of its rows
    shared = dict.fromkeys(order, 0)

    def cost(members: list[int], start: int) -> int:
        size = start + sum(len(rows[i]) - start for i in members)
        return size * (6 * width + size)

    for place in sorted(range(len(common)), key=lambda place: -common[place]):
        left, right = parts[order[place]], parts[order[place + 1]]
        apart = cost(left, shared[left[0]]) + cost(right, shared[right[0]])
        joined = left + right
        if common[place] and cost(joined, common[place]) <= apart:
            parts |= dict.fromkeys(joined, joined)
            shared |= dict.fromkeys(joined, common[place])
    firsts = sorted({min(each) for each in parts.values()})
    group = [firsts.index(min(parts[i])) for i in range(len(rows))]
    return np.array(group), np.array([shared[i] for i in range(len(rows))])


@torch.compiler.disable
def read_rows(
    input_ids: torch.Tensor, labels: torch.Tensor, width: int, attention_mask: torch.Tensor | None = None
) -> Rows:
    """The rows of a right-padded batch, on the CPU; `width` is the model's hidden size, by which costs are weighed.

    At least one token has a label, and no token of the padding. With `attention_mask` every token is run, the last one
    too: a router's auxiliary loss counts them all.
    """
    columns, ids, wanted = input_ids.shape[1], input_ids.cpu().numpy(), labels.cpu().numpy()[:, 1:]
    if attention_mask is None:
        ids = ids[:, :-1]
        used = np.where(wanted != IGNORED, np.arange(1, columns), 0).max(axis=1)
    else:
        wanted = np.pad(wanted, ((0, 0), (0, 1)), constant_values=IGNORED)
        used = attention_mask.cpu().numpy().sum(axis=1)
    group, shared = grouped([row[:count].tolist() for row, count in zip(ids, used, strict=True)], width)
    return Rows(ids, wanted, used, shared, group, columns)


def way_back(rows: Rows, source: np.ndarray, size: int) -> dict[str, torch.Tensor]:
    """The fields of a Layout where `source` (rows, steps) says which of the `size` tokens run each token is."""
    scored = rows.labels != IGNORED
    # A token that rows score after the same tokens is scored once
    tokens = rows.labels.max() + 1
    wanted, slots = np.unique(source[scored] * tokens + rows.labels[scored], return_inverse=True)
    found = {
        "picks": wanted // tokens,
        "targets": wanted % tokens,
        "scored": scored[:, : rows.columns - 1],
        "slots": slots,
        "source": np.where(rows.kept, source, -1)[:, : rows.columns - 1],
        "counts": np.bincount(source[rows.kept], minlength=size),
    }
    return {name: torch.from_numpy(values) for name, values in found.items()}
