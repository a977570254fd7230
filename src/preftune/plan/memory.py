"""What a training run holds at its fullest moment, part by part, for one device, in bytes."""

from preftune.fastpath.head import CPU_TOKENS, CPU_WORDS
from preftune.plan.model import BYTES, state_bytes, weight_bytes
from preftune.plan.rows import Batch
from preftune.plan.training import Training

TILE_TOKENS, TILE_WORDS = 4096, 32768  # trl.kernels.chunked_logprob: what its head computes at once
TILE_COPIES = 7  # of a tile in float32 that its backward holds where there is no Triton kernel
TILE_FORWARD = 4
FULL_LOGITS = 3  # copies of all logits in float32 that ORPO and CPO hold on TRL's own path, beside those it returns
CONTEXT = 0.8e9  # CUDA context, cuBLAS workspace, fragmentation of the allocator: assumed, measured on no card
# On CPU, fitted to runs (docs/plan.md): what libraries hold, and what glibc's allocator does not give back, half of the
# activations until those are tensors so large that they have huge pages of their own
STAYS, HOLES, MOST_HOLES = 0.3e9, 0.5, 0.3e9
MASTER = 12  # bytes per parameter of DeepSpeed's optimizer: its own float32 weights, and Adam's two states
SHARDS = {  # what is divided by the number of devices
    "none": (),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer", "reference"),
    "fsdp": ("weights", "gradients", "optimizer", "reference"),
    "zero2_offload": ("gradients",),
    "zero3_offload": ("weights", "gradients", "reference"),
}
Parts = dict[str, float]


def fullest(run: Training, batch: Batch) -> tuple[str, Parts]:
    """The moment of a step, or of the reference pass before it, at which most is held; and what is held then."""
    feet, held, full = run.footprint(batch), per_device(run, states(run)), not run.adapter
    mask = batch.tokens * batch.columns
    entering = held["gradients"] if run.accumulation > 1 else 0.0
    at_head = run.size.head * 4 if full else 0  # the head's gradient is the first to come
    ends = feet.kept - run.layers * feet.layer
    # TRL's activation_offloading leaves two layers on the device: the one that runs, and the one that is being moved
    kept = ends + feet.layer * (min(run.layers, 2) if run.arguments.get("activation_offloading") else run.layers)
    last = kept + feet.working + mask + 2 * feet.handed
    moments = {
        "head": {"activations": kept + mask, "logits": head(run, batch), "gradients": entering},
        "last layer": {"activations": last, "gradients": max(entering, min(at_head, held["gradients"]))},
        "first layer": {"activations": ends + feet.layer + feet.working + mask},
    }
    if not run.on_gpu:  # Adam's loop over parameters; on GPUs it is fused, or allowed for in CONTEXT
        moments["optimizer step"] = {"activations": 2 * run.size.head * BYTES[run.dtype] if full else 0}
    if run.reference == "cached":
        tokens = max(run.reference_tokens(batch), batch.columns)  # as much of this batch's kind as the budget takes
        share = min(batch.scored / max(batch.tokens, 1), 1.0)
        scored = head(run, Batch(1, tokens, 0, round(tokens * share)), learning=False)
        moments["reference pass"] = {"activations": feet.scoring, "logits": scored, "gradients": 0, "optimizer": 0}
    moment, parts = max(((name, held | own) for name, own in moments.items()), key=lambda each: sum(each[1].values()))
    return moment, parts if run.on_gpu else parts | {"other": STAYS + min(HOLES * parts["activations"], MOST_HOLES)}


def states(run: Training) -> Parts:
    """What one device alone holds whatever it computes, with all gradients."""
    full, size = not run.adapter, run.size
    prepared = run.reference_free and run.bits > 0
    # PEFT keeps adapters in float32; TRL those of QLoRA in bfloat16, but ORPO's and CPO's
    parameter = BYTES[run.dtype] if full else 2 if run.bits == 4 and not prepared else 4
    moved = size.parameters if full else size.adapter
    weights = weight_bytes(size, run.dtype, run.cfg.lora, prepared)
    return {
        "weights": weights,
        "adapter": 0 if full else size.adapter * parameter,
        "gradients": moved * parameter,
        "optimizer": moved * state_bytes(str(run.arguments["optim"]), parameter),
        "activations": 0,
        "logits": 0,
        "reference": weights if run.reference == "copy" else 0,
        "other": CONTEXT if run.on_gpu else 0,
    }


def per_device(run: Training, held: Parts) -> Parts:
    """What one of `world_size` devices holds of these states, as its engine keeps them.

    DeepSpeed casts the whole model to what is multiplied in, and keeps float32 copies of what it trains in its
    optimizer. FSDP2 keeps what it trains in float32 where another precision is multiplied in. DDP's buckets hold all
    gradients once more. ZeRO-3 and FSDP gather two layers at a time: the one that runs, and the next.
    """
    moved = run.size.adapter or run.size.parameters
    cast = BYTES[run.autocast or run.dtype]
    gathered = held["weights"] * (1 if run.bits else cast / BYTES[run.dtype])  # engines leave quantized weights
    if run.sharding.startswith("zero"):
        own = {"weights": gathered, "gradients": moved * cast, "optimizer": moved * MASTER}
        held |= own | {"reference": gathered * bool(held["reference"]), "adapter": moved * cast * bool(run.adapter)}
    elif run.sharding == "fsdp" and not run.adapter and run.autocast:
        kept = moved * state_bytes(str(run.arguments["optim"]), 4)
        held |= {"weights": held["weights"] * 4 / BYTES[run.dtype], "gradients": moved * 4, "optimizer": kept}
    elif run.sharding == "none" and run.world_size > 1:
        held["gradients"] *= 2
    kind = run.sharding
    if kind.endswith("_offload") and run.on_gpu:
        held["optimizer"] = 0
    elif kind.endswith("_offload"):  # there the memory that the optimizer is moved to is the one it comes from
        kind = kind.removesuffix("_offload")
    held |= {name: held[name] / run.world_size for name in SHARDS[kind]}
    if "weights" in SHARDS[kind]:
        held["weights"] += 2 * gathered / run.layers
    return held


def head(run: Training, batch: Batch, learning: bool = True) -> float:
    """Bytes that scoring takes: TRL's fused head in tiles, or all logits where a loss builds them."""
    words, width = run.size.head // run.width, run.width
    compute = BYTES[run.autocast or run.dtype]
    gradient = run.size.head * 4 if learning and not run.adapter else 0
    if run.reference_free and not run.packed and learning:
        return batch.tokens * words * (compute + FULL_LOGITS * 4) + gradient
    # without packing and off GPUs the head scores prompts and padding too
    scored = batch.tokens if run.reference_free or not (run.packed or run.on_gpu) else batch.scored
    most = (CPU_TOKENS, CPU_WORDS) if run.packed and not run.on_gpu else (TILE_TOKENS, TILE_WORDS)
    columns = min(words, most[1])
    tile = min(scored, most[0]) * columns
    temporary = tile * TILE_FORWARD * 4
    if learning:
        temporary = max(tile * (TILE_COPIES * 4 + 1), tile * 4 + columns * width * 4)
    picked = scored * width * (compute + (4 if learning else 0))
    cast = columns * width * compute if compute != BYTES[run.dtype] else 0
    return picked + tile * compute + cast + (0 if run.on_gpu else temporary) + gradient
