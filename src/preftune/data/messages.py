"""Dialogues in the forms that data sets write them in, as one form: lists of {role, content, …}.

What else a message holds (tool calls, reasoning, a name) is kept for the chat template.
"""

import json
import re
from collections.abc import Callable

from preftune.data.findings import RowFault
from preftune.data.formats import json_type

NAMES = {
    "user": "user human prompter",
    "assistant": "assistant gpt bot model chatgpt function_call",
    "system": "system developer",
    "tool": "tool function observation",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_LINE = re.compile(r"(?:^|\n)(Human|Assistant):")  # where no empty line parts the turns
INST = re.compile(r"\s*(?:</s>)?\s*(?:<s>)?\s*\[/?INST\]\s*")
SYS = re.compile(r"<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)
TURNS = {  # how a template opens a turn, in texts that were rendered before
    "ChatML": re.compile(r"<\|im_start\|>(\w+)\n"),
    "Llama 3": re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n+"),
    "Gemma": re.compile(r"<start_of_turn>(\w+)\n"),
}
BEGIN = re.compile(r"\s*(?:<\|begin_of_text\|>|<bos>|<s>)?\s*")
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<|endoftext|>", "<eos>")  # how it closes one
PICTURES = ("image", "image_url", "input_image")  # types of parts
STARTS = {"Human/Assistant": re.compile("Human:"), "Llama 2": re.compile(r"\[INST\]")} | TURNS
TEXT, REASONING = ("role", "from", "content", "value"), ("reasoning_content", "reasoning", "thinking")

Messages = list[dict]


def said(message: dict) -> str:
    """All that a message says: its text, its reasoning and its tool calls."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] if part["type"] == "text" else f"<image {part.get('id')}>" for part in content)
    if len(message) == 2:  # role and content, as most are
        return content
    parts = (message.get(name) for name in (*REASONING, "tool_calls"))
    return content + "".join(part if isinstance(part, str) else json.dumps(part) for part in parts if part)


def is_messages(value: object) -> bool:
    """Whether a value looks like a dialogue: a list of mappings with a role, or one such mapping."""
    if isinstance(value, dict):
        return bool({"role", "from"} & value.keys())
    listed = isinstance(value, list) and bool(value)
    return listed and all(isinstance(item, dict) and is_messages(item) for item in value)


def unended(text: str) -> str:
    """A text without the token that closed its turn, which the chat template writes itself."""
    bare = text.rstrip()
    if not bare.endswith(ENDS):
        return text
    return next(bare.removesuffix(end).rstrip() for end in ENDS if bare.endswith(end))


def format_of(value: object) -> str | None:
    """The template that a text was rendered with before, as in Anthropic's `\\n\\nHuman: …`; None for other values."""
    if not isinstance(value, str):
        return None
    start = BEGIN.match(value).end()
    return next((name for name, turn in STARTS.items() if turn.match(value, start)), None)


def opens_dialogue(value: object) -> bool:
    """Whether a value is a dialogue from its start, and not an answer alone."""
    if not is_messages(value):
        return format_of(value) is not None
    return message(value if isinstance(value, dict) else value[0], "chosen")["role"] != "assistant"


def message(item: dict, where: str) -> dict:
    """One message as {role, content, …}. Raises RowFault where its role is unknown or its content is no text or image.

    A message that calls tools may have no content; it stays as it is given, for templates tell null from a text.
    """
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowFault("wrong_type", f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    rest = {name: value for name, value in item.items() if name not in TEXT and value is not None}
    content = item.get("content", item.get("value"))
    if role == "function_call":
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": call(content, where)}]} | rest
    if isinstance(content, list):
        content = of_parts(content, where)
        if any(part["type"] == "image" for part in content):
            return {"role": ROLES[role.lower()], "content": content} | rest
        content = "".join(part["text"] for part in content)
    if content is None and rest.get("tool_calls"):
        return {"role": ROLES[role.lower()]} | ({"content": None} if "content" in item else {}) | rest
    if not isinstance(content, str):
        raise RowFault("wrong_type", f"{where} has {json_type(content)} as its content, a text is wanted")
    return {"role": ROLES[role.lower()], "content": content} | rest


def of_parts(content: list, where: str) -> list[dict]:
    """Parts of a message as {type: text, text} and {type: image}, with `image` where it stands inside. Raises RowFault.

    It is written as in OpenAI's messages (image_url, input_image) or as in transformers' (image, path, url).
    """
    found = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in PICTURES:
            address = f"data:;base64,{part['base64']}" if part.get("base64") else None
            inside = [part[name] for name in ("image", "image_url", "path", "url") if part.get(name)] or [address]
            found.append({"type": "image"} | ({"image": inside[0]} if inside[0] else {}))
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            found.append({"type": "text", "text": part["text"]})
        else:
            raise RowFault("images", f"{where} holds more than texts and images")
    return found


def call(content: object, where: str) -> dict:
    """ShareGPT's function_call, an object as JSON text. Raises RowFault."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        found = None
    if not isinstance(found, dict) or "name" not in found:
        raise RowFault("wrong_type", f"{where} is a function_call without a name: {str(content)[:40]!r}")
    return found


def from_dialogue_text(text: str, column: str) -> Messages:
    """The messages of a dialogue that was rendered as a text. A last cue for the assistant is an empty message.

    Human: and Assistant: may stand behind empty lines or behind single line breaks.
    """
    form, text = format_of(text), text[BEGIN.match(text).end() :]
    if form is None:
        raise RowFault("wrong_type", f"{column} does not begin with Human: or with a template's user turn")
    if form == "Llama 2":
        return from_inst(text)
    _, *turns = TURNS.get(form, HH_TURN).split(text)
    if form not in TURNS and len(turns) < 4:  # one turn alone: the others may stand behind single line breaks
        _, *turns = HH_LINE.split(text)
    found = []
    for role, content in zip(turns[::2], turns[1::2], strict=True):
        if role.lower() not in ROLES:
            raise RowFault("wrong_type", f"{column} has the role {role!r}; known are {', '.join(ROLES)}")
        found.append({"role": ROLES[role.lower()], "content": unended(content).strip()})
    return found


def from_inst(text: str) -> Messages:
    """The messages of a text with Llama 2's and Mistral's [INST] … [/INST]."""
    _, *turns = INST.split(text)
    roles = ["user", "assistant"] * len(turns)
    found = [{"role": role, "content": unended(said).strip()} for role, said in zip(roles, turns, strict=False)]
    if system := SYS.match(found[0]["content"]):
        found[0]["content"] = found[0]["content"][system.end() :]
        found.insert(0, {"role": "system", "content": system[1]})
    return found


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
    if format_of(text) is None:
        return [{"role": "user", "content": text}]
    found = from_dialogue_text(text, column)
    if found[-1]["role"] == "assistant" and not found[-1]["content"]:
        found.pop()  # the cue for the answer, which chat templates write themselves
    return found


def as_answer(value: object, column: str) -> Messages:
    """An answer column as messages. Raises RowFault where it is neither a text nor a list of messages."""
    return as_messages(value, column, lambda text, _: [{"role": "assistant", "content": unended(text)}])


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
    """(prompt, answer) of one dialogue: the answer is the run of messages after its last user turn.

    Turns with `weight: 0` or `train: false` are not learned: the answer ends with the last turn that is, and begins
    behind the last before it that is not.
    """
    learned = [turn["role"] == "assistant" and is_learned(turn) for turn in dialogue]
    end = len(dialogue) - learned[::-1].index(True) if True in learned and "assistant" in dialogue[-1]["role"] else None
    dialogue = dialogue[:end]
    masked = [turn["role"] == "user" or (turn["role"] == "assistant" and not is_learned(turn)) for turn in dialogue]
    last = max((place for place, stays in enumerate(masked) if stays), default=-1)
    while last + 1 < len(dialogue) and dialogue[last + 1]["role"] == "tool":
        last += 1
    return dialogue[: last + 1], dialogue[last + 1 :]


def is_learned(turn: dict) -> bool:
    """Whether a turn is trained on: OpenAI's `weight` and Axolotl's `train` say where it is not."""
    return turn.get("weight") != 0 and turn.get("train") is not False
