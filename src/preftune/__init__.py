"""preftune: align a language model with preferences, on TRL's trainers."""

import logging

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # it warns on import of optional CPU kernels, asked for or not
