"""Reference log-probs computed once, whatever the loss, its β, the seed or the output directory, and kept on disk."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, Trainer
from trl.models import prepare_deepspeed

from preftune.data.token_checks import row_key
from preftune.fastpath.batches import budgeted
from preftune.fastpath.reference_identity import reference_identity
from preftune.fastpath.reference_store import ReferenceStore, default_root, shrink
from preftune.models import sharding

# The columns that TRL's losses read, by the completion that each scores. DPO's two are scored in one forward, which
# shares their prompt; KTO's own and mismatched ones apart, as each may be known without the other.
PAIRED = {"chosen_ids": "ref_chosen_logps", "rejected_ids": "ref_rejected_logps"}
UNPAIRED = {"completion_ids": "ref_logps", "KL_completion_ids": "ref_KL_logps"}
PROOFS = 4  # cached rows that are computed again before the others are believed


class Job(NamedTuple):
    """What one row of a reference forward scores."""

    row: int
    columns: tuple[str, ...]
    keys: tuple[bytes, ...]
    tokens: int
    prompt: bytes


def truncate(prompt: list[int], answer: list[int], max_length: int | None, mode: str) -> tuple[list[int], int]:
    """The ids that TRL's collators keep, and where the completion begins in them."""
    ids = prompt + answer
    cut = max(len(ids) - max_length, 0) if max_length is not None else 0
    if mode == "keep_end":
        return ids[cut:], max(len(prompt) - cut, 0)
    return ids[: len(ids) - cut], min(len(prompt), len(ids) - cut)


def reference_jobs(dataset: Dataset, max_length: int | None, mode: str, ld_alpha: float | None) -> list[Job]:
    """A job for each pair, or for each of KTO's completions, with the keys under which its log-probs are kept."""
    paired = "chosen_ids" in dataset.column_names
    names = [name for name in (PAIRED if paired else UNPAIRED) if name in dataset.column_names]
    groups = [tuple(names)] if paired else [(name,) for name in names]
    jobs = []
    for row, example in enumerate(dataset.select_columns(["prompt_ids", *names])):
        prompt = row_key(example["prompt_ids"], 0)
        for columns in groups:
            kept = [truncate(example["prompt_ids"], example[name], max_length, mode) for name in columns]
            # LD-DPO weighs what the longer completion has over the shorter one, so its sums belong to the pair
            weighing = () if ld_alpha is None else (ld_alpha, min(len(ids) - max(start, 1) for ids, start in kept))
            keys = tuple(row_key(ids, start, weighing) for ids, start in kept)
            tokens = kept[0][1] + sum(len(ids) - start for ids, start in kept)
            jobs.append(Job(row, columns, keys, tokens, prompt))
    return jobs


def beyond_rounding(first: float, second: float, model: torch.nn.Module, mixed: bool) -> bool:
    """Whether two log-probs of one completion (sums, in nats) differ by more than the model's precision explains."""
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    exact = exact and not mixed and not torch.backends.cuda.matmul.allow_tf32
    relative, absolute = (1e-4, 1e-3) if exact else (2e-2, 0.5)
    return abs(first - second) > absolute + relative * abs(second)


