"""docs/models.md: what the rows of benchmarks/models.py and benchmarks/losses.py come to."""

import json
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).with_name("results") / "models.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LOSS_RESULTS = Path(__file__).with_name("results") / "losses.jsonl"
LOSSES = ("kto", "orpo", "sft")


def verdict(row: dict) -> tuple[str, ...]:
    """A row of the table: trains with TRL, trains with preftune, equal, fast path or why not."""
    if "no_text" in row:
        return row["kind"], "no text model", "", "", row["no_text"]
    if "not_built" in row:
        return row["kind"], "not built small", "", "", row["not_built"][:100]
    cells = []
    for name in ("trl", "preftune"):
        done = [row[way][name] for way in ("full", "lora")]
        cells.append("yes" if all(done) else "full only" if done[0] else "LoRA only" if done[1] else "no")
    differences = [row[way]["difference"] for way in ("full", "lora") if "difference" in row[way]]
    equal = "" if not differences else "yes" if max(differences) < 1e-4 else f"no ({max(differences):.0e})"
    notes = [row[way].get(f"{name}_error") for way in ("full", "lora") for name in ("trl", "preftune")]
    said = [line.removeprefix("Fast forward: ").removeprefix("Fast forward ") for line in row["full"]["said"]]
    notes = list(dict.fromkeys(filter(None, notes))) or list(dict.fromkeys(said))
    return row["kind"], *cells, equal, "; ".join(notes)[:160].replace("|", "/").replace("\n", " ")


def page(rows: list[dict]) -> str:
    """docs/models.md."""
    cells = [verdict(row) for row in sorted(rows, key=lambda row: row["kind"])]
    text = [cell for cell in cells if cell[1] != "no text model"]
    built = [cell for cell in text if cell[1] != "not built small"]
    trains = [cell for cell in built if cell[1] != "no"]
    ours = [cell for cell in trains if cell[2] != "no"]
    equal = [cell for cell in ours if cell[3] == "yes"]
    trained = [row for row in rows if "full" in row and any(row[way]["preftune"] for way in ("full", "lora"))]
    said = [[*row["full"]["said"], *row["lora"]["said"]] for row in trained]
    forms = {form: sum(f"Fast forward: {form}" in lines for lines in said) for form in ("packed", "forked", "rows")}
    return "\n".join(
        [
            "# Models",
            "",
            f"`python -m benchmarks.models`, torch {torch.__version__.split('+')[0]}, transformers "
            f"{transformers.__version__}: every architecture of transformers' causal language models, tiny and random, "
            "two DPO steps in float32, in full and with LoRA, by plain TRL and by preftune. Equal: logps/chosen and "
            "logps/rejected of the first step and, in full, the second loss, within 1e-4.",
            "",
            "No text model is what has a decoder of audio codes, or drafts out of another model's hidden states.",
            "",
            f"Of {len(cells)} architectures {len(text)} are text models and {len(built)} could be built small; "
            f"TRL trains {len(trains)} of them, preftune {len(ours)} of these, {len(equal)} with TRL's numbers; "
            f"{forms['packed']} are packed, {forms['forked']} forked, {forms['rows']} take the form rows "
            "(docs/fastpath.md).",
            "",
            "| architecture | trains with TRL | with preftune | equal | form of the fast path, or why none; errors |",
            "|---|---|---|---|---|",
            *("| " + " | ".join(cell) + " |" for cell in cells),
            "",
        ]
    )


def write_page() -> None:
    """docs/models.md anew, from all that was measured."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    PAGE.write_text("\n".join([page(rows), *table()]), encoding="utf-8")
    print(PAGE)


def cell(row: dict | None) -> str:
    """One cell of the table."""
    if row is None:
        return ""
    if "difference" in row:
        return "equal" if row["difference"] < 1e-4 else f"differs by {row['difference']:.0e}"
    return "; ".join(f"{name}: {row[f'{name}_error'][:80]}" for name in ("trl", "preftune") if f"{name}_error" in row)


def table() -> list[str]:
    """The lines of docs/models.md on these losses."""
    rows = [json.loads(line) for line in LOSS_RESULTS.read_text().splitlines()] if LOSS_RESULTS.exists() else []
    known = {(row["kind"], row["loss"]): row for row in rows}
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return [
        "## KTO, ORPO and SFT",
        "",
        "`python -m benchmarks.losses`: two steps in float32, in full, TRL's trainer and a run of preftune on the same "
        "rows and, for ORPO, on the same token ids (the chat template's; TRL's ORPO makes others of these rows). "
        "Equal: both losses and, where they are logged, the first step's logps/chosen and logps/rejected, within 1e-4.",
        "",
        f"| architecture | {' | '.join(LOSSES)} |",
        "|---" * (1 + len(LOSSES)) + "|",
        *(f"| {kind} | " + " | ".join(cell(known.get((kind, loss))) for loss in LOSSES) + " |" for kind in kinds),
        "",
    ]
