"""What a model holds and computes while it trains: one step of a short prefix of it, run on fake tensors.

Fake tensors have shapes and no memory, so nothing is downloaded or allocated. The prefix holds each kind of layer once.
It is run at that depth and at twice that depth; what the second adds is counted up to the model's own depth. The layers
are transformers' and PEFT's own: no architecture is known here.
"""

import copy
import json
import logging
import weakref
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
from preftune.fastpath.applies import backbone
from preftune.fastpath.checkpointing import keep_products
from preftune.models.load import class_of, peft_config


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on: rows × columns tokens, precision, adapter. Hashable, so that it can be a key."""

    rows: int
    columns: int
    dtype: str
    autocast: str | None  # what is multiplied in: bfloat16, float16, or None for the weights' own
    attention: str | None
    adapter: str | None  # the keywords of PEFT's configuration as JSON
    four_bit: bool
    checkpointing: bool | str = False  # true, false or selective
    reference_tokens: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes that the layers hold for one step, and the FLOP that they take, both without the head.

    `kept` for the backward by all layers and the ends of the backbone, `layer` by one layer of them. `handed` is what a
    layer gives to the next, `working` what a backward takes beside what is kept, with what checkpointing computes
    again, `scoring` what a forward without gradients takes. `forward` and `step` (forward and backward) are FLOP per
    token outside attention, `attention_forward` and `attention_step` in it, per token and column.
    """

    kept: float
    layer: float
    handed: float
    working: float
    scoring: float
    forward: float
    step: float
    attention_forward: float
    attention_step: float
    doubled: bool = False  # measured in bfloat16 and doubled: the experts' product is not there for fake float32


def _grouped(a, b, *_, out_shape=None, **__):  # the experts' product: (tokens, k) × (experts, k, n), and its backward
    return 2 * a[0] * a[-1] * b[-1] if len(a) == 2 and len(b) == 3 else 2 * a[0] * a[1] * b[-1]


def _fused_backward(_, q, k, v, *__, out_shape=None, **___):
    return 2.5 * sdpa_flop_count(q, k, v)


logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs what is raised as well
COUNTED = {  # what PyTorch's own counter leaves out
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
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
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            size, key = storage.nbytes(), storage._cdata
            if key not in given | self.seen:
                self.seen.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def footprint(config: PreTrainedConfig, setting: Setting) -> Footprint:
    """What a step of the whole model takes, from steps of two prefixes; of all of it where two are no shorter."""
    depth = config.get_text_config().num_hidden_layers
    prefix = prefix_of(config)
    first, second = (prefix, 2 * prefix) if 2 * prefix < depth else (0, depth)
    double, tokens = 1, setting.rows * setting.columns
    try:
        one, two = _step(config, first, setting), _step(config, second, setting)
    except (RuntimeError, NotImplementedError, ValueError):
        if setting.dtype != "float32":
            raise
        double, setting = 1 if setting.autocast else 2, replace(setting, dtype="bfloat16")
        one, two = _step(config, first, setting), _step(config, second, setting)
    per_layer = {name: (two[name] - one[name]) / (second - first) for name in two}
    whole = {name: two[name] + (depth - second) * per_layer[name] for name in two}
    return Footprint(
        kept=double * whole["kept"],
        layer=double * per_layer["kept"],
        handed=double * two["handed"],
        working=double * two["working"],
        scoring=double * two["scoring"],
        forward=(whole["forward"] - whole["attention_forward"]) / tokens,
        step=(whole["step"] - whole["attention_step"]) / tokens,
        attention_forward=whole["attention_forward"] / tokens / setting.columns,
        attention_step=whole["attention_step"] / tokens / setting.columns,
        doubled=double == 2,
    )


def prefix_of(config: PreTrainedConfig) -> int:
    """How many layers, from the first, hold each kind of layer: told apart by parameters' shapes and layer types."""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    lists = (m for m in backbone(meta_model(config, "bfloat16")).modules() if isinstance(m, torch.nn.ModuleList))
    layers = next((each for each in lists if len(each) == depth), None)
    if layers is None:
        return depth
    types = getattr(text, "layer_types", None) or [None] * depth
    shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers]
    kinds = list(zip(shapes, types, strict=False)) if len(types) == depth else shapes
    return max(kinds.index(kind) for kind in kinds) + 1


