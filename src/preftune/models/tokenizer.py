"""The tokenizer of a run: a chat template that renders, the token that ends a turn, a padding token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from preftune.config.errors import UserError

if TYPE_CHECKING:  # data is read without torch
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = Path(__file__).with_name("plain_chat.jinja")
TRAINING = "training"  # as model.chat_template: the one that TRL ships for training this family
QUESTION, ANSWER = "Preftunequestion", "Preftuneanswer"
PROBE = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
# Templates of vision models read a list of parts where others read a string: this makes one of the other
IN_PARTS = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is string -%}"
    "{%- set message = dict(message, content=[{'type': 'text', 'text': message.content}]) -%}{%- endif -%}"
    "{%- set ns.messages = ns.messages + [message] -%}{%- endfor -%}{%- set messages = ns.messages -%}"
)


class TokenizerError(UserError):
    """What is wrong with the tokenizer or the chat template that a config names, and how to go on."""


def prepare(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> PreTrainedTokenizerBase:
    """Give the tokenizer what `model` asks for, a template that renders text, and a padding token.

    Raises TokenizerError where a token or template that is named cannot be used, or no token can pad.
    """
    for name in ("eos_token", "pad_token"):
        if model[name] is not None:
            if model[name] not in tokenizer.get_vocab():
                raise TokenizerError(f"model.{name}={model[name]}: no such token in the vocabulary of {model.path}")
            setattr(tokenizer, name, model[name])
    tokenizer.chat_template = template(tokenizer, model)
    end = end_of_turn(tokenizer)
    if tokenizer.eos_token is None:
        if end is None:
            raise TokenizerError(f"{model.path} names no EOS token; say which token ends an answer: model.eos_token=…")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out of attention and loss, so its identity is harmless
    return tokenizer


def template(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> str:
    """The chat template as text: the one that `model` names, the tokenizer's own, or the plain one.

    Raises TokenizerError where it renders neither text nor parts.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):  # named variants
        found = found.get("default") or next(iter(found.values()))
    if model.chat_template == TRAINING:
        from trl.chat_template_utils import get_training_chat_template

        try:
            found = get_training_chat_template(tokenizer) or found
        except ValueError:
            raise TokenizerError(
                f"model.chat_template={TRAINING}: TRL ships none for the template of {model.path}; name a file"
            ) from None
    elif model.chat_template is not None:
        try:
            found = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"model.chat_template={model.chat_template}: not a Jinja file that can be read ({error})"
            ) from None
    found = found or PLAIN_TEMPLATE.read_text(encoding="utf-8")
    reasons = []
    for each in (found, IN_PARTS + found):
        try:
            rendered = tokenizer.apply_chat_template(PROBE, tokenize=False, chat_template=each)
        except (TemplateError, ValueError, TypeError) as error:
            reasons.append(str(error).splitlines()[0])
            continue
        if ANSWER in rendered:
            return each
        reasons.append(f"it leaves the answer out: {rendered!r}")
    raise TokenizerError(
        f"the chat template of {model.path} does not render a question and its answer ({reasons[0]}). Name another: "
        "model.chat_template=FILE"
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes behind an answer, the first where it writes several; None: none.

    It need not be the EOS token: Gemma's is <end_of_turn>, gpt-oss's <|return|>, ChatML's <|im_end|>.
    """
    rendered = tokenizer.apply_chat_template(PROBE, tokenize=False) if tokenizer.chat_template else ""
    if ANSWER not in rendered:  # a tokenizer that `prepare` has not seen
        return None
    behind = rendered[rendered.rindex(ANSWER) + len(ANSWER) :].strip()
    special = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    first = next(iter(tokenizer(behind, add_special_tokens=False)["input_ids"]), None)
    return first if first in special else None


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer ends: the one that ends a turn first, and EOS."""
    found = (end_of_turn(tokenizer), tokenizer.eos_token_id)
    return list(dict.fromkeys(token for token in found if token is not None))


def carry(tokenizer: PreTrainedTokenizerBase, model: object) -> None:
    """Write what the tokenizer knows into the model's configs, so that whoever loads the model stops where it stops."""
    stops, generation = stop_tokens(tokenizer), getattr(model, "generation_config", None)
    for config in filter(None, (model.config.get_text_config(), generation)):
        given = config.eos_token_id
        given = [] if given is None else [given] if isinstance(given, int) else list(given)
        ends = list(dict.fromkeys([*stops, *given]))
        if ends:
            config.eos_token_id = ends if len(ends) > 1 else ends[0]
        config.pad_token_id = tokenizer.pad_token_id


def token_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: object) -> list[int]:
    """A message list as the chat template writes it, in tokens."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
