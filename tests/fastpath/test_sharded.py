"""The fast path on weights that FSDP2 shards: two processes by gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["packed", "forked"])
def test_sharded_weights_give_the_whole_models_loss_gradients_and_reference(form, tokenizer, pairs, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    script = Path(__file__).with_name("sharded_loss.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), form, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["form"] == form
    assert found["loss"] < 1e-5 and found["gradients"] < 1e-4, found
    assert found["reference"] < 1e-4 and found["forwards"] == len(pairs), found
    assert found["again"] == 0  # a whole model finds what the sharded one has computed
