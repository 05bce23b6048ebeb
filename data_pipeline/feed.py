"""The batches of a run, on the devices that need them."""

import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from data_pipeline.loader import Loader, LoaderConfig, Tokenize
from data_pipeline.records import PhotoDataset
from infinite_id_jax.sharding import rows_of_process, to_devices


class Arrival(NamedTuple):
    """A batch and how long the loop waited for it, in seconds."""

    batch: dict[str, jax.Array]
    waited: float


class Feed:
    """One loader's batches as global arrays over the devices of all processes."""

    def __init__(self, loader: Loader, sharding: NamedSharding):
        self.loader = loader
        self._sharding = sharding

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of one step, read now."""
        return self._place(self.loader.batch(step))

    def batches(self, start: int, steps: int, *, same: bool = False) -> Generator[Arrival]:
        """The batches of steps `start` to before `steps`, read ahead; `same` repeats the run's first batch.

        A caller that does not wait for the device has the copy to it overlap with the steps before. Close the
        iterator to stop the reading.
        """
        source = repeat(self.loader.batch(0)) if same else self.loader.batches(start)
        try:
            for _ in range(start, steps):
                begin = time.perf_counter()
                batch = next(source)
                waited = time.perf_counter() - begin
                yield Arrival(self._place(batch), waited)
        finally:
            if isinstance(source, Generator):
                source.close()

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        config = self.loader.config
        return to_devices(batch, self._sharding, config.batch_size, self.loader.rows)


class Feeds(NamedTuple):
    """What a run reads: people to learn from, and where it validates, people it never learns from."""

    train: Feed
    validation: Feed | None
    validation_batches: int

    def held_out(self) -> Iterator[dict[str, jax.Array]]:
        """The same batches at every call."""
        if self.validation is not None:
            yield from (self.validation.batch(step) for step in range(self.validation_batches))


def open_feeds(
    folder: Path,
    config: LoaderConfig,
    sharding: NamedSharding,
    *,
    validation_batches: int = 0,
    tokenizers: tuple[Tokenize, Tokenize] | None = None,
) -> Feeds:
    """The train split of a dataset and, with `validation_batches`, its validation split.

    The devices must divide the batch. Raises InputError for a folder that holds no dataset.
    """
    rows = rows_of_process(sharding, config.batch_size)

    def feed(split: str, config: LoaderConfig) -> Feed:
        return Feed(Loader(PhotoDataset(folder, split), config, rows=rows, tokenizers=tokenizers), sharding)

    told = dataclasses.replace(config, people=True)  # validation takes somebody else
    return Feeds(feed("train", config), feed("validation", told) if validation_batches else None, validation_batches)
