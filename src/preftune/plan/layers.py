"""What the layers of a model hold while it trains: the real ones, run on fake tensors that have shapes and no memory.

The backbone is built twice, with one layer and with two, and a forward and a backward of each are watched: what the
second has more is a layer's. So every architecture that transformers knows is planned, its adapters, autocast and
quantization as they are, and nothing is downloaded or allocated.
"""

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from preftune.checks import SELECTIVE
from preftune.fastpath.checkpointing import keep_products

FUSED = "preftune_plan"  # the attention that stands for all fused kernels
MASKED = ("sdpa", "eager")  # those that take a dense mask


@dataclass(frozen=True)
class Setting:
    """What the layers' memory depends on: rows × columns tokens, precision, adapters. Hashable, so that it is kept."""

    rows: int
    columns: int
    dtype: str
    autocast: str | None  # what is multiplied in: bfloat16, float16, or None for the weights' own
    attention: str
    adapter: tuple | None  # LoraConfig's keywords as sorted pairs
    four_bit: bool
    checkpointing: bool | str = False  # true, false or selective
    reference_tokens: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes that the layers hold for one forward and backward.

    `first` is kept for the backward by the ends of the backbone and its first layer, `layer` by each further one,
    `handed` is what a layer gives to the next, `working` what a layer's own forward and backward take beside that for a
    moment, with what checkpointing computes again, `scoring` what a forward without gradients takes.
    """

    first: int
    layer: int
    handed: int
    working: int
    scoring: int


class FourBit(torch.autograd.Function):
    """bitsandbytes' product: the weight is unpacked for each use, and nothing is kept but the packed one."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.weight = weight
        return hidden @ weight.to(hidden.dtype, copy=True).t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.to(gradient.dtype, copy=True), None


@torch.library.custom_op("preftune::fused_attention", mutates_args=())
def fused_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A fused kernel, which keeps its inputs, its output, log-sum-exp and mask. What it computes is of no account."""
    raise NotImplementedError


@fused_kernel.register_fake
def _(query, key, value, mask):
    rows, heads, columns, _ = query.shape
    out = query.new_empty(rows, columns, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, gradient, _):
    return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


fused_kernel.register_autograd(_gradients, setup_context=_keep)


def fused_attention(module, query, key, value, attention_mask=None, **_):
    """SDPA as transformers calls it: under a mask keys and values are repeated for heads, the mask made additive."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if attention_mask is not None:
        heads = (-1, -1, query.shape[1] // key.shape[1], -1, -1)
        key, value = (x[:, :, None].expand(heads).reshape(*query.shape[:2], *x.shape[2:]) for x in (key, value))
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype)
    return fused_kernel(query, key, value, attention_mask)[0].transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(FUSED, fused_attention)


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


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration with fewer layers, its lists of one entry a layer cut to fit."""
    short, whole = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(short).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(short, name, value[:layers])
    short.num_hidden_layers = layers
    return short


def meta_model(config: PreTrainedConfig, dtype: str, attention: str = "eager", adapter: tuple | None = None):
    """The model without weights, wrapped by PEFT where there is an adapter."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
        return get_peft_model(model, LoraConfig(**dict(adapter))) if adapter else model


def trained(config: PreTrainedConfig, dtype: str, adapter: tuple) -> int:
    """Parameters of an adapter, from the first two layers."""
    one, two = (
        sum(p.numel() for p in meta_model(shortened(config, n), dtype, adapter=adapter).parameters() if p.requires_grad)
        for n in (1, 2)
    )
    return one + (two - one) * (config.num_hidden_layers - 1)


def footprint(config: PreTrainedConfig, setting: Setting) -> Footprint:
    """Watch one and two layers of `config` train on fake tensors."""
    one, two = (_run(shortened(config, layers), setting) for layers in (1, 2))
    handed = setting.rows * setting.columns * config.hidden_size * two[2]
    return Footprint(one[0], two[0] - one[0], handed, two[1] - two[0], one[3])


def _run(config: PreTrainedConfig, setting: Setting) -> tuple[int, int, int, int]:
    """Bytes kept after the forward, the most at once, bytes a number of the hidden states, the most when scoring."""
    dense = setting.attention in MASKED
    attention = "eager" if setting.attention == "eager" else FUSED
    model = meta_model(config, setting.dtype, attention, setting.adapter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake(model, setting)
        base = (model.get_base_model() if setting.adapter else model).base_model
        # The ends are counted with the head; here they would hide what the layers take
        base.get_input_embeddings().weight.requires_grad_(False)
        base.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())
        model.train()
        if setting.checkpointing == SELECTIVE:
            keep_products(model)
        if setting.checkpointing:
            model.gradient_checkpointing_enable()

        def forward(rows: int, columns: int):
            mask = _mask(rows, columns, config, setting) if dense else None
            ids = torch.zeros(rows, columns, dtype=torch.long)
            autocast = torch.autocast("cpu", getattr(torch, setting.autocast)) if setting.autocast else nullcontext()
            with watch, autocast:
                return base(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=torch.arange(columns).expand(rows, columns),
                    use_cache=False,
                ).last_hidden_state

        watch = Watch()
        hidden = forward(setting.rows, setting.columns)
        kept, size = watch.now, hidden.element_size()
        gradient = torch.empty_like(hidden)
        with watch:
            hidden.backward(gradient)
        most = watch.most
        del hidden, gradient
        watch = Watch()
        if setting.reference_tokens:
            model.eval()
            with torch.no_grad():
                forward(max(1, setting.reference_tokens // setting.columns), setting.columns)
        return kept, most, size, watch.most


def _fake(model: PreTrainedModel, setting: Setting) -> None:
    """Parameters and buffers as fake tensors, in the precision that they train in; gradients are dropped at once."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not setting.dropout:
            module.p = 0.0
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, old in module._parameters.items():
            if old is None:
                continue
            adapted = old.requires_grad and setting.four_bit and setting.adapter  # TRL trains QLoRA's adapters in bf16
            made = torch.empty(old.shape, dtype=torch.bfloat16 if adapted else old.dtype)
            module._parameters[name] = torch.nn.Parameter(made, requires_grad=old.requires_grad)
            if old.requires_grad:  # dropped at once: they are counted apart
                module._parameters[name].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model.tie_weights()
    if setting.four_bit:
        base = model.get_base_model() if setting.adapter else model
        for module in base.base_model.modules():
            if type(module) is torch.nn.Linear and not module.weight.requires_grad:
                module.forward = partial(_four_bit, module.weight)


def _four_bit(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' layer: it multiplies in bfloat16, and answers in the precision that it was asked in."""
    return FourBit.apply(hidden.to(torch.bfloat16), weight).to(hidden.dtype)


def _mask(rows: int, columns: int, config: PreTrainedConfig, setting: Setting):
    """A mask for every kind of layer, as preftune's packed forward gives it."""
    dtype = torch.bool if setting.attention == "sdpa" else getattr(torch, setting.dtype)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    masks = {kind: torch.ones(rows, 1, columns, columns, dtype=dtype) for kind in kinds}
    return masks if len(kinds) > 1 else next(iter(masks.values()))
