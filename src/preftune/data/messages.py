"""Dialogues in the forms that data sets write them in, as one form: lists of {role, content}."""

import re
from collections.abc import Callable

from preftune.data.findings import RowFault
from preftune.data.formats import json_type

NAMES = {
    "user": "user human prompter",
    "assistant": "assistant gpt bot model chatgpt",
    "system": "system developer",
    "tool": "tool function observation",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_LINE = re.compile(r"(?:^|\n)(Human|Assistant):")  # where no empty line parts the turns
HH_START = re.compile(r"\s*Human:")

Messages = list[dict[str, str]]


def is_messages(value: object) -> bool:
    """Whether a value looks like a dialogue: a list of mappings with a role, or one such mapping."""
    if isinstance(value, dict):
        return bool({"role", "from"} & value.keys())
    listed = isinstance(value, list) and bool(value)
    return listed and all(isinstance(item, dict) and is_messages(item) for item in value)


def is_dialogue_text(value: object) -> bool:
    """Whether a text is a dialogue in Anthropic's form, `\\n\\nHuman: …\\n\\nAssistant: …`."""
    return isinstance(value, str) and HH_START.match(value) is not None


def opens_dialogue(value: object) -> bool:
    """Whether a value is a dialogue from its start, and not an answer alone."""
    if not is_messages(value):
        return is_dialogue_text(value)
    return message(value if isinstance(value, dict) else value[0], "chosen")["role"] != "assistant"


def message(item: dict, where: str) -> dict[str, str]:
    """One message as {role, content}. Raises RowFault where its role is unknown or its content is no text."""
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowFault("wrong_type", f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # of parts
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowFault("wrong_type", f"{where} holds more than text (images, audio), which is not supported")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowFault("wrong_type", f"{where} has {json_type(content)} as its content, a text is wanted")
    return {"role": ROLES[role.lower()], "content": content}


def from_dialogue_text(text: str, column: str) -> Messages:
    """The messages of a dialogue in Anthropic's form, or with single line breaks between its turns.

    A last `Assistant:` alone is an empty message.
    """
    text = text.lstrip()
    parted = len(HH_TURN.findall(text)) > 1
    start, *turns = (HH_TURN if parted else HH_LINE).split(text)
    if start.strip():
        raise RowFault("wrong_type", f"{column} does not begin with Human:")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": ROLES[role.lower()], "content": said.strip()} for role, said in pairs]


def as_messages(value: object, column: str, of_text: Callable[[str, str], Messages]) -> Messages:
    """A column as messages: of a list of messages, or of a text by `of_text(text, column)`. Raises RowFault."""
    if isinstance(value, str):
        return of_text(value, column)
    if is_messages(value):
        listed = [value] if isinstance(value, dict) else value
        return [message(item, f"{column}[{place}]") for place, item in enumerate(listed)]
    raise RowFault("wrong_type", f"{column} is {json_type(value)}; a text or a list of messages is wanted")


def as_prompt(value: object) -> Messages:
    """A prompt column as messages: a question, a dialogue in either form, or nothing. Raises RowFault."""
    return [] if value == [] else as_messages(value, "prompt", prompt_of_text)


def prompt_of_text(text: str, column: str) -> Messages:
    if not is_dialogue_text(text):
        return [{"role": "user", "content": text}]
    found = from_dialogue_text(text, column)
    if found[-1]["role"] == "assistant" and not found[-1]["content"]:
        found.pop()  # the cue for the answer, which chat templates write themselves
    return found


def as_answer(value: object, column: str) -> Messages:
    """An answer column as messages. Raises RowFault where it is neither a text nor a list of messages."""
    return as_messages(value, column, lambda text, _: [{"role": "assistant", "content": text}])


def as_dialogue(value: object, column: str) -> Messages:
    """A whole dialogue as messages, from a list of messages or from Anthropic's text. Raises RowFault."""
    return as_messages(value, column, from_dialogue_text)


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen answer, rejected answer) of two whole dialogues.

    The prompt is what they share, cut so that both answers begin with an assistant's turn and neither is left out.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not (chosen[shared]["role"] == rejected[shared]["role"] == "assistant"):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_last(dialogue: Messages) -> tuple[Messages, Messages]:
    """(prompt, answer) of one dialogue: the answer is the run of messages after its last user turn."""
    last = max((place for place, turn in enumerate(dialogue) if turn["role"] == "user"), default=-1)
    return dialogue[: last + 1], dialogue[last + 1 :]
