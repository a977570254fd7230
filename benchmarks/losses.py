"""KTO, ORPO and SFT on ten architectures of benchmarks.models: does preftune train what TRL trains, with its numbers?

    python -m benchmarks.losses                    all of them, into docs/models.md (about 10 minutes on 1 core)
    python -m benchmarks.losses gemma2 gpt_oss     some of them anew

Both train the same rows in full, two steps in float32: TRL's own trainer class, and a run of preftune. ORPO's token ids
are those of the chat template on both sides, since TRL's ORPO makes others of the same rows.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from trl.trainer.utils import create_model_from_path

from benchmarks import models as matrix  # sets the environment before torch is imported
from benchmarks.models_page import LOSS_RESULTS, LOSSES, cell, write_page
from preftune.config.errors import brief
from preftune.models.load import load_tokenizer
from preftune.runs import training
from preftune.trainers.build import load_data, trainer_arguments
from preftune.trainers.template_tokens import TemplateTokens

KINDS = ["llama", "gemma2", "gemma3", "gpt2", "qwen3_moe", "gpt_oss", "qwen3_5", "mamba", "falcon_h1", "lfm2"]
COMPARED = [("loss", 0), ("loss", 1), ("logps/chosen", 0), ("logps/rejected", 0)]


def config(loss: str, folder: Path):
    """The recipe of a loss on a checkpoint, two steps of all rows."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in matrix.ROWS))
    rows = 2 * len(matrix.ROWS) if loss == "kto" else len(matrix.ROWS)  # a pair is two rows of it
    overrides = [f"train.{name}={value}" for name, value in matrix.STEPS.items()]
    overrides += ["loss.balance_labels=false"] if loss == "kto" else []
    GlobalHydra.instance().clear()
    with initialize_config_module("preftune.conf", version_base="1.3"):
        return compose(
            loss, [*matrix.plain_settings(folder, data, rows), f"output_dir={folder / loss}", "lora=none", *overrides]
        )


def by_trl(cfg) -> list[dict]:
    """What TRL's own trainer logs on the rows of `cfg`."""
    tokenizer = load_tokenizer(cfg.model)
    trainer_class = get_class(cfg.loss.trainer)
    args_class = get_class(cfg.loss.trainer.removesuffix("Trainer") + "Config")
    if hasattr(trainer_class, "tokenize_row"):
        trainer_class = type("SameIds", (TemplateTokens, trainer_class), {})
    given = trainer_arguments(cfg) | {"eval_strategy": "no", "report_to": "none", "disable_tqdm": True}
    trainer = trainer_class(
        model=create_model_from_path(cfg.model.path, dtype="float32", device_map=None),
        args=args_class(output_dir=f"{cfg.output_dir}-trl", **given),
        processing_class=tokenizer,
        train_dataset=load_data(cfg, tokenizer).train,
    )
    trainer.train()
    return trainer.state.log_history


def by_preftune(cfg) -> list[dict]:
    """What a run of the recipe logs."""
    training.stage(cfg, {})
    return [json.loads(line) for line in (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()]


def compared(kind: str, loss: str) -> dict:
    """One loss on one architecture: what either raises, and the largest relative difference."""
    row = {"kind": kind, "loss": loss}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()) as said:
        folder, logs = Path(scratch), {}
        with contextlib.redirect_stderr(said):
            matrix.build(kind, folder)
            for name, train in (("trl", by_trl), ("preftune", by_preftune)):
                try:
                    logs[name] = train(config(loss, folder))
                except BaseException as error:  # SystemExit too: whatever ends a run
                    row[f"{name}_error"] = brief(error)
    if len(logs) == 2:
        pairs = [
            (logs["trl"][step][name], logs["preftune"][step][name])
            for name, step in COMPARED
            if name in logs["trl"][step]
        ]
        row["difference"] = max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)
    return row


def main() -> None:
    known = {}
    if LOSS_RESULTS.exists():
        known = {(row["kind"], row["loss"]): row for row in map(json.loads, LOSS_RESULTS.read_text().splitlines())}
    for kind in sys.argv[1:] or KINDS:
        for loss in LOSSES:
            known[kind, loss] = row = compared(kind, loss)
            print(kind, loss, cell(row), flush=True)
            LOSS_RESULTS.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
    write_page()


if __name__ == "__main__":
    main()
