"""Rows as TRL runs them, without their last tokens, and the head on what is learned alone: for a model without a form.

Off GPUs TRL's head scores every position, prompts and padding among them; on a GPU this saves nothing.
"""

from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

import preftune.fastpath.forked as forked
from preftune.fastpath.forked import Forked
from preftune.fastpath.layout import Rows


def why_not(model: PreTrainedModel, backbone: PreTrainedModel) -> str | None:
    """Nothing speaks against it but the probe."""
    return None


def lay_out_for(backbone: PreTrainedModel, rows: Rows) -> Forked:
    """A batch in which nothing is shared."""
    apart = replace(rows, shared=np.zeros_like(rows.shared), group=np.arange(len(rows.group)))
    return forked.lay_out_for(backbone, apart)


run = forked.run
