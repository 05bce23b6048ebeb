"""Batches for training, each a pure function of (dataset, seed, batch size, cap, step, rows).

So a run is resumed by its step alone, on any number of processes, whatever the number of loader workers.
"""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from data_pipeline.pairs import Pairs
from data_pipeline.records import PhotoDataset
from infinite_id_jax.errors import InputError, MissingExtraError

Tokenize = Callable[[Sequence[str]], np.ndarray]
"""Texts to token ids [B, 77], int32."""

Batch = dict[str, np.ndarray]

_FOREVER = 2**40  # steps


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What decides the batches (all up to people) and how they are fetched (workers, prefetch)."""

    batch_size: int  # rows over all processes
    seed: int = 0
    photos_per_person_cap: int = 16  # times a person is the target in an epoch, at most
    captions: bool = False  # token ids of the target's caption, for entangled training
    people: bool = False  # a number for the person of each row, for validation
    workers: int = 0  # processes that read ahead; 0: threads of this one
    prefetch: int = 4  # batches read ahead, by each worker

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("photos_per_person_cap", 1), ("prefetch", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: give {least} or more.")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: give 0 or more.")


class Loader:
    """Random access to the batches of a split."""

    def __init__(
        self,
        dataset: PhotoDataset,
        config: LoaderConfig,
        *,
        rows: Sequence[int] | None = None,
        tokenizers: tuple[Tokenize, Tokenize] | None = None,
    ):
        """`rows` are this process's rows of the batch, all if None; `tokenizers` are SDXL's two, with captions only.

        InputError for a split without records, pairs or, where they are asked for, captions.
        """
        if not len(dataset):
            raise InputError(f"The split {dataset.split} of {dataset.folder} is empty: add people to the dataset.")
        if config.captions and not dataset.captions:
            raise InputError(f"{dataset.folder} has no captions: give them to the offline stage, or turn captions off.")
        if config.captions != (tokenizers is not None):
            raise ValueError("Tokenizers and captions go together.")
        self.dataset, self.config, self.tokenizers = dataset, config, tokenizers
        self.rows = range(config.batch_size) if rows is None else rows
        self._numbers = np.unique(dataset.people, return_inverse=True)[1]
        self._pairs = Pairs(
            dataset.people,
            dataset.photos,
            dataset.buckets,
            cap=config.photos_per_person_cap,
            seed=config.seed,
        )

    def identity(self) -> dict[str, Any]:
        """All that decides the batches, for a checkpoint to store and a resumed run to be held to."""
        return {
            "dataset": self.dataset.fingerprint,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "photos_per_person_cap": self.config.photos_per_person_cap,
            "captions": self.config.captions,
        }

    def batch(self, step: int) -> Batch:
        """This process's rows of step `step`'s batch.

        Of the target: latent_mean, latent_std [B, h, w, c] bfloat16, time_ids [B, 6] float32; with captions
        input_ids, input_ids_2 [B, 77] int32; with people person [B] int32. Of the identity photo:
        face_embedding [B, E] float32 and clip_hidden_states [B, L, C] bfloat16, or clip_crop [B, s, s, 3] uint8 where
        features are made on the device.
        """
        bucket, before = self._pairs.bucket(step)
        pairs = [self._pairs.pair(bucket, before * self.config.batch_size + row) for row in self.rows]
        targets = [self.dataset[pair.target] for pair in pairs]
        identities = [self.dataset[pair.identity] for pair in pairs]
        feature = "clip_hidden_states" if self.dataset.spec.id_features == "cached" else "clip_crop"
        batch = {
            "latent_mean": np.stack([record.latent_mean for record in targets]),
            "latent_std": np.stack([record.latent_std for record in targets]),
            "time_ids": np.stack([record.time_ids for record in targets]).astype(np.float32),
            "face_embedding": np.stack([record.face_embedding for record in identities]),
            feature: np.stack([getattr(record, feature) for record in identities]),
        }
        if self.tokenizers is not None:
            captions = [record.caption for record in targets]
            batch["input_ids"], batch["input_ids_2"] = (tokenize(captions) for tokenize in self.tokenizers)
        if self.config.people:
            batch["person"] = np.array([self._numbers[pair.target] for pair in pairs], np.int32)
        return batch

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """The batches from step `start` on, without end, read ahead; the same for any number of workers.

        Close the iterator to stop its threads and processes; worker processes import the main module anew.
        """
        try:
            import grain
            from absl import flags
        except ImportError:
            raise MissingExtraError("Reading ahead", "train") from None

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers ask for flags, which only absl.app would parse
        ahead = grain.ReadOptions(num_threads=self.config.prefetch, prefetch_buffer_size=self.config.prefetch)
        steps = grain.MapDataset.range(start, start + _FOREVER).map(self.batch).to_iter_dataset(ahead)
        if self.config.workers:
            options = grain.MultiprocessingOptions(self.config.workers, per_worker_buffer_size=self.config.prefetch)
            steps = steps.mp_prefetch(options, worker_init_fn=_start_worker)
        iterator = iter(steps)
        try:
            for batch in iterator:
                # Out of the shared memory of the workers, which does not outlive the iterator.
                yield {name: np.array(array) for name, array in batch.items()} if self.config.workers else batch
        finally:
            iterator.close()


def _start_worker(index: int, count: int) -> None:
    """Leave signals, which a terminal or a scheduler sends to all, to the main process; end when that has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    assert main is not None, "runs in workers only"
    threading.Thread(target=_end_after, args=(main.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)  # a killed main process stops nobody: this one would wait for it for ever
