"""Images of rows: found in a column or in messages, kept as files or bytes, and tried on the model before it trains."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Image, List
from jinja2 import TemplateError
from tqdm.auto import tqdm

from preftune.config.errors import brief
from preftune.data.findings import Findings, RowFault
from preftune.data.messages import Messages
from preftune.data.shapes import ANSWERS

if TYPE_CHECKING:  # data is read without torch
    from transformers import ProcessorMixin

COLUMN = List(Image())
WITHIN = ("image_url", "bytes", "path", "url")  # where a mapping holds its image
LOSSLESS = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes of Pillow's that a PNG holds
MARK = "<image>"  # how LLaVA's and other data say in a text where an image stands
TRIED = 64  # rows whose images are processed before a run


def sees(reader: object) -> bool:
    """Whether a tokenizer is a processor, of a model that sees images."""
    return hasattr(reader, "image_processor")


def placed(row: dict, given: object, kind: str, folders: Callable[[], list[Path]]) -> dict:
    """`images` of a row, and its `prompt` with a part {type: image, id} where each of them stands.

    `given` are the images of its column. They fill the places that the messages have, <image> in a text too; without
    places they come before the user's first text, as TRL puts them. Files are looked for in `folders`. Raises RowFault.
    """
    listed = given if isinstance(given, list) else [given]
    waiting, prompt = [each for each in listed if each is not None and each != ""], row["prompt"]
    if any(parts(turn) for name in ANSWERS[kind] for turn in row[name]):
        raise RowFault("images", "an answer holds images, and answers are texts")
    if not waiting and not any(map(parts, prompt)):
        return {"images": []}
    # every turn of the user in parts: TRL would put images into the first that is a text
    prompt = [turn | {"content": marked(turn["content"])} if is_text(turn) else turn for turn in prompt]
    if waiting and all("image" in part for turn in prompt for part in parts(turn) if part["type"] == "image"):
        prompt = first_of_user(prompt, [{"type": "image"} for _ in waiting])
    images: list[dict] = []

    def filled(part: dict) -> dict:
        if part["type"] != "image":
            return part
        if "image" not in part and not waiting:
            raise RowFault("images", "the prompt has a place for an image, and the row no image for it")
        image, content = stored(part["image"] if "image" in part else waiting.pop(0), folders)
        images.append(image)
        return {"type": "image", "id": xxhash.xxh3_64_hexdigest(content)}

    prompt = [turn | {"content": list(map(filled, content))} if (content := parts(turn)) else turn for turn in prompt]
    if waiting:
        raise RowFault("images", f"the row has {len(waiting)} images more than its prompt has places")
    return {"prompt": prompt, "images": images}


def is_text(turn: dict) -> bool:
    """Whether a message is the user's, and a text."""
    return turn["role"] == "user" and isinstance(turn.get("content"), str)


def marked(text: str) -> list[dict]:
    """A text in parts, with a place for an image where it says <image>."""
    pieces = [{"type": "text", "text": piece} for piece in text.split(MARK)]
    found = [part for piece in pieces for part in ({"type": "image"}, piece)][1:]
    return [part for part in found if part.get("text") != ""] or pieces


def parts(turn: dict) -> list[dict]:
    """The parts of a message that holds images; none of one that is a text."""
    return turn["content"] if isinstance(turn.get("content"), list) else []


def first_of_user(prompt: Messages, images: list[dict]) -> Messages:
    """The prompt with these parts before all that the user says first."""
    at = next((place for place, turn in enumerate(prompt) if turn["role"] == "user"), None)
    if at is None:
        raise RowFault("images", "the row has images, and no turn of the user where they could stand")
    return [*prompt[:at], prompt[at] | {"content": images + parts(prompt[at])}, *prompt[at + 1 :]]