def meta_model(
    config: PreTrainedConfig, dtype: str, attention: str | None = None, adapter: str | None = None
) -> torch.nn.Module:
    """The model without weights in the class that it would be loaded in, wrapped by PEFT where there is an adapter."""
    kind = class_of(config) or AutoModelForCausalLM
    make = getattr(kind, "from_config", None) or kind._from_config
    with torch.device("meta"):
        model = make(copy.deepcopy(config), dtype=getattr(torch, dtype), attn_implementation=attention)
        return get_peft_model(model, peft_config(json.loads(adapter), model)) if adapter else model


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


def _step(config: PreTrainedConfig, layers: int, setting: Setting) -> dict[str, float]:
    """Bytes and FLOP of one forward and backward of the first `layers` layers; of none, nothing."""
    names = ("kept", "handed", "working", "scoring", "forward", "attention_forward", "step", "attention_step")
    if not layers:
        return dict.fromkeys(names, 0)
    attention = "eager" if setting.attention == "eager" else None
    model = meta_model(shortened(config, layers), setting.dtype, attention, setting.adapter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = _prepare(model, setting)
        watch, flop = Watch(), FlopCounterMode(display=False, custom_mapping=COUNTED)
        with watch:
            hidden = _forward(base, setting, setting.rows)
            kept = watch.now
            hidden.backward(torch.empty_like(hidden))
        with flop:  # by itself: PyTorch's counter holds on to tensors
            hidden = _forward(base, setting, setting.rows)
            forward = _counted(flop, base)
            hidden.backward(torch.empty_like(hidden))
        scoring = Watch()
        if setting.reference_tokens:
            model.eval()
            with torch.no_grad(), scoring:
                _forward(base, setting, max(1, setting.reference_tokens // setting.columns))
        handed = hidden.numel() * hidden.element_size()
        found = (kept, handed, watch.most - kept, scoring.most, *forward, *_counted(flop, base))
        return dict(zip(names, found, strict=True))


def _prepare(model: PreTrainedModel, setting: Setting) -> PreTrainedModel:
    """Make `model`'s weights fake and set it to train as the run will. Returns its backbone."""
    _fake(model, setting)
    base = backbone(model.get_base_model() if setting.adapter else model)
    embedding = base.get_input_embeddings().requires_grad_(False)  # counted with the head
    embedding.register_forward_hook(lambda module, given, out: out if out.requires_grad else out.requires_grad_())
    model.train()
    if setting.checkpointing == SELECTIVE:
        keep_products(model)
    if setting.checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


def _forward(base: PreTrainedModel, setting: Setting, rows: int) -> torch.Tensor:
    ids, lower = torch.zeros(rows, setting.columns, dtype=torch.long), setting.autocast
    with torch.autocast("cpu", getattr(torch, lower)) if lower else nullcontext():
        return base(input_ids=ids, use_cache=False).last_hidden_state


def _counted(flop: FlopCounterMode, base: PreTrainedModel) -> tuple[int, int]:
    """FLOP so far, and how many of them in attention."""
    inside = "bmm" if base.config._attn_implementation == "eager" else "attention"
    by_operator = flop.get_flop_counts().get("Global", {})
    return flop.get_total_flops(), sum(count for name, count in by_operator.items() if inside in str(name))


def _fake(model: PreTrainedModel, setting: Setting) -> None:
    """Parameters and buffers as fake tensors, in the precision that they train in; gradients are dropped at once."""
    fakes: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied modules go on sharing one parameter
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
            if old.requires_grad:
                module._parameters[name].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if setting.four_bit:
        base = model.get_base_model() if setting.adapter else model
        for module in base.base_model.modules():
            if type(module) is torch.nn.Linear and not module.weight.requires_grad:
                module.forward = partial(_four_bit, module.weight)


def _four_bit(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' layer: it multiplies in bfloat16, and answers in the precision of what it was given."""
    return FourBit.apply(hidden.to(torch.bfloat16), weight).to(hidden.dtype)
