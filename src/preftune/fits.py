"""Whether tokens and rows fit the model that they are given to: what would end in an IndexError in the middle."""

from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from preftune.data import Data
from preftune.data.shapes import ANSWERS
from preftune.models import ModelError
from preftune.tokenizer import PROBE

RESIZE = (
    "python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; p = '{path}'; t = "
    "T.from_pretrained(p); m = M.from_pretrained(p); m.resize_token_embeddings(len(t)); m.save_pretrained('resized'); "
    "t.save_pretrained('resized')\""
)


def require(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: DictConfig, data: Data) -> None:
    """Raise ModelError where a token that will be fed has no embedding; those that no row holds are harmless."""
    words = model.get_input_embeddings().weight.shape[0]
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
    for rows in (data.train, data.eval):
        for row in rows if isinstance(rows, Dataset) else ():  # a stream is not read twice
            for column in ("prompt", *dict.fromkeys(sum(ANSWERS.values(), ()))):
                text = "".join(message["content"] or "" for message in row.get(column) or ())
                if found := [token for token in tokens if token in text]:
                    return found
    return []
