"""One loss of a model sharded by PyTorch's fully_shard over two processes; prints how far it is from the whole model's.

python -m torch.distributed.run --nproc_per_node 2 sharded_loss.py FORM FOLDER
"""

import copy
import json
import sys
from pathlib import Path

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
if trainer.accelerator.is_main_process:
    print(json.dumps({"form": trainer.form, "loss": abs(float(ours - loss)), "gradients": apart / largest}))
