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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import DPOConfig, DPOTrainer

from benchmarks.models_page import RESULTS, verdict, write_page
from preftune.config.errors import brief
from preftune.models import embedded
from preftune.runs import training

ROWS = [
    {"prompt": f"What is {thing}?", "chosen": f"In short, {thing} it is.", "rejected": "Who can say" + "!" * more}
    for more, thing in enumerate(("rain", "a cat", "the moon", "bread"))
]
SMALL = {  # by the names that architectures give their sizes
    64: "hidden_size d_model n_embd dim model_dim embedding_size word_embed_proj_dim "
    "embedding_dim output_embedding_size adapter_in_dim",
    128: "intermediate_size ffn_dim n_inner d_ff dim_ff ffn_hidden_size decoder_ffn_dim mlp_hidden_size "
    "shared_intermediate_size expert_ffn_hidden_size max_position_embeddings_small "
    "attention_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size kv_lora_rank q_lora_rank "
    "mamba_d_state state_size ssm_state_size vision_feature_size lora_rank linear_key_head_dim linear_value_head_dim",
    16: "head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim attention_head_dim kv_channels rotary_dim mamba_d_head "
    "linear_head_dim mamba_head_dim swa_head_dim global_head_dim d_head indexer_head_dim indexer_budget",
    4: "num_attention_heads n_head num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts mamba_n_heads mamba_num_heads moe_num_experts num_attention_heads_per_layer "
    "linear_num_heads n_mamba_heads indexer_compress_ratio indexer_n_heads",
    2: "num_key_value_heads num_kv_heads n_layer num_layers n_layers decoder_layers encoder_layers "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk linear_num_key_heads linear_num_value_heads "
    "top_k_experts moe_top_k",
    1: "indexer_kv_heads n_group num_group num_expert_group topk_group n_groups n_shared_experts mamba_n_groups depth "
    "first_k_dense_replace num_nextn_predict_layers",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
LEFT_OPEN = {  # what a default configuration lacks, and every checkpoint of the kind has
    "bamba": {"attn_layer_indices": [1]},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"], "num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
SECONDS = 240  # for one architecture; then its process is ended
STEPS = {"learning_rate": 1e-3, "max_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}


def shrink(config, vocabulary: int, more: bool) -> None:
    """The same architecture in sizes that train in a second; what a configuration derives by itself is left.

    `more` also fills in sizes that are None, keeps two layers of each kind and shares no keys and values.
    """
    for name, value in LEFT_OPEN.get(config.model_type or type(config).__name__, {}).items():
        setattr(config, name, value)
    depth = getattr(config, "num_hidden_layers", None)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = 2 if not types else max(2, *(places(types, kind)[: 1 + more][-1] + 1 for kind in set(types)))
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth and depth:
            setattr(config, name, list(value[:layers]))
        elif isinstance(value, dict) and value and all(isinstance(key, int) for key in value):  # by layer
            setattr(config, name, {key: each for key, each in value.items() if key < layers})
        elif "drop" in name and isinstance(value, float):  # chance, which TRL leaves on in some architectures
            setattr(config, name, 0.0)
        elif name.startswith("vocab_size_"):
            setattr(config, name, vocabulary)
        elif name in SIZES and (type(value) is int and value > SIZES[name] or more and value is None):
            setattr(config, name, SIZES[name])
    fitted(config, more)
    for name, value in {"num_hidden_layers": layers, "vocab_size": vocabulary, "is_decoder": True}.items():
        if hasattr(config, name):
            with contextlib.suppress(Exception):  # derived from a list
                setattr(config, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 256 if name == "pad_token_id" else 258)


def places(types: list, kind: str) -> list[int]:
    """The layers of a kind."""
    return [number for number, each in enumerate(types) if each == kind]


def fitted(config, more: bool) -> None:
    """Bring sizes that must agree into agreement."""
    sizes = vars(config)
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:  # latent attention has no groups
        config.num_key_value_heads = sizes["num_attention_heads"]
    if "qk_head_dim" in sizes:
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    if not more:
        return
    if "num_kv_shared_layers" in sizes:
        config.num_kv_shared_layers = 0
    if sizes.get("rope_parameters") == {} and sizes.get("layer_types"):
        config.rope_parameters = {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(config.layer_types)
        }
    heads = [name for name in ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads") if name in sizes]
    widths = [name for name in ("mamba_d_head", "mamba_headdim", "mamba_head_dim", "head_dim") if name in sizes]
    inner = sizes.get("mamba_expand", sizes.get("expand"))
    if inner and heads and widths:  # state-space layers: heads x width = what the hidden state is expanded to
        if sizes.get("mamba_d_ssm"):
            config.mamba_d_ssm = inner * config.hidden_size
        setattr(config, widths[0], inner * config.hidden_size // sizes[heads[0]])
    if "attention_hidden_size" in sizes and "attention_head_dim" in sizes:
        config.attention_head_dim = sizes["attention_hidden_size"] // sizes["num_attention_heads"]


def shrunk(kind: str, vocabulary: int, more: bool):
    """The configuration of an architecture in small."""
    config = AutoConfig.for_model(kind)
    parts = {name: part for name, part in vars(config).items() if isinstance(part, transformers.PreTrainedConfig)}
    for name, part in parts.items():
        shrink(part, vocabulary, more)
        setattr(config, name, layers_shrunk(part) if more else part)
    shrink(config, vocabulary, more)
    return layers_shrunk(config) if more and not parts else config


def layers_shrunk(config):
    """The same with the sizes of single layers in small too; itself where layers have none of their own."""
    values = config.to_dict()
    if "per_layer_config" not in values:
        return config
    depth, single = values["num_hidden_layers"], {}
    for layer, own in values["per_layer_config"].items():
        own = {name: min(value, SIZES.get(name, value)) for name, value in own.items()}
        if "kv_lora_rank" in own:
            own["num_key_value_heads"] = own["num_attention_heads"]
            own["head_dim"] = sum((values | own)[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
        single[int(layer)] = own
    values["per_layer_config"] = {layer: own for layer, own in single.items() if layer < depth}
    return type(config)(**values)


def no_text(kind: str) -> str | None:
    """Why this is no text language model, by its configuration's class: then text alone cannot train it."""
    config = CONFIG_MAPPING[kind]
    parts = config.sub_configs.values()
    if any(getattr(part, "num_codebooks", 1) > 1 and part.model_type.endswith("decoder") for part in parts):
        return "its decoder writes audio codes"
    if hasattr(config, "backbone_hidden_size"):
        return "it drafts for another model, out of that model's hidden states"
    return None


def build(kind: str, folder: Path) -> None:
    """A random checkpoint of an architecture with the tiny tokenizer, that reads tokens where a shrinking is found."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("embedded://tiny"))
    tokenizer.save_pretrained(folder)
    for more in (False, True):
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(shrunk(kind, len(tokenizer), more), dtype=torch.float32)
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
            model(input_ids=torch.arange(10, 34)[None], attention_mask=torch.ones(1, 24, dtype=torch.long))
            return
        except Exception:
            if more and not (folder / "config.json").exists():
                raise


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
        cfg = compose("dpo", [*plain_settings(folder, data, len(ROWS)), f"output_dir={run}", *overrides])
    training.stage(cfg, {})
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plain_settings(folder: Path, data: Path, rows: int) -> list[str]:
    """Overrides for a checkpoint and its rows, all in one batch, in float32 and with nothing beside the training."""
    return [
        "model=path",
        f"model.path={folder}",
        "data=file",
        f"data.path={data}",
        "data.eval_fraction=0",
        "hardware=cpu",
        "hardware.bf16=false",
        "hardware.gradient_checkpointing=false",
        f"hardware.per_device_train_batch_size={rows}",
        "hardware.gradient_accumulation_steps=1",
        "train.seed=0",
        "train.save_strategy=no",
        "tracking=none",
        "gate.on_fail=warn",
        f"fastpath.reference_cache={folder / 'cache'}",
    ]


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
    row["said"] = [line for line in lines if line.startswith(("plan: not", "Fast forward", "step-0"))]
    if row["trl"] and row["preftune"]:
        names = [("logps/chosen", 0), ("logps/rejected", 0)] + ([] if lora else [("loss", 1)])
        pairs = [(row["trl"][step][name], row["preftune"][step][name]) for name, step in names]
        row["difference"] = max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)
    row["trl"], row["preftune"] = bool(row["trl"]), bool(row["preftune"])
    return row


def matrix_row(kind: str, folder: Path) -> dict:
    """One architecture, in full and with LoRA, its files in `folder`."""
    torch.set_num_threads(1)
    try:
        if reason := no_text(kind):
            return {"kind": kind, "no_text": reason}
        with contextlib.redirect_stderr(io.StringIO()):
            build(kind, folder)
    except Exception as error:
        return {"kind": kind, "not_built": brief(error.__cause__ or error)}
    return {"kind": kind, "full": compared(folder, lora=False), "lora": compared(folder, lora=True)}


def send_row(kind: str, scratch: str, answer) -> None:
    answer.send(matrix_row(kind, Path(scratch)))


def in_time(kind: str) -> dict:
    """The row of an architecture out of a process of its own, which is ended where it takes too long."""
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        process = context.Process(target=send_row, args=(kind, scratch, theirs))
        process.start()
        theirs.close()
        try:
            return mine.recv() if mine.poll(SECONDS) else {"kind": kind, "not_built": f"no end in {SECONDS} s"}
        except EOFError:
            return {"kind": kind, "not_built": "its process died"}
        finally:
            process.kill()
            process.join()


def main() -> None:
    asked = sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    multiprocessing.set_forkserver_preload(["benchmarks.models"])
    known = {row["kind"]: row for row in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.exists() else {}
    with ThreadPoolExecutor(int(os.environ.get("PROCESSES", "2"))) as pool:
        started = [pool.submit(in_time, kind) for kind in asked]
        for number, done in enumerate(as_completed(started), start=1):
            row = done.result()
            known[row["kind"]] = row
            print(f"{number}/{len(asked)}", *verdict(row), flush=True)
            RESULTS.write_text("".join(json.dumps(known[kind]) + "\n" for kind in sorted(known)))
    write_page()


if __name__ == "__main__":
    main()
