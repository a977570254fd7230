"""What a model holds and computes while it trains: one step of a short prefix of it, run on fake tensors.

Fake tensors have shapes and no memory, so nothing is downloaded or allocated. The prefix holds each kind of layer once;
what a layer keeps and computes is measured there and counted as often as the whole model has its kind. The layers are
transformers' and PEFT's own: no architecture is known here.
"""

import copy
import itertools
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import get_peft_model
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from preftune.config.stages import SELECTIVE
from preftune.fastpath.checkpointing import keep_products
from preftune.models.load import class_of, lora_config


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on: rows × columns tokens, precision, adapter. Hashable, so that it is kept."""

    rows: int
    columns: int
    dtype: str
    autocast: str | None  # what is multiplied in: bfloat16, float16, or None for the weights' own
    attention: str | None
    adapter: tuple | None  # LoraConfig's keywords as sorted pairs
    four_bit: bool
    checkpointing: bool | str = False  # true, false or selective
    reference_tokens: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes that the layers hold for one step, and the FLOP that they take, both without the head.

    `kept` for the backward by all layers and the ends of the backbone, `first` by the ends and the first layer alone.
    `handed` is what a layer gives to the next, `working` what a backward takes beside what is kept for a moment, with
    what checkpointing computes again, `scoring` what a forward without gradients takes. `forward` and `step` (forward
    and backward) are FLOP per token outside attention, `attention_forward` and `attention_step` in it, per token and
    column. `doubled`: measured in bfloat16 and doubled, as the experts' product is not there for fake float32.
    """

    kept: float
    first: float
    handed: float
    working: float
    scoring: float
    forward: float
    step: float
    attention_forward: float
    attention_step: float
    doubled: bool = False


def _grouped(a, b, *_, out_shape=None, **__):  # the experts' product: (tokens, k) × (experts, k, n), and its backward
    return 2 * a[0] * a[-1] * b[-1] if len(a) == 2 and len(b) == 3 else 2 * a[0] * a[1] * b[-1]


def _fused(q, k, v, *_, out_shape=None, **__):
    return sdpa_flop_count(q, k, v)


def _fused_backward(_, q, k, v, *__, out_shape=None, **___):
    return 2.5 * sdpa_flop_count(q, k, v)


logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs what is raised as well
# What PyTorch's own counter leaves out
COUNTED = {
    getattr(torch.ops.aten, name): count
    for name, count in {
        "_grouped_mm": _grouped,
        "_scaled_dot_product_flash_attention_for_cpu": _fused,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _fused_backward,
    }.items()
    if hasattr(torch.ops.aten, name)
}


class FourBit(torch.autograd.Function):
    """bitsandbytes' product: the weight is unpacked for each use, and nothing is kept but the packed one."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.weight = weight
        return hidden @ weight.to(hidden.dtype, copy=True).t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.to(gradient.dtype, copy=True), None


class Watch(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live: `now`, and `most` at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in given | self.seen:
                self._made(each.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def meta_model(config: PreTrainedConfig, dtype: str, attention: str | None = None, adapter: tuple | None = None):
    """The model without weights in the class that it would be loaded in, wrapped by PEFT where there is an adapter."""
    kind = class_of(config) or AutoModelForCausalLM
    make = getattr(kind, "from_config", None) or kind._from_config
    with torch.device("meta"):
        model = make(config, dtype=getattr(torch, dtype), attn_implementation=attention)
        if not adapter:
            return model
        return get_peft_model(model, lora_config(dict(adapter), model))


def layers_of(model: torch.nn.Module, depth: int) -> list[torch.nn.Module] | None:
    """The layers of the backbone; None where no list of modules has so many."""
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth)
    return next(map(list, lists), None)


def kinds(model: torch.nn.Module, config: PreTrainedConfig) -> list | None:
    """What tells the layers apart: the shapes of their parameters, and the type that the configuration gives them."""
    text = config.get_text_config()
    layers = layers_of(backbone(model), text.num_hidden_layers)
    if layers is None:
        return None
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers]
    return list(zip(shapes, types, strict=True)) if len(types) == len(layers) else shapes


def backbone(model: torch.nn.Module) -> PreTrainedModel:
    """The text model without its head, of a plain model or of PEFT's."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    try:
        return whole.get_decoder() or whole.base_model
    except (AttributeError, NotImplementedError):
        return whole.base_model


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration with fewer layers, its lists of one entry per layer cut to fit."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    if text.num_hidden_layers != layers:  # unless it follows from a list
        text.num_hidden_layers = layers
    return short


def footprint(config: PreTrainedConfig, setting: Setting) -> Footprint:
    """Run a step of a prefix of `config` on fake tensors; what it lacks of each kind of layer is added to it."""
    found, depth = kinds(meta_model(config, "bfloat16"), config), config.get_text_config().num_hidden_layers
    # one layer more than it takes to see each kind, since the last one is measured with what comes behind it
    size = depth if found is None else min(depth, max(found.index(kind) for kind in set(found)) + 2)
    short, double = config if size == depth else shortened(config, size), 1
    try:
        step = Step(short, setting)
    except (RuntimeError, NotImplementedError, ValueError):
        if setting.dtype != "float32" or setting.autocast:
            raise
        step, double = Step(short, replace(setting, dtype="bfloat16")), 2
    missing = {}
    if size < depth:
        missing = {found.index(kind): found.count(kind) - found[:size].count(kind) for kind in set(found)}
    kept = step.kept + sum(count * step.layers[place][0] for place, count in missing.items())
    whole = step.forward[0] + sum(count * step.layers[place][1] for place, count in missing.items())
    per_token = whole / max(step.forward[0], 1) / (setting.rows * setting.columns)
    return Footprint(
        kept=double * kept,
        first=double * (step.kept - sum(layer[0] for layer in step.layers[1:])),
        handed=double * step.handed,
        working=double * step.working,
        scoring=double * step.scoring,
        forward=(step.forward[0] - step.forward[1]) * per_token,
        step=(step.all[0] - step.all[1]) * per_token,
        attention_forward=step.forward[1] * per_token / setting.columns,
        attention_step=step.all[1] * per_token / setting.columns,
        doubled=double == 2,
    )


