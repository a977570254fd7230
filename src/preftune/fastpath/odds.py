"""ORPO and CPO (SimPO among them): their log-probs from the fast forward, so that no logits are ever built.

TRL's trainers take the logits of every position, padding included, through a softmax of the whole vocabulary. What
their losses need of them is `concatenated_forward`'s five results; that one method is replaced.

`logits/chosen` and `logits/rejected` are means over the tokens that predict a token of the row. TRL averages over the
padding as well; where no row is padded ORPO's are the same.
"""

from types import ModuleType

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from preftune.fastpath.forward import FastForward, install
from preftune.fastpath.host import IGNORED, on_device


class FastOdds(FastForward):
    """Mixin for ORPOTrainer and CPOTrainer, less what differs between them."""

    def _install(self, form: ModuleType, model: PreTrainedModel) -> None:
        add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))
        install(form, model, self.accelerator.autocast, self._say, mean_everywhere=True, host=self.host)

    def concatenated_forward(self, model, batch):
        """TRL's: log-probs (pairs,) of chosen and rejected, their logits (here mean logits), the NLL of the chosen."""
        if self.form is None:
            return super().concatenated_forward(model, batch)
        joined = self.concatenated_inputs(self.host.copy(batch), device=torch.device("cpu"))
        ids, seen, answers = (joined[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        pairs = len(batch["chosen_labels"])
        learned = self._learned(ids.masked_fill(seen == 0, IGNORED), answers)[:pairs]
        labels = torch.cat([learned, answers[pairs:]])
        kept = {"ids": ids, "seen": seen, "answers": answers, "learned": learned, "labels": labels}
        moved = {name: on_device(each, self.accelerator.device) for name, each in kept.items()}
        self.host.keep(moved, kept)
        ids, seen, answers, learned, labels = moved.values()
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(
            input_ids=ids, attention_mask=seen, labels=labels, fused_lm_head=True, use_cache=False, **routed
        )

        answered = answers[:, 1:] != IGNORED
        logps = (outputs.log_probs * answered).sum(-1)
        if self._averaged():
            logps = logps / answered.sum(-1)
        nll = -outputs.log_probs[:pairs].sum() / (learned[:, 1:] != IGNORED).sum()
        if not getattr(self, "cpo_alpha", 1.0):  # CPO alone has it
            nll = torch.zeros_like(nll)
        means, known = outputs.mean_logits, outputs.label_mask
        chosen, rejected = means[:pairs][known[:pairs]], means[pairs:][known[pairs:]]
        found = logps[:pairs], logps[pairs:], chosen, rejected, nll
        return (*found, outputs.aux_loss) if self.aux_loss_enabled else found


class FastORPO(FastOdds):
    """ORPO: per-token log-probs, and a likelihood of the chosen rows that covers the prompt."""

    def _learned(self, rows: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return rows

    def _averaged(self) -> bool:
        return True


class FastCPO(FastOdds):
    """CPO and SimPO: the likelihood is that of the chosen answers, and asked for only where it has a weight."""

    def _learned(self, rows: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return answers

    def _averaged(self) -> bool:
        return self.loss_type in ("ipo", "simpo")
