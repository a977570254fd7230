"""Dialogues in the forms that data sets write them in, as one form: lists of {role, content}."""

import re

from preftune.data.findings import RowFault
from preftune.data.formats import json_type

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_LINE = re.compile(r"(?:^|\n)(Human|Assistant):")  # where no empty line parts the turns
HH_START = re.compile(r"\s*Human:")

Messages = list[dict[str, str]]


def is_messages(value: object) -> bool:
    """Whether a value looks like a dialogue: a list of mappings with a role, or one such mapping."""
    if isinstance(value, dict):
        return bool({"role", "from"} & value.keys())
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, dict) and is_messages(item) for item in value)
    )


def is_dialogue_text(value: object) -> bool:
    """Whether a text is a dialogue in Anthropic's form, `\\n\\nHuman: …\\n\\nAssistant: …`."""
    return isinstance(value, str) and HH_START.match(value) is not None


def messages(value: object, column: str) -> Messages:
    """A dialogue as {role, content} messages, whatever it calls its roles and fields.

    Raises RowFault where a role is unknown or a content is no text.
    """
    return [
        message(item, f"{column}[{place}]") for place, item in enumerate([value] if isinstance(value, dict) else value)
    ]


def message(item: dict, where: str) -> dict[str, str]:
    """One message as {role, content}."""
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowFault("wrong_type", f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = parts_text(content, where)
    if not isinstance(content, str):
        raise RowFault("wrong_type", f"{where} has {json_type(content)} as its content, a text is wanted")
    return {"role": ROLES[role.lower()], "content": content}


def parts_text(parts: list, where: str) -> str:
    """The text of a content that is a list of parts, which must all be texts."""
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    raise RowFault("wrong_type", f"{where} holds more than text (images, audio), which is not supported")


def from_dialogue_text(text: str, column: str) -> Messages:
    """The messages of a dialogue in Anthropic's form, or with single line breaks between its turns.

    A last `Assistant:` alone is an empty message.
    """
    text = text.lstrip()
    parted = len(HH_TURN.findall(text)) > 1
    start, *turns = (HH_TURN if parted else HH_LINE).split(text)
    if start.strip():
        raise RowFault("wrong_type", f"{column} does not begin with Human:")
    roles, contents = turns[::2], turns[1::2]
    return [{"role": ROLES[role.lower()], "content": said.strip()} for role, said in zip(roles, contents, strict=True)]


def as_prompt(value: object, system: object = None, column: str = "prompt") -> Messages:
    """A prompt column as messages, the system prompt of a column of its own put first.

    Raises RowFault where it is neither a text nor a dialogue.
    """
    if is_messages(value):
        found = messages(value, column)
    elif is_dialogue_text(value):
        found = from_dialogue_text(value, column)
        if found[-1]["role"] == "assistant" and not found[-1]["content"]:
            found.pop()  # the cue for the answer, which chat templates write themselves
    elif isinstance(value, str):
        found = [{"role": "user", "content": value}]
    elif value == []:
        found = []
    else:
        raise RowFault("wrong_type", f"{column} is {json_type(value)}; a text or a list of messages is wanted")
    if isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}, *found]
    return found


def as_answer(value: object, column: str) -> Messages:
    """An answer column as messages. Raises RowFault where it is neither a text nor a list of messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if is_messages(value):
        return messages(value, column)
    raise RowFault("wrong_type", f"{column} is {json_type(value)}; a text or a list of messages is wanted")


def as_dialogue(value: object, column: str) -> Messages:
    """A whole dialogue as messages, from a list of messages or from Anthropic's text."""
    if isinstance(value, str):
        return from_dialogue_text(value, column)
    if is_messages(value):
        return messages(value, column)
    raise RowFault("wrong_type", f"{column} is {json_type(value)}; a list of messages (role, content) is wanted")


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen answer, rejected answer) of two whole dialogues.

    The prompt is what they share, cut so that both answers begin with an assistant's turn and neither is left out.
    """
    shared = 0
    for mine, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if mine != theirs:
            break
        shared += 1
    while shared and not (chosen[shared]["role"] == rejected[shared]["role"] == "assistant"):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_last(dialogue: Messages) -> tuple[Messages, Messages]:
    """(prompt, answer) of one dialogue: the answer is the run of messages after its last user turn."""
    last = max((place for place, turn in enumerate(dialogue) if turn["role"] == "user"), default=-1)
    return dialogue[: last + 1], dialogue[last + 1 :]
