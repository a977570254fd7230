"""ORPO, CPO and SimPO on the tokens that DPO trains: the chat template's, and nothing beside them."""

from types import SimpleNamespace

from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOTrainer

from preftune.data.views import BESIDE


class TemplateTokens:
    """Mixin for trl's ORPOTrainer and CPOTrainer, which add a BOS and an EOS by looking at the first and last token.

    A template that ends with a line break got its EOS twice, and a BOS that it never writes. A deliberate departure
    from TRL: rows are tokenized by DPOTrainer's own method, whose rows without an answer token are left out as well,
    and `max_length=None` cuts nothing. On the same ids the losses are TRL's.
    """

    def __init__(self, *, args, processing_class, **given):
        for name in ("train_dataset", "eval_dataset"):
            if given.get(name) is not None:
                part = name.split("_")[0]
                several = given[name] if isinstance(given[name], dict) else {"": given[name]}
                made = {key: tokenized(rows, processing_class, args, part) for key, rows in several.items()}
                given[name] = DatasetDict(made) if several is given[name] else made[""]
        super().__init__(args=args, processing_class=processing_class, **given)

    def tokenize_row(self, feature, model=None):
        """Nothing to add: the rows are tokens already."""
        return {}


def tokenized(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, name: str
) -> Dataset | IterableDataset:
    """The rows in the columns that TRL's collator for ORPO and CPO takes, cut at `max_length`."""
    settings = SimpleNamespace(
        max_length=args.max_length, truncation_mode="keep_start", dataset_num_proc=args.dataset_num_proc
    )
    rows = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, settings, name)

    def sides(row: dict) -> dict:
        prompt = row["prompt_ids"]
        found = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        if args.generate_during_eval:  # which shows it
            found["prompt"] = tokenizer.decode(prompt)
        for side in ("chosen", "rejected"):
            ids = (prompt + row[f"{side}_ids"])[: args.max_length]
            found |= {
                f"{side}_input_ids": ids,
                f"{side}_attention_mask": [1] * len(ids),
                f"{side}_labels": [-100] * len(prompt) + ids[len(prompt) :],
            }
        return found

    return rows.map(sides, remove_columns=[name for name in rows.column_names or () if name not in BESIDE])
