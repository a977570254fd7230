"""A run's model in the terminal: one dialogue, streamed, with the reference's below it where that is wanted."""

import sys
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase, TextStreamer

from preftune.evaluate import subjects
from preftune.evaluate.subjects import Loaded, find, weights
from preftune.models.load import quiet
from preftune.models.tokenizer import stop_tokens, token_ids

RESET, QUIT = "/reset", "/quit"


class Streamer(TextStreamer):
    """Prints an answer as it grows, and keeps it for the dialogue."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said += text
        print(text, end="\n" if stream_end else "", flush=True)


def chat(cfg: DictConfig) -> None:
    """Answer each line of stdin with the model of `cfg.run`, and with its reference too where `cfg.compare`.

    Each of the two goes on with its own answers. Raises SubjectError and ModelError.
    """
    quiet()
    subject = find(cfg.run)
    if cfg.compare:
        loaded = subjects.load(subject, cfg.reference)
    else:
        loaded = Loaded(weights(subject), subject.tokenizer(), None)
    names = ["policy", "reference"] if cfg.compare else ["policy"]
    dialogues = {name: [] for name in names}
    torch.manual_seed(cfg.seed)
    print(f"{cfg.run}{f', reference {cfg.reference or subject.start.path}' if cfg.compare else ''}. {RESET}, {QUIT}")
    for line in typed():
        if line == QUIT:
            break
        if line == RESET:
            dialogues = {name: [] for name in names}
            print("(forgotten)", flush=True)
            continue
        for name, dialogue in dialogues.items():
            print(f"{name}> ", end="", flush=True)
            dialogue.append({"role": "user", "content": line})
            if name == "policy":
                said = answer(loaded.model, loaded.tokenizer, dialogue, cfg)
            else:
                with loaded.reference() as other:
                    said = answer(other, loaded.tokenizer, dialogue, cfg)
            dialogue.append({"role": "assistant", "content": said.strip()})


def typed() -> Iterator[str]:
    """The lines that the user types, asked for in a terminal, else read as they come; empty ones are passed over."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, dialogue: list[dict], cfg: DictConfig) -> str:
    """The model's answer to a dialogue, printed while it is made; Ctrl-C ends it early."""
    ids = torch.tensor([token_ids(tokenizer, dialogue, add_generation_prompt=True)], device=model.device)
    drawing = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": 0} if cfg.temperature else {}
    streamer = Streamer(tokenizer)
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=cfg.max_new_tokens,
            do_sample=bool(cfg.temperature),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_tokens(tokenizer),
            streamer=streamer,
            **drawing,
        )
    except KeyboardInterrupt:
        print()
    return streamer.said
