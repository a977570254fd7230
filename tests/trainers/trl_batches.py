"""From a TRL trainer's batch to log-probs, by plain forwards of one unpadded row after the other in float64."""

import torch
from closed_forms import Pairs, Rows
from torch import Tensor
from transformers import PreTrainedModel


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy of the weights in an untouched class: TRL patches the forward of the model that it trains."""
    copy = type(model)(model.config).double()
    copy.load_state_dict(model.state_dict())
    return copy


def answer_tokens(model: PreTrainedModel, ids: Tensor, attention: Tensor, answer: Tensor) -> list[tuple]:
    """For each row, log p of each position marked in `answer` and log Σ p² of what was predicted there."""
    found = []
    for row, real, wanted in zip(ids, attention.bool(), answer.bool(), strict=True):
        row, wanted = row[real], wanted[real][1:]
        logps = model(row[None]).logits[0, :-1].log_softmax(-1)[wanted]
        found.append((logps.gather(-1, row[1:][wanted][:, None]).squeeze(-1), (2 * logps).logsumexp(-1)))
    return found


def score(model: PreTrainedModel, ids: Tensor, attention: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of log p over the positions marked in `answer`, and how many those are, each of shape (rows,)."""
    sums, counts = [], []
    for row, real, wanted in zip(ids, attention.bool(), answer.bool(), strict=True):
        row, wanted = row[real], wanted[real][1:]
        logps = model(row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None]).squeeze(-1)
        sums.append((logps * wanted).sum())
        counts.append(wanted.sum())
    return torch.stack(sums), torch.stack(counts)


def paired(batch: dict, policy: PreTrainedModel, reference: PreTrainedModel) -> Pairs:
    """A batch of DPOTrainer (chosen rows, then rejected rows) or of ORPOTrainer and CPOTrainer (side by side)."""
    if "completion_mask" in batch:
        keys = ("input_ids", "attention_mask", "completion_mask")
        chosen, rejected = zip(*(batch[key].chunk(2) for key in keys), strict=True)
    else:
        chosen, rejected = (
            (batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
            for side in ("chosen", "rejected")
        )
    up, up_tokens = score(policy, *chosen)
    down, down_tokens = score(policy, *rejected)
    dialogue, dialogue_tokens = score(policy, *chosen[:2], torch.ones_like(chosen[0]))
    with torch.no_grad():
        ref_up, ref_down = score(reference, *chosen)[0], score(reference, *rejected)[0]
    tokens = {"chosen": answer_tokens(policy, *chosen), "rejected": answer_tokens(policy, *rejected)}
    with torch.no_grad():
        tokens |= {"ref_chosen": answer_tokens(reference, *chosen), "ref_rejected": answer_tokens(reference, *rejected)}
    return Pairs(up, down, ref_up, ref_down, up_tokens, down_tokens, dialogue, dialogue_tokens, tokens)


def unpaired(batch: dict, policy: PreTrainedModel, reference: PreTrainedModel) -> Rows:
    """A batch of KTOTrainer."""
    own = [batch[key] for key in ("input_ids", "attention_mask", "completion_mask")]
    other = [batch[f"KL_{key}"] for key in ("input_ids", "attention_mask", "completion_mask")]
    answer, tokens = score(policy, *own)
    with torch.no_grad():
        ref_answer, ref_other = score(reference, *own)[0], score(reference, *other)[0]
        mismatched = score(policy, *other)[0]
    return Rows(answer, tokens, ref_answer, mismatched, ref_other, batch["label"].bool())


def demonstrations(batch: dict, policy: PreTrainedModel, reference: PreTrainedModel) -> Rows:
    """A batch of SFTTrainer."""
    return Rows(*score(policy, batch["input_ids"], batch["attention_mask"], batch["labels"] != -100))