class ReferenceCache:
    """Mixin for DPOTrainer and KTOTrainer with `precompute_ref_log_probs`: reference log-probs from a cache on disk.

    A log-prob is kept by the reference (`reference_identity`) and the token ids that it scores, so it serves every loss
    of both trainers. What is missing is computed in large batches of similar length, written as it comes, so that a run
    that is stopped goes on where it was, by one process at a time; the others wait and read. Before cached rows are
    believed, a few are computed again, and the run stops where they differ. `reference_forwards` counts the rows
    computed (a pair of DPO's, a completion of KTO's).
    """

    reference_cache: str | Path | None = None  # its folder; None: `cache_store.default_root`
    reference_cache_gb = 2.0  # above this the references unused for longest are dropped
    reference_batch_tokens = 8192  # of a reference forward, unless precompute_ref_batch_size counts rows instead
    reference_write_seconds = 30.0  # between shards: what a run that is killed loses
    reference_forwards = 0
    _reference_store: ReferenceStore | None = None
    _precompute_engine: PreTrainedModel | None = None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        flat = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1
        if not isinstance(dataset, Dataset) or flat:
            return super()._precompute_ref_logps(dataset, name, batch_size)  # TRL's
        with sharding.placed(self._reference(), self.accelerator.device):
            return self._from_cache(dataset, name)

    def _from_cache(self, dataset: Dataset, name: str) -> Dataset:
        mode = getattr(self.args, "truncation_mode", "keep_start")
        jobs = reference_jobs(dataset, self.args.max_length, mode, getattr(self, "ld_alpha", None))
        main = self.accelerator.is_main_process
        reference = self.model if self.ref_model is None else self.ref_model
        reference = self.accelerator.unwrap_model(reference, keep_torch_compile=False)
        found = self._open_store(reference) if main or sharding.is_sharded(reference) else None
        store = found if main else None
        with store.lock() if main else nullcontext():
            known = store.read() if main else {}
            missing = [i for i, job in enumerate(jobs) if not known.keys() >= set(job.keys)]
            missing = self._from_main(missing)
            self._prove(dataset, [jobs[i] for i in sorted({*range(len(jobs))} - {*missing})], known, store)
            known |= self._compute(dataset, name, [jobs[i] for i in missing], store)
            if main:
                store.touch()
        if main:
            shrink(store.root, self.reference_cache_gb, keep=store.identity)
        return self._with_logps(dataset, self._from_main(self._columns(jobs, known) if main else None))

    def _open_store(self, model: PreTrainedModel) -> ReferenceStore:
        if self._reference_store is None:  # at the start, while a policy that is its own reference has not moved yet
            identity, about = reference_identity(model, str(self.accelerator.mixed_precision))
            root = Path(self.reference_cache).expanduser() if self.reference_cache else default_root()
            self._reference_store = ReferenceStore(root, identity, about)
        return self._reference_store

    def _reference(self) -> PreTrainedModel:
        """What computes the reference log-probs: as TRL has it, under DeepSpeed an engine, made once."""
        if self.ref_model is not None:
            return self.ref_model
        if self.is_deepspeed_enabled and self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self.model if self._precompute_engine is None else self._precompute_engine

    def _from_main(self, value):
        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]

    @staticmethod
    def _columns(jobs: list[Job], known: Mapping[bytes, float]) -> dict[str, np.ndarray]:
        columns: dict[str, list[float]] = {}
        for job in jobs:
            for name, key in zip(job.columns, job.keys, strict=True):
                columns.setdefault((PAIRED | UNPAIRED)[name], []).append(known[key])
        return {name: np.array(logps, dtype=np.float32) for name, logps in columns.items()}

    @staticmethod
    def _with_logps(dataset: Dataset, columns: dict[str, np.ndarray]) -> Dataset:
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _compute(
        self, dataset: Dataset, name: str, jobs: list[Job], store: ReferenceStore | None
    ) -> dict[bytes, float]:
        """Score the jobs, each rank its share of the batches; the main one keeps them on disk, and returns them all."""
        done: dict[bytes, float] = {}
        unwritten: dict[bytes, float] = {}
        written = time.monotonic()
        jobs = list({job.keys: job for job in jobs}.values())
        self.reference_forwards += len(jobs)
        batches = self._batches(jobs)
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        with tqdm(
            total=sum(job.tokens for job in jobs),
            desc=f"Reference log-probs, {name}: {len(jobs)} rows",
            unit="tok",
            unit_scale=True,
            disable=self.args.disable_tqdm or not batches,
        ) as bar:
            for turn in range(0, len(batches), ranks):
                share = batches[turn : turn + ranks]
                scored = self._score(dataset, share[min(rank, len(share) - 1)])  # together, as ZeRO-3 gathers weights
                for part in gather_object([scored]):
                    unwritten |= part
                bar.update(sum(job.tokens for batch in share for job in batch))
                due = time.monotonic() - written > self.reference_write_seconds or turn + ranks >= len(batches)
                if store and due:
                    store.append(unwritten)
                    done, unwritten, written = done | unwritten, {}, time.monotonic()
        return done

    def _batches(self, jobs: list[Job]) -> list[list[Job]]:
        """The jobs in batches, the longest first: one that does not fit in memory fails at once.

        Those of one prompt stand together, which the fast forward then runs once for them.
        """
        lengths, longest = np.array([job.tokens for job in jobs]), {}
        for job in jobs:
            longest[job.prompt] = max(longest.get(job.prompt, 0), job.tokens)
        order = np.array(
            sorted(range(len(jobs)), key=lambda i: (-longest[jobs[i].prompt], jobs[i].prompt, -lengths[i]))
        )
        if rows := self.args.precompute_ref_batch_size:
            runs: Iterator = (order[i : i + rows] for i in range(0, len(order), rows))
        else:
            runs = budgeted(order, lengths, self.reference_batch_tokens)
        return [[jobs[i] for i in run] for run in runs]

    def _score(self, dataset: Dataset, jobs: list[Job]) -> dict[bytes, float]:
        """The log-probs of these jobs in one forward, TRL's own computation, by key."""
        examples = [scored_example(dataset[job.row], job.columns) for job in jobs]
        batch = self._prepare_inputs(self.data_collator(examples))
        model = self._reference()
        with evaluating(model), without_kl(self):
            logps = self.compute_ref_log_probs(model, batch)
        rows = torch.stack([side for side in logps if side is not None], dim=1).float().cpu().numpy()
        if not np.isfinite(rows).all():
            row = jobs[int(np.argmin(np.isfinite(rows).all(axis=1)))].row
            raise ValueError(
                f"the reference's log-prob of row {row} is not finite: look at it and at the model's dtype"
            )
        keys = [key for job in jobs for key in job.keys]
        return dict(zip(keys, rows.flatten().tolist(), strict=True))

    def _prove(
        self, dataset: Dataset, jobs: list[Job], known: Mapping[bytes, float], store: ReferenceStore | None
    ) -> None:
        """Compute a few cached rows again; RuntimeError where they differ by more than the precision explains."""
        if not jobs:
            return
        picked = jobs[:: -(-len(jobs) // PROOFS)]
        again = self._score(dataset, picked)
        if store is None:  # the main process judges
            return
        model, mixed = self.accelerator.unwrap_model(self._reference()), self.accelerator.mixed_precision != "no"
        for job in picked:
            for key in job.keys:
                if beyond_rounding(known[key], again[key], model, mixed):
                    raise RuntimeError(
                        f"the reference cache is wrong: row {job.row} has log-prob {known[key]:.4f} there and "
                        f"{again[key]:.4f} computed now ({store.folder}). Clear it, `python -m recipes.cache "
                        f"clear=true identity={store.folder.name}`, and start again; if it comes back, something that "
                        "changes the model's output is not in its identity"
                    )


def scored_example(example: dict, columns: tuple[str, ...]) -> dict:
    """The row as the trainer's collator takes it, with the job's completions and no others."""
    if len(columns) > 1:
        return {"prompt_ids": example["prompt_ids"], **{name: example[name] for name in columns}}
    return {"prompt_ids": example["prompt_ids"], "completion_ids": example[columns[0]], "label": True}


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, so that no dropout falls into the reference."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def without_kl(trainer: Trainer) -> Iterator[None]:
    """KTO's reference forward without its mismatched completions: here they are rows like any other."""
    kept = vars(trainer).get("calculate_KL")
    if kept is not None:
        trainer.calculate_KL = False
    try:
        yield
    finally:
        if kept is not None:
            trainer.calculate_KL = kept