class Step:
    """One forward and backward of a model on fake tensors: bytes and FLOP of each layer, of the ends, of the whole."""

    def __init__(self, config: PreTrainedConfig, setting: Setting):
        self.setting = setting
        attention = setting.attention if setting.attention == "eager" else None
        model = meta_model(config, setting.dtype, attention, setting.adapter)
        self.eager = backbone(model).config._attn_implementation == "eager"
        with FakeTensorMode(allow_non_fake_inputs=True):
            _fake(model, setting)
            base = backbone(model)
            for parameter in base.get_input_embeddings().parameters():  # counted with the head
                parameter.requires_grad_(False)
            base.get_input_embeddings().register_forward_hook(
                lambda module, given, out: out if out.requires_grad else out.requires_grad_()
            )
            model.train()
            if setting.checkpointing == SELECTIVE:
                keep_products(model)
            if setting.checkpointing and model.supports_gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            layers = layers_of(base, config.get_text_config().num_hidden_layers) or []
            watch, flop = Watch(), FlopCounterMode(display=False, custom_mapping=COUNTED)
            kept, self.kept = self._learn(base, layers, watch, lambda: watch.now)
            self.working = watch.most - self.kept
            # by itself, for PyTorch's counter holds on to tensors
            computed, self.forward = self._learn(base, layers, flop, lambda: self._counted(flop))
            self.all = self._counted(flop)
            self.layers = [(b - a, d[0] - c[0]) for (a, b), (c, d) in zip(kept, computed, strict=True)]
            self.scoring = self._score(model, base) if setting.reference_tokens else 0

    def _learn(self, base: PreTrainedModel, layers: list[torch.nn.Module], mode, reading: Callable):
        """A forward and backward under `mode`: its reading around each layer's forward, and after all of them."""
        seen: dict[int, object] = {}

        def begin(place: int, *_) -> None:  # the first time alone: checkpointing runs a layer again
            seen.setdefault(place, reading())

        hooks = [layer.register_forward_pre_hook(partial(begin, place)) for place, layer in enumerate(layers)]
        with mode:
            hidden = self._forward(base, self.setting.rows, self.setting.columns)
            after = reading()
            for hook in hooks:
                hook.remove()
            self.handed = hidden.numel() * hidden.element_size()
            hidden.backward(torch.empty_like(hidden))
        return list(itertools.pairwise([*(seen[place] for place in sorted(seen)), after])), after

    def _score(self, model, base: PreTrainedModel) -> int:
        """The most bytes that a forward without gradients takes."""
        model.eval()
        watch = Watch()
        with torch.no_grad(), watch:
            rows = max(1, self.setting.reference_tokens // self.setting.columns)
            self._forward(base, rows, self.setting.columns)
        return watch.most

    def _forward(self, base: PreTrainedModel, rows: int, columns: int) -> torch.Tensor:
        ids = torch.zeros(rows, columns, dtype=torch.long)
        lower = self.setting.autocast
        with torch.autocast("cpu", getattr(torch, lower)) if lower else nullcontext():
            return base(input_ids=ids, use_cache=False).last_hidden_state

    def _counted(self, flop: FlopCounterMode) -> tuple[int, int]:
        """FLOP so far, and those of them in attention."""
        by_operator = flop.get_flop_counts().get("Global", {})
        inside = "bmm" if self.eager else "attention"
        return flop.get_total_flops(), sum(count for name, count in by_operator.items() if inside in str(name))


def _fake(model: PreTrainedModel, setting: Setting) -> None:
    """Parameters and buffers as fake tensors, in the precision that they train in; gradients are dropped at once."""
    fakes: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied modules hold one parameter, and go on doing so
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not setting.dropout:
            module.p = 0.0
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, old in module._parameters.items():
            if old is None or old in fakes:
                module._parameters[name] = fakes.get(old)
                continue
            adapted = old.requires_grad and setting.four_bit and setting.adapter  # TRL trains QLoRA's adapters in bf16
            made = torch.empty(old.shape, dtype=torch.bfloat16 if adapted else old.dtype)
            module._parameters[name] = fakes[old] = torch.nn.Parameter(made, requires_grad=old.requires_grad)
            if old.requires_grad:  # dropped at once: they are counted apart
                module._parameters[name].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if setting.four_bit:
        base = model.get_base_model() if setting.adapter else model
        for module in base.base_model.modules():
            if type(module) is torch.nn.Linear and not module.weight.requires_grad:
                module.forward = partial(_four_bit, module.weight)


def _four_bit(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' layer: it multiplies in bfloat16, and answers in the precision that it was asked in."""
    return FourBit.apply(hidden.to(torch.bfloat16), weight).to(hidden.dtype)
