"""What a training run holds at its fullest moment, part by part, for one device."""

from dataclasses import dataclass, replace

from preftune.fastpath.head import CPU_TOKENS
from preftune.plan.measure import Footprint
from preftune.plan.rows import Batch
from preftune.plan.sizes import BYTES, PlanError, Sizes, state_bytes

TILE_TOKENS, TILE_WORDS = 4096, 32768  # trl.kernels.chunked_logprob: what its head computes at once
TILE_COPIES = 7  # of a tile in float32 that its backward holds where there is no Triton kernel
TILE_FORWARD = 4
FULL_LOGITS = 3  # copies of all logits in float32 that ORPO and CPO hold on TRL's own path, beside those it returns
CONTEXT = 0.8e9  # CUDA context, cuBLAS workspace, fragmentation of the allocator: assumed, measured on no card
# On CPU: what glibc's allocator does not give back, beside a share of the activations. Fitted to runs (docs/plan.md)
HOLES, STAYS = 0.25, 0.6e9
MASTER = 12  # bytes a parameter of DeepSpeed's optimizer: its own float32 weights, and Adam's two states
SHARDS = {  # what is divided by the number of devices
    "none": (),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer", "reference"),
    "fsdp": ("weights", "gradients", "optimizer", "reference"),
    "zero2_offload": ("gradients",),
    "zero3_offload": ("weights", "gradients", "reference"),
}
DEEPSPEED = {name for name in SHARDS if name.startswith("zero")}


@dataclass(frozen=True)
class Run:
    """What memory depends on, beside the model's configuration."""

    size: Sizes
    weights: float  # bytes of the model's weights
    dtype: str
    autocast: str | None
    optim: str
    four_bit: bool
    accumulation: int
    reference: str  # none | cached | adapter off | copy
    reference_tokens: int
    quantized: bool  # in 4 or 8 bits
    kbit_prepared: bool  # by PEFT, for ORPO and CPO: what is not quantized is trained in float32
    full_logits: bool
    everywhere: bool  # the head scores all positions, whatever the labels
    packed: bool
    on_gpu: bool
    layers: int
    sharding: str = "none"
    world_size: int = 1

    @property
    def gathered(self) -> float:
        """Bytes of all weights in what is multiplied in, to which an engine casts them; it leaves quantized ones."""
        cast = BYTES[self.autocast or self.dtype] / BYTES[self.dtype]
        return self.weights * (1 if self.quantized else cast)


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the fullest moment, which `moment` names."""

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reference: float
    other: float
    moment: str

    def parts(self) -> dict[str, float]:
        """Every part in bytes, by its name."""
        return {name: value for name, value in vars(self).items() if name != "moment"}

    @property
    def total(self) -> float:
        return sum(self.parts().values())


def standing(run: Run, full: bool) -> Memory:
    """What a device holds whatever it computes, with all gradients."""
    size = run.size
    # PEFT keeps adapters in float32; TRL those of QLoRA in bfloat16, but ORPO's and CPO's
    parameter = BYTES[run.dtype] if full else 2 if run.four_bit and not run.kbit_prepared else 4
    moved = size.parameters if full else size.adapter
    held = Memory(
        weights=run.weights,
        adapter=0 if full else size.adapter * parameter,
        gradients=moved * parameter,
        optimizer=moved * state_bytes(run.optim, parameter),
        activations=0,
        logits=0,
        reference=run.weights if run.reference == "copy" else 0,
        other=CONTEXT if run.on_gpu else 0,
        moment="",
    )
    return sharded(prepared(held, run, moved, full), run)


def estimate(run: Run, feet: Footprint, batch: Batch, width: int) -> Memory:
    """The fullest of the moments of a training step, and of the reference pass before it."""
    full = not run.size.adapter
    still = standing(run, full)
    kept = feet.kept
    mask = batch.tokens * batch.columns
    hidden = feet.handed
    entering = still.gradients if run.accumulation > 1 else 0.0
    at_head = run.size.head * 4 if full else 0  # the head's gradient is the first to come
    moments = [
        replace(
            still, moment="head", activations=kept + mask, logits=head(run, batch, width, full), gradients=entering
        ),
        replace(
            still,
            moment="last layer",
            activations=kept + feet.working + mask + 2 * hidden,
            gradients=max(entering, min(at_head, still.gradients)),
        ),
        replace(still, moment="first layer", activations=feet.first + feet.working + mask),
    ]
    if not run.on_gpu:  # Adam's loop over parameters; on GPUs it is fused, or allowed for in CONTEXT
        largest = 2 * run.size.head * BYTES[run.dtype] if full else 0
        moments.append(replace(still, moment="optimizer step", activations=largest))
    if run.reference == "cached":
        moments.append(
            replace(
                still,
                moment="reference pass",
                activations=feet.scoring,
                logits=head(run, scored_at_once(run, batch), width, full, learning=False),
                gradients=0,
                optimizer=0,
            )
        )
    fullest = max(moments, key=lambda memory: memory.total)
    return fullest if run.on_gpu else replace(fullest, other=HOLES * fullest.activations + STAYS)


def scored_at_once(run: Run, batch: Batch) -> Batch:
    """A batch of the reference pass: as much of the largest batch's kind as its token budget takes."""
    share = max(batch.scored / max(batch.tokens, 1), 0.0)
    tokens = max(run.reference_tokens, batch.columns)
    return Batch(1, tokens, 0, round(tokens * min(share, 1.0)))


