"""The reference cache: TRL's own numbers, computed once, and only where nothing that counts has changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from preftune.fastpath.reference_cache import ReferenceCache
from preftune.fastpath.reference_identity import reference_identity
from preftune.fastpath.reference_store import ReferenceStore, references, shrink
from preftune.models import embedded


class CachedDPO(ReferenceCache, DPOTrainer):
    pass


class CachedKTO(ReferenceCache, KTOTrainer):
    pass


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "again"]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def pairs(rows=14, seed=0):
    rng = np.random.default_rng(seed)

    def say(role):
        return [{"role": role, "content": " ".join(rng.choice(WORDS, rng.integers(1, 25)))}]

    return Dataset.from_list(
        [{"prompt": say("user"), "chosen": say("assistant"), "rejected": say("assistant")} for _ in range(rows)]
    )


def thumbs(data):
    return Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for side in ("chosen", "rejected") for row in data]
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return embedded.folder("embedded://tiny").as_posix()


@pytest.fixture
def build(tiny, tmp_path):
    """Builds a trainer; what it is given goes to its config, but for `peft`, `model`, `cache` and `data`."""

    def build(trainer=CachedDPO, data=None, peft=None, model=None, cache="cache", **more):
        config = DPOConfig if issubclass(trainer, DPOTrainer) else KTOConfig
        arguments = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 256,
            "per_device_train_batch_size": 4, "gradient_checkpointing": False, "disable_tqdm": True,
            "save_strategy": "no", "precompute_ref_log_probs": True, "num_train_epochs": 1, **more,
        }  # fmt: skip
        trainer = type(trainer.__name__, (trainer,), {"reference_cache": tmp_path / cache})
        data = pairs() if data is None else data
        model = AutoModelForCausalLM.from_pretrained(tiny) if model is None else model
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        return trainer(
            model, args=config(**arguments), train_dataset=data, processing_class=tokenizer, peft_config=peft
        )

    return build


def logps(trainer, *names):
    return np.array([trainer.train_dataset[name] for name in names])


DPO_COLUMNS, KTO_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps"), ("ref_logps", "ref_KL_logps")


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_dpo_gets_the_numbers_of_trl(build, peft):
    plain = build(type("Plain", (DPOTrainer,), {}), peft=peft)
    for _ in range(2):  # computed, then read
        np.testing.assert_allclose(logps(build(peft=peft), *DPO_COLUMNS), logps(plain, *DPO_COLUMNS), rtol=1e-5)


def test_kto_gets_the_numbers_of_trl_and_finds_what_dpo_computed(build):
    data = pairs()
    plain = build(type("Plain", (KTOTrainer,), {}), data=thumbs(data))
    assert build(data=data).reference_forwards == 14
    cached = build(CachedKTO, data=thumbs(data))
    assert cached.reference_forwards == 28  # the mismatched completions alone
    np.testing.assert_allclose(logps(cached, *KTO_COLUMNS), logps(plain, *KTO_COLUMNS), rtol=1e-5)
    assert build(CachedKTO, data=thumbs(data)).reference_forwards == 0


def test_beta_loss_learning_rate_seed_and_output_directory_reuse_the_reference(build, tmp_path):
    assert build(peft=LORA).reference_forwards == 14
    for change in ({"beta": 0.5}, {"loss_type": ["ipo"]}, {"loss_type": ["hinge"], "learning_rate": 1e-3}, {"seed": 7},
                   {"output_dir": str(tmp_path / "other")}, {"per_device_train_batch_size": 2},
                   {"precompute_ref_batch_size": 3}):  # fmt: skip
        assert build(peft=LORA, **change).reference_forwards == 0, change
    assert build(peft=LoraConfig(r=8, target_modules=["k_proj"])).reference_forwards == 0  # its reference is the base
    assert build().reference_forwards == 0  # and a full fine-tuning starts there too


def test_weights_precision_truncation_and_length_weighing_do_not(build, tiny):
    assert build().reference_forwards == 14
    moved = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        moved.model.norm.weight[0] += 1e-6
    assert build(model=moved).reference_forwards == 14
    assert build(model=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)).reference_forwards == 14
    assert build(bf16=True).reference_forwards == 14
    short = build(max_length=90)
    assert 0 < short.reference_forwards < 14  # the rows that it cuts
    assert build(max_length=90, truncation_mode="keep_end").reference_forwards > 0
    assert build(ld_alpha=0.5).reference_forwards == 14
    assert build(ld_alpha=0.5).reference_forwards == 0
    assert len(references(short.reference_cache)) == 4


def test_a_copied_adapter_is_a_reference_of_its_own(build, tiny):
    def adapted(seed):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    base = build()
    trainer = build(model=adapted(0))
    assert "ref" in trainer.model.peft_config and trainer.reference_forwards == 14
    assert np.abs(logps(trainer, *DPO_COLUMNS) - logps(base, *DPO_COLUMNS)).max() > 1e-3
    assert build(model=adapted(0)).reference_forwards == 0
    assert build(model=adapted(1)).reference_forwards == 14


def test_training_is_the_same_with_a_full_cache_as_with_an_empty_one(build):
    losses = []
    for _ in range(2):
        trainer = build(peft=LORA, logging_steps=1, lr_scheduler_type="constant", learning_rate=1e-2)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_damaged_shard_is_named_and_computed_again(build, capsys):
    first = build(precompute_ref_batch_size=4, cache="damaged")
    [shard] = Path(first.reference_cache).glob("*/*.rows")
    shard.write_bytes(shard.read_bytes()[:-7])
    again = build(cache="damaged")
    assert f"{shard} is damaged" in capsys.readouterr().out
    assert again.reference_forwards == 14
    np.testing.assert_allclose(logps(again, *DPO_COLUMNS), logps(first, *DPO_COLUMNS), rtol=1e-5)


def test_a_run_that_was_stopped_goes_on_where_it_was(build, tiny):
    class Stopped(CachedDPO):
        reference_write_seconds = 0.0

        def compute_ref_log_probs(self, model, inputs):
            if self.forwards == 3:
                raise KeyboardInterrupt
            self.forwards += 1
            return super().compute_ref_log_probs(model, inputs)

        forwards = 0

    with pytest.raises(KeyboardInterrupt):
        build(Stopped, precompute_ref_batch_size=2)
    assert build().reference_forwards == 14 - 6


def test_wrong_log_probs_stop_the_run(build):
    trainer = build()
    [store] = references(trainer.reference_cache)
    wrong = {key: logp - 1.0 for key, logp in store.read().items()}
    for shard in store.folder.glob("*.rows"):
        shard.unlink()
    store.append(wrong)
    with pytest.raises(RuntimeError, match=f"recipes.cache clear=true identity={store.identity}"):
        build()


def test_the_reference_unused_for_longest_goes_when_the_cache_is_full(tmp_path):
    stores = [ReferenceStore(tmp_path, name, {"model": name}) for name in ("a", "b", "c")]
    for age, store in enumerate(stores):
        store.append({bytes([row, age] * 8): -1.5 for row in range(200)})
        os.utime(store.folder / "reference.json", (1e9 + age, 1e9 + age))
    shrink(tmp_path, 9e-6, keep="a")
    assert [store.identity for store in references(tmp_path)] == ["c", "a"]
    assert stores[0].read()[bytes([7, 0] * 8)] == -1.5
    with stores[0].lock():
        shrink(tmp_path, 1e-9, keep="c")
        assert [store.identity for store in references(tmp_path)] == ["c", "a"]  # a is in use


def test_identity_follows_the_configuration_and_not_the_path(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    identity, about = reference_identity(model, "no")
    model.save_pretrained(tmp_path)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert reference_identity(copy, "no")[0] == identity and about["dtype"] == "float32"
    copy.config.rms_norm_eps *= 2
    assert reference_identity(copy, "no")[0] != identity
    assert reference_identity(model, "bf16")[0] != identity


PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from test_reference_cache import *
import time
class Slow(CachedDPO):
    reference_cache = sys.argv[1]
    reference_write_seconds = 0.0
    def compute_ref_log_probs(self, model, inputs):
        time.sleep(0.3)
        return super().compute_ref_log_probs(model, inputs)
arguments = DPOConfig(output_dir=sys.argv[1] + "-run", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    precompute_ref_log_probs=True, precompute_ref_batch_size=3, max_length=256, gradient_checkpointing=False,
    per_device_train_batch_size=2, max_steps=1, save_strategy="no")
trainer = Slow({tiny!r}, args=arguments, train_dataset=pairs())
if "train" in sys.argv:
    trainer.train()
if trainer.is_world_process_zero():
    print("FORWARDS", trainer.reference_forwards, json.dumps(logps(trainer, *DPO_COLUMNS).tolist()))
"""


