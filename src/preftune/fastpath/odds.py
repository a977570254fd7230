"""ORPO and CPO (SimPO among them): their log-probs from the packed forward, so that no logits are ever built.

TRL's trainers take the logits of every position, padding included, through a softmax of the whole vocabulary. What
their losses need of them is `concatenated_forward`'s five results; that one method is replaced.

`logits/chosen` and `logits/rejected` are means over the tokens that predict a token of the row. TRL averages over the
padding as well; where no row is padded ORPO's are the same.
"""

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from preftune.fastpath.layout import IGNORED
from preftune.fastpath.packed import PackedPairs, install


class PackedOdds(PackedPairs):
    """Mixin for ORPOTrainer and CPOTrainer, less what differs between them."""

    def _install(self, model: PreTrainedModel) -> None:
        add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))
        install(model, self.pairs, self.accelerator.autocast, self._say, mean_everywhere=True)

    def concatenated_forward(self, model, batch):
        """TRL's: log-probs (pairs,) of chosen and rejected, their logits (here mean logits), the NLL of the chosen."""
        if not self.packed:
            return super().concatenated_forward(model, batch)
        joined = self.concatenated_inputs(batch, device=self.accelerator.device)
        ids, seen = joined["concatenated_input_ids"], joined["concatenated_attention_mask"]
        answers = joined["concatenated_labels"]
        pairs = len(batch["chosen_labels"])
        learned = self._learned(ids.masked_fill(seen == 0, IGNORED), answers)[:pairs]
        labels = torch.cat([learned, answers[pairs:]])
        outputs = model(input_ids=ids, attention_mask=seen, labels=labels, fused_lm_head=True, use_cache=False)

        answered = answers[:, 1:] != IGNORED
        logps = (outputs.log_probs * answered).sum(-1)
        if self._averaged():
            logps = logps / answered.sum(-1)
        nll = -outputs.log_probs[:pairs].sum() / (learned[:, 1:] != IGNORED).sum()
        means, known = outputs.mean_logits, outputs.label_mask
        chosen, rejected = means[:pairs][known[:pairs]], means[pairs:][known[pairs:]]
        return logps[:pairs], logps[pairs:], chosen, rejected, nll


class PackedORPO(PackedOdds):
    """ORPO: per-token log-probs, and a likelihood of the chosen rows that covers the prompt."""

    def _learned(self, rows: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return rows

    def _averaged(self) -> bool:
        return True


class PackedCPO(PackedOdds):
    """CPO and SimPO: the likelihood is that of the chosen answers, and asked for only where it has a weight."""

    def _learned(self, rows: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return answers

    def _averaged(self) -> bool:
        return self.loss_type in ("ipo", "simpo")

    def concatenated_forward(self, model, batch):
        *results, nll = super().concatenated_forward(model, batch)
        return *results, nll if self.cpo_alpha else torch.zeros_like(nll)
