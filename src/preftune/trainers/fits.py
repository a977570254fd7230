"""Whether tokens and rows fit the model that they are given to: what would end in an IndexError in the middle."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preftune.data.load import Data
from preftune.data.messages import said
from preftune.data.shapes import ANSWERS
from preftune.data.token_checks import ids_of, options
from preftune.models.load import ModelError
from preftune.models.tokenizer import PROBE

RESIZE = (
    "python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; p = '{path}'; t = "
    "T.from_pretrained(p); m = M.from_pretrained(p); m.resize_token_embeddings(len(t)); m.save_pretrained('resized'); "
    "t.save_pretrained('resized')\""
)


def require(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: DictConfig, data: Data) -> None:
    """Raise ModelError where a token that will be fed has no embedding, or a row no position."""
    require_embeddings(model, tokenizer, cfg, data)
    limit, cut = learned_positions(model), cfg.train.max_length
    if data.images or limit is None or (cut is not None and cut <= limit):
        return
    longest = max(lengths(tokenizer, data), default=0)
    if min(longest, cut or longest) > limit:
        raise ModelError(
            f"train.max_length={cut}: the longest row has {longest:,} tokens, and model.path={cfg.model.path} has "
            f"learned {limit:,} positions and no more: train.max_length={limit}"
        )


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has an embedding for; None where it computes them."""
    wanted = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    for module in model.modules() if wanted else ():
        if isinstance(module, torch.nn.Embedding) and module is not words and 0 <= module.num_embeddings - wanted <= 8:
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(wanted, module.num_embeddings - reserved)
    return None


def lengths(tokenizer: PreTrainedTokenizerBase, data: Data) -> Iterator[int]:
    """The tokens of each dialogue that is trained on or evaluated; of a stream, which is not read twice, none."""
    for rows in (data.train, data.eval, *data.eval_sets.values()):
        for batch in rows.iter(1000) if isinstance(rows, Dataset) else ():
            for column in batch.keys() & set(sum(ANSWERS.values(), ())):
                dialogues = [prompt + answer for prompt, answer in zip(batch["prompt"], batch[column], strict=True)]
                yield from map(len, ids_of(tokenizer, dialogues, options(batch)))


def require_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: DictConfig, data: Data) -> None:
    """Raise ModelError where a token that will be fed has no embedding; those that no row holds are harmless."""
    weight = model.get_input_embeddings().weight
    words = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 shards it as it is loaded
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= words}
    if not beyond:
        return
    rendered = tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=True)["input_ids"]
    always = {tokenizer.pad_token_id, *rendered} & set(beyond.values())
    used = [token for token, number in beyond.items() if number in always] or met(list(beyond), data)
    if used:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in ends]
        raise ModelError(
            f"model.path={cfg.model.path}: the tokenizer writes {used[0]!r} (token {beyond[used[0]]}), and the model "
            f"has {words:,} embeddings. Give it more once, then model=path model.path=resized; an adapter learns them "
            f"with '+lora.modules_to_save=[{','.join(names)}]' alone: {RESIZE.format(path=cfg.model.path)}"
        )


def met(tokens: list[str], data: Data) -> list[str]:
    """Which of these tokens the rows hold as text."""
    for rows in (data.train, data.eval, *data.eval_sets.values()):
        for row in rows if isinstance(rows, Dataset) else ():  # a stream is not read twice
            for column in ("prompt", *dict.fromkeys(sum(ANSWERS.values(), ()))):
                text = "".join(map(said, row.get(column) or ()))
                if found := [token for token in tokens if token in text]:
                    return found
    return []
