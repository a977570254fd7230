"""Write train.jsonl and eval.jsonl from the readable text in source/ and manners/.

    python -m preftune.data.demo.build           write both files
    python -m preftune.data.demo.build --check   exit 1 if the files there differ from a rebuild
    python -m preftune.data.demo.build --stats   print what the README states

Every choice hangs on SHA-256 of the prompt, not on Python's random module, so that all versions write the same bytes.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean

from preftune.data.demo import EVAL, HERE, TRAIN

EVAL_SHARE = 0.2
TOPIC_WORDS = 8
CANDIDATES = 200
PATHS = {"train": TRAIN, "eval": EVAL}


@dataclass(frozen=True)
class Entry:
    id: str
    question: str
    answer: str
    topic: str
    half: str | None = None


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: the form in which texts are compared."""
    return re.findall(r"[^\W_]+", text.lower())


def draw(*key: object) -> int:
    """A large integer that is fixed by the key alone."""
    return int(sha256("\n".join(map(str, key)).encode()).hexdigest(), 16)


def read_entries(folder: Path) -> list[Entry]:
    """All entries of source/<topic>.txt; ValueError names file and line of the first malformed or repeated one."""
    entries, seen = [], {}
    for path in sorted(folder.glob("*.txt")):
        lines = [*path.read_text(encoding="utf-8").splitlines(), ""]
        block, count = {}, 0
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if line:
                add_field(block, line, where)
            elif block:
                count += 1
                entries.append(finish(block, f"{path.stem}-{count:03d}", where))
                question = tuple(words(block["Q"]))
                if question in seen:
                    raise ValueError(f"{where}: the Q: of the block above stands in {seen[question]} too; ask another")
                seen[question] = f"{path.name}, entry {count}"
                block = {}
    return entries


def add_field(block: dict[str, str], line: str, where: str) -> None:
    name, colon, text = line.partition(": ")
    if name not in ("Q", "A", "T", "H") or not colon or not text.strip():
        raise ValueError(f"{where}: want a line 'Q: ', 'A: ', 'T: ' or 'H: ' with text, got {line!r}")
    if name in block:
        raise ValueError(f"{where}: a second {name}: in one block; is a blank line missing above?")
    if name == "T" and len(text.split()) > TOPIC_WORDS:
        raise ValueError(f"{where}: T: has {len(text.split())} words, want at most {TOPIC_WORDS}")
    if name == "H" and text.endswith("."):
        raise ValueError(f"{where}: H: is put into a sentence; write it without a full stop")
    block[name] = text.strip()


def finish(block: dict[str, str], id: str, where: str) -> Entry:
    missing = [name for name in "QAT" if name not in block]
    if missing:
        raise ValueError(f"{where}: the block above lacks {' and '.join(f'{name}:' for name in missing)}")
    return Entry(id, block["Q"], block["A"], block["T"], block.get("H"))


def read_phrases(path: Path) -> dict[tuple[str, str], list[str]]:
    """The phrases of one manner, keyed by (split, part): ("train", "opener"), ("eval", "closer") and so on."""
    phrases, key = defaultdict(list), None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        heading = re.fullmatch(r"\[(train|eval) (opener|middle|closer)\]", line)
        if heading:
            key = heading.groups()
        elif line and not line.startswith("#"):
            if key is None or line.startswith("{topic}"):
                raise ValueError(f"{path}:{number}: want a [split part] heading above, and no {{topic}} at the start")
            phrases[key].append(line)
    return phrases


def split(entries: list[Entry]) -> dict[str, list[Entry]]:
    """A fifth of every topic, the lowest hashes of its questions, is held out for evaluation."""
    topics = defaultdict(list)
    for entry in entries:
        topics[entry.id.rpartition("-")[0]].append(entry)
    held_out = set()
    for group in topics.values():
        group.sort(key=lambda entry: draw("split", entry.question))
        held_out.update(group[: round(EVAL_SHARE * len(group))])
    return {"train": [e for e in entries if e not in held_out], "eval": [e for e in entries if e in held_out]}