def stored(value: Any, folders: Callable[[], list[Path]]) -> tuple[dict, bytes]:
    """An image as `datasets.Image` keeps it, {bytes, path}, and its bytes.

    It is given as a file, bytes, a data: address or a picture of Pillow's, or as a mapping that holds one of them.
    Raises RowFault where it is none of them, or cannot be opened.
    """
    while isinstance(value, dict):
        value = next((value[name] for name in WITHIN if value.get(name)), None)
    path: Path | None = None
    try:
        if isinstance(value, str) and value.startswith("data:"):
            content = base64.b64decode(value.partition(",")[2], validate=True)
        elif isinstance(value, str) and "://" in value.removeprefix("file://"):
            raise RowFault("images", f"{value[:60]!r} is an address: download the image, and name the file")
        elif isinstance(value, str):
            path = file_in(folders(), value.removeprefix("file://"))
            content = path.read_bytes()
        elif isinstance(value, PIL.Image.Image):
            buffer = io.BytesIO()
            value.save(buffer, "PNG" if value.mode in LOSSLESS else "TIFF")
            content = buffer.getvalue()
        elif isinstance(value, bytes):
            content = value
        else:
            raise RowFault("images", f"{str(value)[:60]!r} is neither a file nor an image")
        with PIL.Image.open(io.BytesIO(content)) as picture:
            picture.load()  # one that was cut short would end the training in the middle
    except RowFault:
        raise
    except PIL.UnidentifiedImageError:
        what = value if isinstance(value, str) and not value.startswith("data:") else "its bytes"
        raise RowFault("images", f"an image cannot be opened: {what[:120]} are in no known format") from None
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise RowFault("images", f"an image cannot be opened: {str(error).splitlines()[0][:120]}") from None
    return {"bytes": None if path else content, "path": path and str(path)}, content


def file_in(folders: list[Path], name: str) -> Path:
    """The file of this name, beside the data or from where the command was typed. Raises RowFault."""
    for folder in folders:
        if (path := (folder / os.path.expanduser(name)).resolve()).is_file():
            return path
    raise RowFault("images", f"there is no file {name!r} (looked in {', '.join(map(str, dict.fromkeys(folders)))})")


def held(rows: Dataset | None) -> np.ndarray:
    """Whether each row has images, shape (rows,), without opening one."""
    if rows is None or "images" not in rows.column_names:
        return np.zeros(len(rows or ()), dtype=bool)
    column = rows.select_columns(["images"]).with_format("arrow")[:]["images"]
    return pc.list_value_length(column).to_numpy(zero_copy_only=False) > 0


def left_out(rows: Dataset | None, findings: Findings) -> Dataset | None:
    """The rows without images, for a model that sees none; the others go into `findings`."""
    mask = held(rows)
    if rows is None or not mask.any():
        return rows
    for origin in rows.select(np.flatnonzero(mask))["origin"]:
        findings.leave_out(origin, RowFault("images", "the row has images"), "")
    return rows.select(np.flatnonzero(~mask))


def check(rows: Dataset, kind: str, processor: ProcessorMixin, max_length: int | None, findings: Findings) -> list[int]:
    """Render and process rows as TRL's collators do; what does not work or fit goes into `findings`.

    Returns the places of the rows that cannot be trained on.
    """
    from trl.data_utils import apply_chat_template, prepare_multimodal_messages

    refused = []
    for place, row in enumerate(tqdm(rows, desc="trying the images", unit="row", delay=3, leave=False)):
        images = row["images"]
        if row["tools"]:  # TRL's collators for images give the template none
            findings.add("tools_ignored", [row["origin"]])
        example = {"chat_template_kwargs": row["chat_template_kwargs"]}
        if ANSWERS[kind]:
            example["completion"] = prepare_multimodal_messages(row[ANSWERS[kind][0]])
        try:
            whole = {"prompt": prepare_multimodal_messages(row["prompt"], images)} | example
            bare = {"prompt": prepare_multimodal_messages(without_images(row["prompt"]))} | example
            prompt = apply_chat_template(whole, processor)["prompt"]
            if images and prompt == apply_chat_template(bare, processor)["prompt"]:
                raise ValueError("it leaves the images out")
            ids = processor(images=[images] if images else None, text=[prompt], add_special_tokens=False)["input_ids"]
        except (TemplateError, ValueError, TypeError, AttributeError, KeyError, IndexError, OSError) as error:
            findings.leave_out(row["origin"], RowFault("template_refuses", brief(error)), "")
            refused.append(place)
            continue
        if max_length is not None and len(ids[0]) >= max_length:
            detail = f"a prompt of {len(ids[0]):,} tokens"
            findings.leave_out(row["origin"], RowFault("images_cut", detail), "")
            refused.append(place)
    return refused


def without_images(prompt: Messages) -> Messages:
    """A prompt without its images; turns that are texts stay as they are."""
    texts = [[part for part in parts(turn) if part["type"] == "text"] for turn in prompt]
    return [turn | {"content": some} if parts(turn) else turn for turn, some in zip(prompt, texts, strict=True)]
