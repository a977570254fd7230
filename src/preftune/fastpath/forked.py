"""The forked form: each prompt once with the cache on, the cache copied for its answers, the answers on it.

It needs no mask of its own, so any attention kernel serves it, and layers with a state (convolution, state space,
linear attention) too, as their state is copied like keys and values. Gradients flow through the cache. A batch whose
rows do not begin alike is run row by row as it is.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, logging

from preftune.fastpath.layout import Layout, Ran, Rows, way_back

CACHE_NAMES = ("past_key_values", "cache_params", "layer_past")


@dataclass(frozen=True)
class Forked(Layout):
    """Prompts (groups, P), padded on the left, and what follows them (rows, A), padded on the right; P may be 0."""

    prompt_ids: torch.Tensor
    prompt_seen: torch.Tensor
    answer_ids: torch.Tensor
    answer_seen: torch.Tensor
    starts: torch.Tensor  # (rows,), the position of a row's first token of its own
    prompt_starts: torch.Tensor  # (groups,), the position that the padding of a prompt begins at
    group: torch.Tensor  # (rows,), the prompt of a row


def why_not(model: PreTrainedModel, backbone: PreTrainedModel) -> str | None:
    """Why `model` cannot be forked; None where it can, as far as its code tells."""
    if not set(CACHE_NAMES) & set(inspect.signature(backbone.forward).parameters):
        return f"{type(model).__name__} keeps no cache that can be copied"
    return None


@torch.compiler.disable
def lay_out_for(backbone: PreTrainedModel, rows: Rows) -> Forked:
    """Fork a batch."""
    rows = replace(rows, shared=split_at(rows))
    groups, shared = rows.group.max() + 1, rows.shared
    before = int(shared.max())
    after = max(int((rows.used - shared).max()), 1)  # answers may be one and the same
    begun = groups * before
    at_prompt = rows.group[:, None] * before + (before - shared)[:, None] + rows.steps
    at_answer = begun + np.arange(len(shared))[:, None] * after + rows.steps - shared[:, None]
    source = np.where(rows.own, at_answer, at_prompt)
    size = begun + len(shared) * after
    ids, seen = np.zeros((2, size), dtype=np.int64)
    ids[source[rows.kept]], seen[source[rows.kept]] = rows.ids[rows.kept], 1
    parts = {
        "prompt_ids": ids[:begun].reshape(groups, before),
        "prompt_seen": seen[:begun].reshape(groups, before),
        "answer_ids": ids[begun:].reshape(-1, after),
        "answer_seen": seen[begun:].reshape(-1, after),
        "starts": shared,
        "prompt_starts": shared[np.unique(rows.group, return_index=True)[1]] - before,
        "group": rows.group,
    }
    tensors = {name: torch.from_numpy(values) for name, values in parts.items()}
    return Forked(**tensors, **way_back(rows, source, size))


def split_at(rows: Rows) -> np.ndarray:
    """(rows,) how many tokens of each row are run as its prompt: a row alone is split where it suits the others.

    None, where a row has no such token, or two calls would not run a tenth fewer tokens than one.
    """
    alone, before = np.bincount(rows.group)[rows.group] == 1, rows.shared.max()
    shared = np.where(alone, np.minimum(before, rows.used - 1), rows.shared)
    size = (rows.group.max() + 1) * before + len(shared) * (rows.used - shared).max()
    return shared if shared.all() and size < 0.9 * len(shared) * rows.used.max() else np.zeros_like(shared)


def run(backbone: PreTrainedModel, layout: Forked, **options: object) -> Ran:
    """Run a batch: its prompts, then its answers."""
    if not layout.prompt_ids.numel():  # as TRL calls it: where the positions begin is the model's own affair
        inputs = {"input_ids": layout.answer_ids, "attention_mask": layout.answer_seen, "use_cache": False}
        return joined([backbone(**inputs, **options)])
    cache, taken = DynamicCache(config=backbone.config), inspect.signature(backbone.forward).parameters
    options |= {next(name for name in CACHE_NAMES if name in taken): cache, "use_cache": True}
    with replayed(backbone, cache):
        asked = call(backbone, layout.prompt_ids, layout.prompt_starts, attention_mask=layout.prompt_seen, **options)
    cache.reorder_cache(layout.group)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):  # its own ways copy into the states that autograd needs
            layer.update_conv_state = partial(convolved, layer)
            layer.update_recurrent_state = lambda states, *_, **__: states
    seen = layout.answer_seen
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):  # a mask is for what attention sees
        seen = torch.cat([layout.prompt_seen[layout.group], seen], dim=1)
    with replayed(backbone, cache):
        return joined([asked, call(backbone, layout.answer_ids, layout.starts, attention_mask=seen, **options)])


def call(backbone: PreTrainedModel, ids: torch.Tensor, starts: torch.Tensor, **given: object) -> ModelOutput:
    """Run `ids` (rows, columns) at the positions that begin with `starts`; padding is at 0, which every model has."""
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        given["position_ids"] = positions.where(given["attention_mask"][:, -ids.shape[1] :].bool(), 0)
    return backbone(input_ids=ids, **given)


def joined(outputs: list[ModelOutput]) -> Ran:
    """The results of several calls, their tokens one after the other."""
    hidden = torch.cat([each.last_hidden_state.flatten(0, 1) for each in outputs])
    routers = [getattr(each, "router_logits", None) for each in outputs]
    logits = None if routers[0] is None else tuple(torch.cat(layer) for layer in zip(*routers, strict=True))
    return Ran(hidden, logits)


def convolved(
    layer: LinearAttentionCacheLayerMixin, states: torch.Tensor, state_idx: int = 0, **_: object
) -> torch.Tensor:
    """A convolution's inputs behind those that the cache holds."""
    return torch.cat([layer.conv_states[state_idx], states], dim=-1)


@contextmanager
def replayed(backbone: PreTrainedModel, cache: DynamicCache) -> Iterator[None]:
    """Let checkpointed layers use `cache`; transformers takes it from them, as the backward would fill it again.

    Here the backward runs them on a copy of the cache as it was before the forward.
    """
    layers = [each for each in backbone.modules() if isinstance(each, GradientCheckpointingLayer)]
    layers = [each for each in layers if each.gradient_checkpointing and each.training]
    ways, before = [each._gradient_checkpointing_func for each in layers], copied(cache)
    verbosity = logging.get_verbosity()
    if layers:
        logging.set_verbosity_error()  # it warns that caches and checkpoints do not go together
    for layer, way in zip(layers, ways, strict=True):
        layer._gradient_checkpointing_func = partial(checkpointed, way, cache, before)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        for layer, way in zip(layers, ways, strict=True):
            layer._gradient_checkpointing_func = way


def checkpointed(way: Callable, cache: DynamicCache, before: DynamicCache, layer: partial, *inputs: object) -> object:
    """Checkpoint `layer`, a call without its cache, by `way`: with `cache` at first, then with `before`."""
    caches = [cache]

    def run_layer(*given: object) -> object:
        mine = caches.pop() if caches else copied(before)
        held = {name: mine for name in layer.keywords if name in CACHE_NAMES}
        given = tuple(mine if each is cache else each for each in given)
        return layer.func(*layer.args, *given, **layer.keywords | held)

    return way(run_layer, *inputs)


def copied(cache: DynamicCache) -> DynamicCache:
    """A cache of its own that shares the tensors."""
    mine = copy.copy(cache)
    mine.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in mine.layers:
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    return mine
