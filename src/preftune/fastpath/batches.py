"""Batches of rows of similar length, shuffled: less padding, in an order that is still random."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

TOKENS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),  # DPO
    ("prompt_ids", "completion_ids"),  # KTO
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),  # ORPO, CPO: prompt and answer in one column
    ("input_ids",),  # SFT
)


def row_lengths(dataset: Dataset, max_length: int | None) -> np.ndarray | None:
    """Tokens that each row brings to the model, its prompt counted once; None where the columns are not tokens."""
    columns = next((names for names in TOKENS if set(names) <= set(dataset.column_names)), None)
    if columns is None:
        return None
    parts = [[] for _ in columns]
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(1000):
        for part, name in zip(parts, columns, strict=True):
            part.append(pc.list_value_length(table[name]).to_numpy())
    prompt, *answers = [np.concatenate(part).astype(np.int64) for part in parts]
    limit = max_length or np.iinfo(np.int64).max
    prompt = np.minimum(prompt, limit)
    if columns[0] == "prompt_ids":
        answers = [prompt + answer for answer in answers]
    return prompt + sum(np.minimum(answer, limit) - prompt for answer in answers)


def buckets(lengths: np.ndarray, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Every row once: runs of `rows` rows drawn at random, each sorted with the longest first."""
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), rows):
        bucket = order[start : start + rows]
        yield bucket[np.argsort(-lengths[bucket], kind="stable")]


def shuffled(batches: list, abreast: int, rng: np.random.Generator) -> list:
    """The batches in random order, `abreast` neighbours staying together; a last run of fewer stays last."""
    steps = len(batches) // abreast
    moved = [batch for step in rng.permutation(steps) for batch in batches[step * abreast : (step + 1) * abreast]]
    return moved + batches[steps * abreast :]


def budgeted(rows: Iterable[int], lengths: np.ndarray, tokens: int) -> Iterator[list[int]]:
    """Runs of `rows` that hold at most `tokens` tokens once padded, or one row."""
    batch: list[int] = []
    longest = 0
    for row in rows:
        longest = max(longest, int(lengths[row]))
        if batch and (len(batch) + 1) * longest > tokens:
            yield batch
            batch, longest = [], int(lengths[row])
        batch.append(int(row))
    if batch:
        yield batch


class LengthSampler(Sampler[int]):
    """Rows in an order whose consecutive runs of `batch_size` have similar lengths; another order every epoch.

    Rows are shuffled and cut into buckets of `bucket_batches` batches; each bucket is sorted by length and cut into
    batches; the batches are shuffled. The ranks of a distributed run take consecutive runs, so what `ranks` of them
    take at a time is sorted and shuffled as one batch: no rank waits for a longer one, and the rows of a step are those
    of one process with a batch as large. The rows that fill no batch come last, drawn from any length.
    `epoch` is asked whenever an epoch begins, so that a resumed run goes on in the order of the one that it resumes.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        bucket_batches: int,
        seed: int,
        epoch: Callable[[], int],
        ranks: int = 1,
    ):
        self.lengths, self.batch_size = lengths, batch_size * ranks
        self.bucket_rows = self.batch_size * bucket_batches
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch()))
        batches, spare = [], []
        for bucket in buckets(self.lengths, self.bucket_rows, rng):
            over = len(bucket) % self.batch_size  # of the last bucket alone
            at = self.batch_size * int(rng.integers(len(bucket) // self.batch_size + 1)) if over else 0
            spare.extend(bucket[at : at + over])
            batches.extend(np.delete(bucket, slice(at, at + over)).reshape(-1, self.batch_size))
        for batch in [*shuffled(batches, 1, rng), spare]:
            yield from map(int, batch)


class BudgetSampler(BatchRebalanceSampler):
    """Batches of as many rows of similar length as `tokens` hold, padding included; this rank's share of them.

    Rows are grouped once per run, so that every epoch has as many batches, and the batches are shuffled every epoch. A
    row longer than the budget is a batch of its own. The base class is how transformers' Trainer tells a batch sampler
    that shares rows among the ranks by itself; nothing else of it is used.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        tokens: int,
        bucket_rows: int,
        seed: int,
        epoch: Callable[[], int],
        place: tuple[int, int] = (0, 1),
    ):
        self.seed, self.current_epoch = seed, epoch
        self.rank, self.ranks = place
        runs = buckets(lengths, bucket_rows, np.random.default_rng(seed))
        self.batches = [batch for bucket in runs for batch in budgeted(bucket, lengths, tokens)]
        while len(self.batches) % self.ranks:  # every rank takes as many batches: halve the fullest until they divide
            fullest = max(range(len(self.batches)), key=lambda i: len(self.batches[i]))
            batch = self.batches[fullest]
            self.batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        self.mean_rows = len(lengths) / len(self.batches)

    def __len__(self) -> int:
        return len(self.batches) // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.current_epoch()))
        yield from shuffled(self.batches, self.ranks, rng)[self.rank :: self.ranks]


class LengthBatches:
    """Mixin for a trainer: train on shuffled batches of rows of similar length (`LengthSampler`).

    `bucket_batches` says how far sorting reaches: 1 is plain shuffling, the number of batches in the data full sorting.
    `tokens_per_batch` fits the number of rows to a token budget instead of `per_device_train_batch_size`: the loss of a
    batch is then multiplied by its rows over the mean number of rows, so that every row weighs the same in the
    gradient, and the global batch, to which the learning rate belongs, is that mean × gradient accumulation × ranks.
    Evaluation keeps TRL's order; its metrics do not depend on it (`evaluation_means`).
    """

    bucket_batches = 64
    tokens_per_batch: int | None = None
    mean_rows: float | None = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = row_lengths(dataset, self.args.max_length) if isinstance(dataset, Dataset) else None
        if lengths is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.tokens_per_batch is None:
            ranks = self.args.world_size
            return LengthSampler(lengths, self._train_batch_size, self.bucket_batches, seed, self._epoch, ranks)
        rows = self._train_batch_size * self.bucket_batches
        place = self.args.process_index, self.args.world_size
        sampler = BudgetSampler(lengths, self.tokens_per_batch, rows, seed, self._epoch, place)
        self.mean_rows = sampler.mean_rows
        if self.is_world_process_zero():
            print(f"Batches of up to {self.tokens_per_batch} tokens: {self.mean_rows:.1f} rows on average", flush=True)
        return sampler

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self._note_padding(inputs)
        if self.mean_rows is None or num_items_in_batch is not None or not model.training:
            return result
        rows = len(inputs["chosen_input_ids"]) if "chosen_input_ids" in inputs else len(inputs["input_ids"]) / 2
        weight = rows / self.mean_rows
        return (result[0] * weight, result[1]) if return_outputs else result * weight

    def _note_padding(self, inputs: dict) -> None:
        """Log the share of padding among the tokens of the last forward: packed, which says so itself, or TRL's own."""
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        if (run := vars(base).get("tokens_run")) is None:
            masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask") and name[:6] != "prompt"]
            run = sum(int((mask == 0).sum()) for mask in masks), sum(mask.numel() for mask in masks)
        padding, tokens = run
        if tokens and hasattr(self, "_metrics"):  # DPO, KTO, SFT
            self._metrics["train"]["padding_fraction"].append(padding / tokens)
        elif tokens:  # ORPO, CPO
            self.store_metrics({"padding_fraction": padding / tokens}, train_eval="train")
