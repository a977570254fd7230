"""preftune: align a language model with preferences, on TRL's trainers."""

import contextlib
import logging
import os
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # it warns on import of optional CPU kernels, asked for or not

# CPU tensors in huge pages, as PyTorch decides at its first one: a third less memory, and faster (docs/performance.md)
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
with contextlib.suppress(OSError):
    if "[never]" not in PAGES.read_text() and not os.environ.get("THP_MEM_ALLOC_ENABLE"):
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
