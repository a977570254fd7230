"""A byte tokenizer, a few pairs, and trainers in float32 on the CPU: TRL's own and the packed one."""

import copy

import pytest
from datasets import Dataset
from tiny_models import VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preftune.fastpath import mixins

PAIRS = [
    ("Who is there?", "A friend of the house.", "A foe."),
    ("Why?", "Because.", "Because I say so, and that is that."),
    ("Tell me a story of the sea and of ships", "No", "Once there was a ship"),
    ("Hm", "Yes and no", "Yes and yes"),
]


@pytest.fixture(scope="session")
def tokenizer():
    core = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")


@pytest.fixture
def trainers(tokenizer, tmp_path):
    """Make a trainer of TRL's class and one with the packed forward, on copies of one model, with equal arguments."""

    def make(cls, config, model, rows, peft_config=None, ref_model=None, form=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": len(rows),
            "max_length": 48,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 1e-3,
        }
        return [
            kind(
                model=copy.deepcopy(model),
                args=config(**(defaults | arguments)),
                train_dataset=Dataset.from_list(rows),
                processing_class=copy.deepcopy(tokenizer),
                peft_config=copy.deepcopy(peft_config),
                **({} if ref_model is None else {"ref_model": copy.deepcopy(ref_model)}),
            )
            for kind in (cls, type(cls.__name__, (mixins(cls)[0], cls), {"form": form}))
        ]

    return make


@pytest.fixture(scope="session")
def pairs() -> list[dict]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
