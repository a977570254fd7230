"""KTO's batches: both labels in each, rows of similar length, and each prompt beside the answer to another."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from preftune.fastpath.batches import LengthBatches, buckets, row_lengths, shuffled


def mixed(bucket: np.ndarray, labels: np.ndarray) -> list[int]:
    """The rows of a bucket sorted by length, the two labels spread evenly: row i of n of its label stands at i/n."""
    place = np.empty(len(bucket))
    for label in (True, False):
        mine = labels[bucket] == label
        place[mine] = (np.arange(mine.sum()) + 0.5) / max(mine.sum(), 1)
    return bucket[np.argsort(place, kind="stable")].tolist()


def first_apart(rows: list[int], prompts: Sequence, size: int) -> list[int] | None:
    """The first `size` rows with different prompts; None where there are not so many."""
    batch, seen = [], set()
    for row in rows:
        if prompts[row] not in seen:
            batch.append(row)
            seen.add(prompts[row])
            if len(batch) == size:
                return batch
    return None


def mixed_order(
    lengths: np.ndarray, labels: np.ndarray, prompts: Sequence, batch_size: int, bucket_batches: int
) -> list[int]:
    """An order of all rows in which each run of `batch_size` mixes labels, has similar lengths and no prompt twice.

    It depends on the rows alone, not on the run's seed, so that the reference log-probs of KTO's mismatched answers can
    be used again. Only where the rows left over at the end share a prompt does a batch hold it twice.
    """
    order: list[int] = []
    waiting = np.empty(0, dtype=np.int64)
    for bucket in buckets(lengths, batch_size * bucket_batches, np.random.default_rng(0)):
        bucket = np.concatenate([waiting, bucket])
        rows = mixed(bucket[np.argsort(-lengths[bucket], kind="stable")], labels)
        while batch := first_apart(rows, prompts, batch_size):
            order += batch
            taken = set(batch)
            rows = [row for row in rows if row not in taken]
        waiting = np.array(rows, dtype=np.int64)
    return order + waiting.tolist()


class BatchSequence(Sampler[int]):
    """Rows batch by batch as they stand, the full batches of all ranks in random order; another order every epoch."""

    def __init__(self, rows: int, batch_size: int, seed: int, epoch: Callable[[], int], ranks: int = 1):
        self.rows, self.batch_size, self.seed, self.epoch = rows, batch_size * ranks, seed, epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        full = self.rows - self.rows % self.batch_size
        batches = list(np.arange(full).reshape(-1, self.batch_size))
        rng = np.random.default_rng((self.seed, self.epoch()))
        for batch in [*shuffled(batches, 1, rng), range(full, self.rows)]:
            yield from map(int, batch)


class KTOBatches(LengthBatches):
    """Mixin for KTOTrainer: batches mixed in labels and similar in length, fixed before the KL completions are made.

    TRL estimates KTO's KL term from each prompt of a batch beside the answer of the row before it, made once for
    consecutive rows, and so forces the order of the data set. What the estimate needs is less: that a batch is one of
    those runs of rows, so that its mismatched answers are its own answers. So the rows are put in their batches first,
    the answers turned within each, and every epoch shuffles whole batches.
    """

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if dataset_name != "train" or not isinstance(dataset, Dataset) or len(dataset) == 0:
            return dataset
        lengths = row_lengths(dataset, args.max_length)
        prompts = [tuple(ids) for ids in dataset["prompt_ids"]]
        size = args.per_device_train_batch_size * args.world_size  # TRL's KL is that of all ranks together
        order = mixed_order(lengths, np.array(dataset["label"], dtype=bool), prompts, size, self.bucket_batches)
        dataset = dataset.select(order)
        if "KL_completion_ids" not in dataset.column_names:
            return dataset

        def turn_answers(rows):
            return {"KL_completion_ids": rows["completion_ids"][-1:] + rows["completion_ids"][:-1]}

        return dataset.map(turn_answers, batched=True, batch_size=size, desc="Pairing prompts with other answers")

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        if self.tokens_per_batch is not None:
            raise ValueError("tokens_per_batch: KTO's batches are fixed with its KL completions; leave it out")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BatchSequence(len(dataset), self._train_batch_size, seed, self._epoch, self.args.world_size)
