"""A plan in words: three lines for the start of a run, and the page of recipes.plan."""

from preftune.plan.plan import Plan


def lines(plan: Plan) -> list[str]:
    """Three lines: memory, steps and tokens, time."""
    limit = f" of {plan.limit_gb:g}" if plan.limit_gb is not None else ""
    parts = sorted(held(plan), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {value:.2f}" for name, value in parts[:3])
    reference = plan.reference
    scored = f", reference {reference['kind']}" if reference["kind"] != "none" else ""
    scored += f" ({count(reference['tokens'])} tokens)" if reference["tokens"] else ""
    each = f" on each of {plan.world_size} devices" if plan.world_size > 1 else ""
    return [
        f"plan: {count(plan.parameters)} parameters, {count(plan.trained)} trained; "
        f"{plan.memory_gb['total']:.2f}{limit} GB at most{each} ({largest})",
        f"plan: {plan.steps:,} steps of {plan.global_batch:,} rows, {plan.rows:,} rows per epoch, "
        f"{count(plan.tokens)} tokens, {plan.padding:.0%} of them padding{scored}",
        f"plan: {duration(plan.seconds)} at {plan.tflops:g} TFLOP/s per device (hardware.tflops); rows: {plan.lengths}",
    ]


def page(plan: Plan) -> str:
    """The plan in full."""
    rows, batch = [*held(plan), ("total", plan.memory_gb["total"])], plan.largest_batch
    sharding = [f"sharding: {plan.sharding} over {plan.world_size} devices"] if plan.sharding != "none" else []
    return "\n".join([
        *lines(plan),
        "",
        f"peak memory, GB ({plan.fullest_at})",
        *(f"  {name:<11}  {gb:8.2f}" for name, gb in rows),
        "",
        f"largest batch: {batch['rows']} × {batch['columns']} tokens, {batch['scored']} scored "
        f"({'packed' if plan.packed else 'padded'})",
        *([f"longest row that fits: about {plan.longest_row:,} tokens"] if plan.longest_row else []),
        f"architecture: {plan.architecture}",
        *sharding,
        *verdict(plan),
    ])  # fmt: skip


def held(plan: Plan) -> list[tuple[str, float]]:
    """The parts of memory that are worth a line, in GB."""
    return [(name, gb) for name, gb in plan.memory_gb.items() if name != "total" and gb >= 0.005]


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, and what would."""
    if plan.fits is None:
        return ["fits: not known; say what one device has with hardware.memory_gb=24"]
    if plan.fits:
        return [f"fits in {plan.limit_gb:g} GB"]
    would = [f"  would fit with: {each}" for each in plan.suggestions]
    return [f"does not fit in {plan.limit_gb:g} GB", *(would or ["  no setting of one device found that would"])]


def count(number: float) -> str:
    """7.25B, 41.9M, 12,300."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """About how long, in the unit that suits."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.1f} {name}"
    return f"about {seconds:.0f} seconds"