def start(command, script, cache, *more):
    path = Path(f"{cache}.py")
    path.write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *command, path, str(cache), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    line = next(line for line in output.splitlines() if line.startswith("FORWARDS"))
    return int(line.split()[1]), np.array(json.loads(line.split(maxsplit=2)[2])), output


@pytest.mark.slow
def test_of_two_processes_one_computes_and_the_other_waits(tiny, tmp_path):
    script = PROCESS.format(tests=str(Path(__file__).parent), tiny=tiny)
    first, second = sorted((result(process) for process in [start([], script, tmp_path / "c") for _ in range(2)]),
                           key=lambda found: found[0])  # fmt: skip
    assert (first[0], second[0]) == (0, 14)
    assert "waiting for it" in first[2]
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.slow
def test_two_ranks_share_the_reference_and_train(build, tiny, tmp_path):
    script = PROCESS.format(tests=str(Path(__file__).parent), tiny=tiny)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    forwards, values, _ = result(start(torchrun, script, tmp_path / "ranks", "train"))
    assert forwards == 14
    np.testing.assert_allclose(values, logps(build(cache="ranks"), *DPO_COLUMNS), rtol=1e-5)
    assert build(cache="ranks").reference_forwards == 0


def test_the_cache_is_shown_and_cleared_from_the_command_line(tmp_path):
    about = {"model": "m", "dtype": "float32", "mixed_precision": "bf16", "quantization": None, "adapter": False}
    for name in ("aa11", "bb22"):
        ReferenceStore(tmp_path / "reference", name, about).append({bytes(16): -1.0, bytes(range(16)): -2.0})

    def recipe(*arguments):
        environment = {**os.environ, "PREFTUNE_CACHE": str(tmp_path)}
        command = [sys.executable, "-m", "recipes.cache", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    shown = recipe().stdout
    assert "aa11" in shown and "float32 in bf16" in shown and "2 references" in shown
    assert "no such reference" in recipe("clear=true", "identity=cc").stderr
    cleared = json.loads(recipe("clear=true", "identity=aa", "format=json").stdout)["references"]
    assert [(each["identity"], each["rows"], each["cleared"]) for each in cleared] == [("aa11", 2, True)]
    assert [store.identity for store in references(tmp_path / "reference")] == ["bb22"]
