"""Reference log-probs on disk: one folder a reference, in it shards of (row key, log-prob) named by their own hash."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from preftune.config.files import cache_dir

RECORD = np.dtype([("key", "V16"), ("logp", "<f4")])
ABOUT = "reference.json"
SHARDS = "*.rows"


def default_root() -> Path:
    """Where the cache lies unless something else is said: the folder `reference` in preftune's cache."""
    return cache_dir() / "reference"


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` so that nobody ever sees a part of it, not even after a crash."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class ReferenceStore:
    """The log-probs of one reference: `read` them, `append` to them, under `lock` where what is missing is computed.

    `about` is what tells this reference from others, in words, and is kept beside the rows for whoever lists the cache.
    """

    def __init__(self, root: Path, identity: str, about: Mapping | None = None):
        self.root, self.identity, self.folder = root, identity, root / identity
        if about is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / ABOUT, json.dumps(dict(about), indent=2).encode())

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[None]:
        """Hold this reference alone among all processes; filelock.Timeout where another has it and not `wait`."""
        locks = self.root / "locks"  # outside the folder, which can be cleared while somebody waits
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{self.identity}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            print(f"Another process computes this reference ({self.folder}): waiting for it", flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def read(self) -> dict[bytes, float]:
        """Every log-prob by its row's key. A shard that is not what was written is named and dropped."""
        rows: dict[bytes, float] = {}
        for shard in sorted(self.folder.glob(SHARDS)):
            content = shard.read_bytes()
            if checksum(content) != shard.stem:
                print(f"{shard} is damaged: dropped, and its rows computed again", flush=True)
                shard.unlink()
                continue
            records = np.frombuffer(content, RECORD)
            rows.update(zip(records["key"].tolist(), records["logp"].tolist(), strict=True))
        return rows

    def append(self, rows: Mapping[bytes, float]) -> None:
        """Keep these log-probs as one more shard, whole or not at all."""
        if rows:
            content = np.array([(np.void(key), logp) for key, logp in rows.items()], RECORD).tobytes()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{checksum(content)}.rows", content)

    def touch(self) -> None:
        """Note that this reference was used now: the one unused for longest goes first when the cache is full."""
        os.utime(self.folder / ABOUT)

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def summary(self) -> dict:
        """What `python -m recipes.cache` shows of this reference."""
        about = self.folder / ABOUT
        return {
            "identity": self.identity,
            **json.loads(about.read_text()),
            "rows": sum(shard.stat().st_size for shard in self.folder.glob(SHARDS)) // RECORD.itemsize,
            "bytes": self.bytes(),
            "last_use": datetime.fromtimestamp(about.stat().st_mtime).isoformat(timespec="seconds"),
        }

    def clear(self) -> bool:
        """Remove it, unless another process computes it now; says whether it is gone."""
        try:
            with self.lock(wait=False):
                shutil.rmtree(self.folder)
        except Timeout:
            return False
        return True


def references(root: Path) -> list[ReferenceStore]:
    """All references in the cache, the last used first."""
    folders = sorted(root.glob(f"*/{ABOUT}"), key=lambda about: about.stat().st_mtime, reverse=True)
    return [ReferenceStore(root, about.parent.name) for about in folders]


def shrink(root: Path, gigabytes: float, keep: str) -> None:
    """Remove the references unused for longest until the cache fits in `gigabytes`; `keep` stays, whatever its size."""
    stores = references(root)
    total = sum(store.bytes() for store in stores)
    for store in reversed(stores):
        if total <= gigabytes * 1e9:
            return
        size = store.bytes()
        if store.identity != keep and store.clear():
            print(f"The reference cache is over {gigabytes:g} GB: dropped {store.folder}, the oldest", flush=True)
            total -= size


def report(path: str | None, clear: bool, identity: str | None, format: str) -> str:
    """What `python -m recipes.cache` prints: the references, as a table or JSON, after clearing what is to be cleared.

    `identity` holds the first characters of those that are meant; None means all. SystemExit where a value makes no
    sense.
    """
    root = Path(path).expanduser() if path else default_root()
    stores = [store for store in references(root) if store.identity.startswith(str(identity or ""))]
    if format not in ("table", "json"):
        raise SystemExit(f"format={format}: wants table or json")
    if identity and not stores:
        raise SystemExit(f"identity={identity}: no such reference in {root}; `python -m recipes.cache` lists them")
    found = [store.summary() | ({"cleared": store.clear()} if clear else {}) for store in stores]
    size = sum(each["bytes"] for each in found)
    if format == "json":
        return json.dumps({"path": str(root), "references": found, "bytes": size}, indent=2)
    return "\n".join([*lines(found), f"{root}: {len(found)} reference{'s' * (len(found) != 1)}, {readable(size)}"])


def lines(found: list[dict]) -> list[str]:
    """The references as a table, one line each, under a line of headings."""
    rows = [("identity", "model", "precision", "rows", "size", "last use", "")]
    for each in found:
        precision = each["quantization"] or each["dtype"]
        precision += "" if each["mixed_precision"] == "no" else f" in {each['mixed_precision']}"
        model = each["model"] + (" + adapter" if each["adapter"] else "")
        state = {None: "", True: "cleared", False: "in use: kept"}[each.get("cleared")]
        size = readable(each["bytes"])
        rows.append((each["identity"], model, precision, f"{each['rows']:,}", size, each["last_use"], state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def readable(count: float) -> str:
    """A number of bytes in the unit that suits it: 12.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