def head(run: Run, batch: Batch, width: int, full: bool, learning: bool = True) -> float:
    """Bytes that scoring takes: TRL's fused head in tiles, or all logits where a loss builds them."""
    words = run.size.head // width
    compute = BYTES[run.autocast or run.dtype]
    cast = compute if compute != BYTES[run.dtype] else 0
    if run.full_logits and learning:
        return batch.tokens * words * (compute + FULL_LOGITS * 4) + (run.size.head * 4 if full else 0)
    scored = batch.tokens if run.everywhere else batch.scored
    most = CPU_TOKENS if run.packed and not run.on_gpu else TILE_TOKENS
    tokens, columns = min(scored, most), min(words, TILE_WORDS)
    tile = tokens * columns
    if run.on_gpu:
        temporary = 0
    elif learning:
        temporary = max(tile * (TILE_COPIES * 4 + 1), tile * 4 + columns * width * 4)
    else:
        temporary = tile * TILE_FORWARD * 4
    picked = scored * width * (compute + (4 if learning else 0))
    gradient = run.size.head * 4 if full and learning else 0
    return picked + tile * compute + columns * width * cast + temporary + gradient


def prepared(memory: Memory, run: Run, moved: int, full: bool) -> Memory:
    """The weights as an engine makes them, before they are shared out; `moved` parameters are trained.

    DeepSpeed casts the whole model to what is multiplied in, and keeps float32 copies of what it trains in its
    optimizer. FSDP2 keeps what it trains in float32 where another precision is multiplied in. DDP's buckets hold all
    gradients once more.
    """
    if run.sharding not in SHARDS:
        raise PlanError(f"sharding={run.sharding}: there are {', '.join(SHARDS)}")
    if run.sharding in DEEPSPEED:
        cast = BYTES[run.autocast or run.dtype]
        return replace(
            memory,
            weights=run.gathered,
            reference=run.gathered if memory.reference else 0,
            adapter=0 if full else moved * cast,
            gradients=moved * cast,
            optimizer=moved * MASTER,
        )
    if run.sharding == "fsdp" and full and run.autocast:
        states = moved * state_bytes(run.optim, 4)
        return replace(memory, weights=memory.weights * 4 / BYTES[run.dtype], gradients=moved * 4, optimizer=states)
    if run.sharding == "none" and run.world_size > 1:
        return replace(memory, gradients=memory.gradients * 2)
    return memory


def sharded(memory: Memory, run: Run) -> Memory:
    """What one of `world_size` devices holds: each part whole, or its share."""
    kind = run.sharding
    if kind.endswith("_offload"):
        if run.on_gpu:
            memory = replace(memory, optimizer=0)
        else:  # there the memory that the optimizer is moved to is the one it comes from
            kind = kind.removesuffix("_offload")
    share = {name: getattr(memory, name) / run.world_size for name in SHARDS[kind]}
    if "weights" in share:  # two layers are whole at a time: the one that runs, and the next on its way
        share["weights"] += 2 * run.gathered / run.layers
    return replace(memory, **share)
