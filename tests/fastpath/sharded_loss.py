"""A model sharded by PyTorch's fully_shard over two processes: its loss, its gradients and the reference log-probs that
it computes beforehand; prints how far they are from the whole model's, and what the cache says to whole models.

python -m torch.distributed.run --nproc_per_node 2 sharded_loss.py FORM FOLDER
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from equality import batch_of, outcome
from tiny_models import tiny_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from preftune.fastpath import trainer_class

form, folder = sys.argv[1], Path(sys.argv[2])
rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
arguments = DPOConfig(
    str(folder / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True
)
precomputed = copy.deepcopy(arguments)
precomputed.precompute_ref_log_probs = True
whole = DPOTrainer(
    tiny_model("llama"), tiny_model("llama", 1), arguments, train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(folder),
)  # fmt: skip
batch = batch_of(whole)
loss, _, gradients = outcome(whole, copy.deepcopy(batch))

trainer = trainer_class(DPOTrainer, form=form)(
    tiny_model("llama"), tiny_model("llama", 1), arguments, train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(folder),
)  # fmt: skip
for model in (trainer.model, trainer.ref_model):
    model = trainer.accelerator.unwrap_model(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
trainer.model = trainer.accelerator.unwrap_model(trainer.model)
trainer.ref_model = trainer.accelerator.unwrap_model(trainer.ref_model)
ours, _, found = outcome(trainer, batch)
largest = max(gradient.abs().max().item() for gradient in gradients.values())
apart = max((found[name].full_tensor() - gradient).abs().max().item() for name, gradient in gradients.items())

trainer.is_fsdp_enabled, trainer.accelerator.state.fsdp_plugin = True, SimpleNamespace(fsdp_version=2)
trainer.reference_cache = folder / "cache"
columns = trainer._precompute_ref_logps(trainer.train_dataset, "train", 2)
trainer.accelerator.state.fsdp_plugin = None
expected = torch.cat(whole.compute_ref_log_probs(whole.ref_model, batch_of(whole)))
scored = torch.tensor([*columns["ref_chosen_logps"], *columns["ref_rejected_logps"]])
again = trainer_class(DPOTrainer, form=form, reference_cache=folder / "cache")(
    tiny_model("llama", 1), None, precomputed, train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(folder),
)  # fmt: skip
if trainer.accelerator.is_main_process:
    found = {"form": trainer.form, "loss": abs(float(ours - loss)), "gradients": apart / largest}
    found |= {"reference": (scored - expected).abs().max().item(), "forwards": trainer.reference_forwards}
    print(json.dumps(found | {"again": again.reference_forwards}))
