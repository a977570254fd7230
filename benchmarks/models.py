"""Every causal language model of transformers, tiny and random: does preftune train what TRL trains, with its losses?

    python -m benchmarks.models                    all of them, into docs/models.md (about 20 minutes on 2 cores)
    python -m benchmarks.models gemma3 gpt_oss     some of them anew

Each is built with the tiny tokenizer and trained for two DPO steps in float32, in full and with LoRA, by plain TRL and
by preftune as its recipe runs it. A first DPO loss is ln 2 whatever the forward, so what is compared are logps/chosen
and logps/rejected of the first step and, in full fine-tuning, the second loss.
"""

import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import DPOConfig, DPOTrainer

from preftune import embedded, training
from preftune.errors import brief

RESULTS = Path(__file__).with_name("results") / "models.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
ROWS = [
    {"prompt": f"What is {thing}?", "chosen": f"In short, {thing} it is.", "rejected": "Who can say" + "!" * more}
    for more, thing in enumerate(("rain", "a cat", "the moon", "bread"))
]
SMALL = {  # by the names that architectures give their sizes
    64: "hidden_size d_model n_embd dim model_dim embedding_size word_embed_proj_dim attention_hidden_size",
    128: "intermediate_size ffn_dim n_inner d_ff dim_ff ffn_hidden_size decoder_ffn_dim mlp_hidden_size "
    "shared_intermediate_size expert_ffn_hidden_size max_position_embeddings_small",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size kv_lora_rank q_lora_rank "
    "mamba_d_state state_size ssm_state_size vision_feature_size lora_rank linear_key_head_dim linear_value_head_dim",
    16: "head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim attention_head_dim kv_channels rotary_dim mamba_d_head "
    "mamba_head_dim swa_head_dim global_head_dim",
    4: "num_attention_heads n_head num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts mamba_n_heads mamba_num_heads moe_num_experts num_attention_heads_per_layer",
    2: "num_key_value_heads num_kv_heads n_layer num_layers n_layers decoder_layers encoder_layers "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk linear_num_key_heads linear_num_value_heads "
    "top_k_experts moe_top_k",
    1: "n_group topk_group n_groups n_shared_experts mamba_n_groups depth first_k_dense_replace "
    "num_nextn_predict_layers",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
STEPS = {"learning_rate": 1e-3, "max_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}


def shrink(config, vocabulary: int) -> None:
    """The same architecture in sizes that train in a second; what a configuration derives by itself is left."""
    config = config.get_text_config() if config.get_text_config() is not config else config
    depth = getattr(config, "num_hidden_layers", None)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = 2 if not types else max(2, *(types.index(kind) + 1 for kind in set(types)))
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth and depth:
            setattr(config, name, list(value[:layers]))
        elif isinstance(value, dict) and value and all(isinstance(key, int) for key in value):  # by layer
            setattr(config, name, {key: each for key, each in value.items() if key < layers})
        elif "drop" in name and isinstance(value, float):  # chance, which TRL leaves on in some architectures
            setattr(config, name, 0.0)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > SIZES[name]:
            setattr(config, name, SIZES[name])
    if hasattr(config, "kv_lora_rank") and hasattr(config, "num_key_value_heads"):  # latent attention has no groups
        config.num_key_value_heads = config.num_attention_heads
    for name, value in {"num_hidden_layers": layers, "vocab_size": vocabulary, "is_decoder": True}.items():
        if hasattr(config, name):
            with contextlib.suppress(Exception):  # derived from a list
                setattr(config, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 256 if name == "pad_token_id" else 258)


def build(kind: str, folder: Path) -> None:
    """A random checkpoint of an architecture with the tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    config = AutoConfig.for_model(kind)
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            shrink(part, len(tokenizer))
    shrink(config, len(tokenizer))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def by_trl(folder: Path, lora: bool) -> list[dict]:
    """What plain TRL logs."""
    from datasets import Dataset

    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    args = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(ROWS),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **STEPS,
    )
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = DPOTrainer(
        str(folder),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(folder),  # text alone, also where the model sees
        train_dataset=Dataset.from_list(turns),
        peft_config=adapter,
    )
    trainer.train()
    return trainer.state.log_history


def by_preftune(folder: Path, lora: bool) -> list[dict]:
    """What a run of recipes.dpo logs."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = folder / f"preftune-{lora}"
    overrides = [f"train.{name}={value}" for name, value in STEPS.items()]
    overrides += ["lora=lora", "lora.r=4"] if lora else ["lora=none"]
    GlobalHydra.instance().clear()
    with initialize_config_module("preftune.conf", version_base="1.3"):
        cfg = compose(
            "dpo",
            [
                "model=path",
                f"model.path={folder}",
                "data=file",
                f"data.path={data}",
                "data.eval_fraction=0",
                "hardware=cpu",
                "hardware.bf16=false",
                "hardware.gradient_checkpointing=false",
                f"hardware.per_device_train_batch_size={len(ROWS)}",
                "hardware.gradient_accumulation_steps=1",
                "train.seed=0",
                "train.save_strategy=no",
                "tracking=none",
                "gate.on_fail=warn",
                "fastpath.reference_cache=" + str(folder / "cache"),
                f"output_dir={run}",
                *overrides,
            ],
        )
    training.stage(cfg, {})
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compared(folder: Path, lora: bool) -> dict:
    """Both trainings of one checkpoint: what each raises, and the largest relative difference."""
    row = {}
    said = io.StringIO()
    for name, train in (("trl", by_trl), ("preftune", by_preftune)):
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                row[name] = train(folder, lora)
        except BaseException as error:  # SystemExit too: whatever ends a run
            row[name] = None
            row[f"{name}_error"] = brief(error)
    lines = said.getvalue().splitlines()
    row["said"] = [line for line in lines if line.startswith(("plan: not", "Packed forward off", "step-0"))]
    if row["trl"] and row["preftune"]:
        names = [("logps/chosen", 0), ("logps/rejected", 0)] + ([] if lora else [("loss", 1)])
        pairs = [(row["trl"][step][name], row["preftune"][step][name]) for name, step in names]
        row["difference"] = max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)
    row["trl"], row["preftune"] = bool(row["trl"]), bool(row["preftune"])
    return row


def matrix_row(kind: str) -> dict:
    """One architecture, in full and with LoRA."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                build(kind, folder)
        except Exception as error:
            return {"kind": kind, "not_built": brief(error)}
        return {"kind": kind, "full": compared(folder, lora=False), "lora": compared(folder, lora=True)}


def verdict(row: dict) -> tuple[str, ...]:
    """A row of the table: trains with TRL, trains with preftune, equal, fast path or why not."""
    if "not_built" in row:
        return row["kind"], "not built small", "", "", row["not_built"][:100]
    cells = []
    for name in ("trl", "preftune"):
        done = [row[way][name] for way in ("full", "lora")]
        cells.append("yes" if all(done) else "full only" if done[0] else "LoRA only" if done[1] else "no")
    differences = [row[way]["difference"] for way in ("full", "lora") if "difference" in row[way]]
    equal = "" if not differences else "yes" if max(differences) < 1e-4 else f"no ({max(differences):.0e})"
    notes = [row[way].get(f"{name}_error") for way in ("full", "lora") for name in ("trl", "preftune")]
    notes = list(dict.fromkeys(filter(None, notes))) or list(dict.fromkeys(row["full"]["said"])) or ["packed"]
    return row["kind"], *cells, equal, "; ".join(notes)[:160].replace("|", "/").replace("\n", " ")


def page(rows: list[dict]) -> str:
    """docs/models.md."""
    cells = [verdict(row) for row in sorted(rows, key=lambda row: row["kind"])]
    built = [cell for cell in cells if cell[1] != "not built small"]
    trains = [cell for cell in built if cell[1] != "no"]
    ours = [cell for cell in trains if cell[2] != "no"]
    equal = [cell for cell in ours if cell[3] == "yes"]
    return "\n".join(
        [
            "# Models",
            "",
            f"`python -m benchmarks.models`, torch {torch.__version__.split('+')[0]}, transformers "
            f"{transformers.__version__}: every architecture of transformers' causal language models, tiny and random, "
            "two DPO steps in float32, in full and with LoRA, by plain TRL and by preftune. Equal: logps/chosen and "
            "logps/rejected of the first step and, in full, the second loss, within 1e-4.",
            "",
            f"Of {len(cells)} architectures {len(built)} could be built small; TRL trains {len(trains)} of them, "
            f"preftune {len(ours)} of these, {len(equal)} with TRL's numbers.",
            "",
            "| architecture | trains with TRL | with preftune | equal | fast path, or why not; errors |",
            "|---|---|---|---|---|",
            *("| " + " | ".join(cell) + " |" for cell in cells),
            "",
        ]
    )


def main() -> None:
    asked = sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), max_tasks_per_child=None) as pool:
        started = {pool.submit(matrix_row, kind): kind for kind in asked}
        for done in as_completed(started):
            try:
                row = done.result()
            except Exception as error:  # the process was killed
                row = {"kind": started[done], "not_built": brief(error)}
            rows.append(row)
            print(f"{len(rows)}/{len(asked)}", *verdict(row), flush=True)
    known = {row["kind"]: row for row in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.exists() else {}
    known |= {row["kind"]: row for row in rows}
    RESULTS.write_text("".join(json.dumps(known[kind]) + "\n" for kind in sorted(known)))
    PAGE.write_text(page(list(known.values())), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
