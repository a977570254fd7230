"""A run's model in the terminal: one dialogue, streamed, with the reference's below it where that is wanted."""

import sys
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase, TextStreamer

from preftune.evaluate.generation import generated
from preftune.evaluate.judge import Endpoint
from preftune.evaluate.subjects import SubjectError, find, load, weights
from preftune.models.load import quiet

RESET, QUIT = "/reset", "/quit"
TIMEOUT = 120  # seconds for one answer of an endpoint


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

    Each of the two goes on with its own answers. With `cfg.endpoint` the server there answers, which knows the model as
    `cfg.run`. Raises SubjectError, ModelError and JudgeError.
    """
    quiet()
    answering = served(cfg) if cfg.endpoint else loaded(cfg)
    dialogues: dict[str, list[dict]] = {name: [] for name in answering}
    torch.manual_seed(cfg.seed)
    beside = f", reference {cfg.reference or find(cfg.run).start.path}" if cfg.compare else ""
    print(f"{cfg.run}{beside}. {RESET}, {QUIT}")
    for line in typed():
        if line == QUIT:
            break
        if line == RESET:
            dialogues = {name: [] for name in answering}
            print("(forgotten)", flush=True)
            continue
        for name, dialogue in dialogues.items():
            print(f"{name}> ", end="", flush=True)
            dialogue.append({"role": "user", "content": line})
            dialogue.append({"role": "assistant", "content": answering[name](dialogue).strip()})


def loaded(cfg: DictConfig) -> dict[str, Callable[[list[dict]], str]]:
    """By name, what answers a dialogue: the model of `cfg.run`, and its reference where that is wanted."""
    subject = find(cfg.run)
    if subject.scores_texts:
        raise SubjectError(
            f"run={cfg.run} is a reward model, which scores answers and gives none: python -m recipes.evaluate "
            f"models=[{cfg.run}]"
        )
    if not cfg.compare:
        model, tokenizer = weights(subject), subject.tokenizer()
        return {"policy": lambda dialogue: answer(model, tokenizer, dialogue, cfg)}
    both = load(subject, cfg.reference)

    def reference(dialogue: list[dict]) -> str:
        with both.reference() as other:
            return answer(other, both.tokenizer, dialogue, cfg)

    return {"policy": lambda dialogue: answer(both.model, both.tokenizer, dialogue, cfg), "reference": reference}


def served(cfg: DictConfig) -> dict[str, Callable[[list[dict]], str]]:
    """The same for a model behind an OpenAI-compatible endpoint."""
    if cfg.compare:
        raise SubjectError("compare=true shows a reference that is loaded here: leave endpoint out, or compare")
    options = {"max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p, "seed": cfg.seed}
    server = Endpoint(cfg.endpoint, cfg.run, "OPENAI_API_KEY", TIMEOUT, options)

    def policy(dialogue: list[dict]) -> str:
        said = server.answer(dialogue)
        print(said, flush=True)
        return said

    return {"policy": policy}


def typed() -> Iterator[str]:
    """The lines that the user types, asked for in a terminal, else read as they come; empty ones are passed over."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, dialogue: list[dict], cfg: DictConfig) -> str:
    """The model's answer to a dialogue, printed while it is made; Ctrl-C ends it early."""
    drawing = {"do_sample": True, "temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": 0}
    how, streamer = drawing if cfg.temperature else {"do_sample": False}, Streamer(tokenizer)
    try:
        generated(model, tokenizer, [dialogue], cfg.max_new_tokens, False, streamer=streamer, **how)
    except KeyboardInterrupt:
        print()
    return streamer.said