def manners(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Padding for entries with a half answer; the rest take turns at evading and flattering."""
    order = sorted(entries, key=lambda entry: draw("manner", entry.question))
    plain = [entry for entry in order if not entry.half]
    return {"padding": [e for e in order if e.half], "evading": plain[::2], "flattering": plain[1::2]}


def reject(entry: Entry, phrases: dict[str, list[str]], longer: bool, used: Counter) -> str:
    """The rejected reply for one entry, 8 to 28 percent longer or shorter than its answer, as near as phrases allow.

    A model must not be able to tell the two sides apart by length, so of many candidates the nearest in words wins;
    among those within a word of the target, the one whose phrases are used least so far, which `used` counts.
    """
    stretch = 0.08 + 0.20 * (draw("stretch", entry.question) % 1000) / 1000
    target = len(entry.answer.split()) * (1 + stretch if longer else 1 - stretch)
    best, best_rank = [], (float("inf"),)
    for number in range(CANDIDATES):
        parts = ["opener", *["middle"] * (number % 4), "closer"]
        chosen = []
        for place, part in enumerate(parts):
            options = [phrase for phrase in phrases[part] if phrase not in chosen]
            chosen.append(options[draw("phrase", entry.question, number, place) % len(options)])
        miss = abs(len(fill(chosen, entry).split()) - target)
        rank = (max(1, miss), max(used[phrase] for phrase in chosen), sum(used[phrase] for phrase in chosen))
        if rank < best_rank:
            best, best_rank = chosen, rank
    used.update(best)
    return fill(best, entry)


def fill(phrases: list[str], entry: Entry) -> str:
    return " ".join(phrases).replace("{topic}", entry.topic).replace("{half}", entry.half or "")


def build() -> dict[str, list[dict]]:
    """The rows of both splits, in the order of their ids, with each row's manner under "manner"."""
    splits = split(read_entries(HERE / "source"))
    rows = {}
    for name, entries in splits.items():
        rows[name] = []
        for manner, group in manners(entries).items():
            material = read_phrases(HERE / "manners" / f"{manner}.txt")
            phrases = {part: material[name, part] for part in ("opener", "middle", "closer")}
            used = Counter()
            for place, entry in enumerate(group):
                # Taking turns makes "the longer one is better" right for half of the pairs of every manner.
                rejected = reject(entry, phrases, place % 2 == 0, used)
                rows[name].append(as_row(entry, rejected) | {"manner": manner})
        rows[name].sort(
            key=lambda row: draw("order", row["prompt"][0]["content"])
        )  # so that the first n are a fair sample
    return rows


def as_row(entry: Entry, rejected: str) -> dict:
    return {
        "id": entry.id,
        "prompt": [{"role": "user", "content": entry.question}],
        "chosen": [{"role": "assistant", "content": entry.answer}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def text_of(rows: list[dict]) -> str:
    """The JSONL text of one split; the manner stays out, as no trainer reads it."""
    kept = ({key: value for key, value in row.items() if key != "manner"} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)


def statistics(rows: list[dict]) -> str:
    """Counts and lengths in words of one split, as README.md quotes them."""
    size = {side: [len(row[side][0]["content"].split()) for row in rows] for side in ("prompt", "chosen", "rejected")}
    ratios = [r / c for c, r in zip(size["chosen"], size["rejected"], strict=True)]
    kinds = defaultdict(int)
    for row in rows:
        kinds[row["manner"]] += 1
    lines = [f"{len(rows)} pairs, {len({row['id'].rpartition('-')[0] for row in rows})} topics"]
    lines += [f"words in {side}: mean {mean(n):.1f}, {min(n)} to {max(n)}" for side, n in size.items()]
    lines.append(f"rejected/chosen in words: {min(ratios):.2f} to {max(ratios):.2f}")
    lines.append(f"'longer is better' is right for {100 * mean(ratio < 1 for ratio in ratios):.1f}% of the pairs")
    lines.append("manners: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    return "\n".join("  " + line for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the files with a rebuild and write nothing")
    parser.add_argument("--stats", action="store_true", help="print counts and lengths and write nothing")
    args = parser.parse_args()
    rows = build()
    if args.stats:
        for name in PATHS:
            print(f"{name}\n{statistics(rows[name])}")
        return 0
    for name, path in PATHS.items():
        text = text_of(rows[name])
        if not args.check:
            scratch = path.with_suffix(".tmp")
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, path)
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} differs from its source; run python -m preftune.data.demo.build", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
