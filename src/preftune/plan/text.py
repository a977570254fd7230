"""A plan in words: three lines for the start of a run, and the page of recipes.plan."""

from preftune.plan.planner import Plan


def lines(plan: Plan) -> list[str]:
    """Three lines: memory, steps and tokens, time."""
    total, parts = plan.memory_gb["total"], sorted(shown(plan), key=lambda part: -part[1])
    room = f" of {plan.limit_gb:g}" if plan.limit_gb is not None else ""
    largest = ", ".join(f"{name} {value:.2f}" for name, value in parts[:3])
    reference = plan.reference
    scored = f", reference {reference['kind']}" if reference["kind"] != "none" else ""
    scored += f" ({count(reference['tokens'])} tokens)" if reference["tokens"] else ""
    each = f" on each of {plan.world_size} devices" if plan.world_size > 1 else ""
    return [
        f"plan: {count(plan.parameters)} parameters, {count(plan.trained)} trained; {total:.2f}{room} GB at most{each} "
        f"({largest})",
        f"plan: {plan.steps:,} steps of {plan.global_batch:,} rows, {plan.rows:,} rows an epoch, "
        f"{count(plan.tokens)} tokens, {plan.padding:.0%} of them padding{scored}",
        f"plan: {duration(plan.seconds)} at {plan.tflops:g} TFLOP/s per device (hardware.tflops); rows: {plan.lengths}",
    ]


def page(plan: Plan) -> str:
    """The plan in full."""
    told = [*lines(plan), "", *memory_table(plan), ""]
    batch = plan.largest_batch
    how = "packed" if plan.packed else "padded, TRL's own forward"
    told.append(f"largest batch: {batch['rows']} × {batch['columns']} tokens, {batch['scored']} scored ({how})")
    told.append(f"architecture: {plan.architecture}")
    if plan.sharding != "none":
        told.append(f"sharding: {plan.sharding} over {plan.world_size} devices")
    return "\n".join([*told, verdict(plan)])


def memory_table(plan: Plan) -> list[str]:
    """Memory by part, aligned."""
    rows = [*shown(plan), ("total", plan.memory_gb["total"])]
    wide = max(len(name) for name, _ in rows)
    return [f"GB at the fullest moment ({plan.fullest_at})", *(f"  {name:<{wide}}  {gb:8.2f}" for name, gb in rows)]


def shown(plan: Plan) -> list[tuple[str, float]]:
    """The parts that are not nothing."""
    return [(name, gb) for name, gb in plan.memory_gb.items() if name != "total" and gb >= 0.005]


def verdict(plan: Plan) -> str:
    """Whether it fits, and what would."""
    if plan.fits is None:
        return "fits: not known; say what one device has with hardware.memory_gb=24"
    if plan.fits:
        return f"fits in {plan.limit_gb:g} GB"
    told = [f"does not fit in {plan.limit_gb:g} GB"]
    told += [f"  would fit with: {each}" for each in plan.suggestions]
    return "\n".join(told if plan.suggestions else [*told, "  no setting of one device found that would"])


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
