"""Which photo is drawn, and which other photo of the same person says who it is: a pure function of seed and step.

Steps take the buckets (targets of one latent size) in turn, in proportion to their size. A bucket's examples form an
endless stream of epochs. In an epoch a person with n photos is the target min(n, cap) times, each time by another
photo; which photos, in which order, and with which identity photo beside them is drawn anew each epoch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from infinite_id_jax.errors import InputError


class Pair(NamedTuple):
    """Indices of two records with different photos of one person."""

    target: int
    identity: int


class _Bucket(NamedTuple):
    """The photos of one latent size, of people who have another photo somewhere; grouped by person."""

    size: tuple[int, int]  # h, w
    records: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]  # the person of each record, ascending
    slots: Int[np.ndarray, " people"]  # how many of a person's photos are targets in an epoch


class _Epoch(NamedTuple):
    targets: Int[np.ndarray, " slots"]
    identities: Int[np.ndarray, " slots"]


class Pairs:
    """The pairs of a dataset. `buckets` are the targets' latent sizes (h, w), `slots` their examples an epoch."""

    def __init__(
        self,
        people: Sequence[str],
        photos: Sequence[str],
        sizes: Int[np.ndarray, "n 2"],
        *,
        cap: int,
        seed: int,
    ):
        """Of each record its person, the hash of its photo and its latents' size; InputError if nobody has two photos.

        A photo that a person has twice counts once. `seed` is not negative.
        """
        self.seed = seed
        # One record of each (person, photo), grouped by person; by name, so that shards may be packed in any order.
        first = {key: i for i, key in reversed(list(enumerate(zip(people, photos, strict=True))))}
        ordered = sorted(first)
        self._records = np.array([first[key] for key in ordered], np.int64)
        names = np.array([person for person, _ in ordered], object)
        _, self._first, groups, self._count = _groups(names)
        self._place = np.full(len(people), -1)  # of a record among its person's
        self._place[self._records] = np.arange(len(groups)) - self._first[groups]
        self._group = np.full(len(people), -1)
        self._group[self._records] = groups
        paired = self._count[groups] > 1
        if not paired.any():
            raise InputError(
                f"None of {len(self._count)} people has two different photos: training needs two photos of a person."
            )
        self._buckets = _buckets(self._records[paired], groups[paired], sizes, len(self._count), cap)
        self.buckets = [bucket.size for bucket in self._buckets]
        self.slots = [int(bucket.slots.sum()) for bucket in self._buckets]
        self._epochs: dict[tuple[int, int], _Epoch] = {}

    def bucket(self, step: int) -> tuple[int, int]:
        """The bucket that a step draws from, and how many steps drew from it before: exactly in proportion.

        Each bucket in turn takes its share of the steps that those before it left, at the multiples of its share
        (a Beatty sequence).
        """
        left = sum(self.slots)
        for bucket, slots in enumerate(self.slots):
            before = step * slots // left
            if (step + 1) * slots // left > before:
                return bucket, before
            step, left = step - before, left - slots
        raise AssertionError("the last bucket takes all that is left")

    def pair(self, bucket: int, example: int) -> Pair:
        """Example number `example` of a bucket's endless stream."""
        number, slot = divmod(example, self.slots[bucket])
        epoch = self._epochs.get((bucket, number))
        if epoch is None:
            epoch = self._draw(bucket, number)
            self._epochs[bucket, number] = epoch
            # Two a bucket, as the buckets' epochs turn at the same steps. Threads may draw one twice: the same one.
            for old in list(self._epochs)[: -2 * len(self._buckets)]:
                self._epochs.pop(old, None)
        return Pair(int(epoch.targets[slot]), int(epoch.identities[slot]))

    def _draw(self, number: int, epoch: int) -> _Epoch:
        bucket = self._buckets[number]
        n, slots = len(bucket.records), self.slots[number]
        photos, order, others = np.split(self._random(n + 2 * slots, number, epoch), [n, n + slots])
        # Each person's photos in random order, and the first of them.
        shuffled = np.lexsort((photos, bucket.groups))
        _, first, groups, _ = _groups(bucket.groups)
        rank = np.arange(len(shuffled)) - first[groups]
        chosen = bucket.records[shuffled[rank < bucket.slots[bucket.groups]]]
        targets = chosen[np.argsort(order, kind="stable")]
        person = self._group[targets]
        other = (others % (self._count[person] - 1).astype(np.uint64)).astype(np.int64)
        other += other >= self._place[targets]  # all but the target itself
        return _Epoch(targets, self._records[self._first[person] + other])

    def _random(self, n: int, *key: int) -> UInt64[np.ndarray, " n"]:
        # Raw bits, because NumPy keeps a bit generator's stream but not what `Generator` makes of it.
        return np.random.Philox(np.random.SeedSequence((self.seed, *key))).random_raw(n)


def _groups(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of sorted labels: the distinct ones, where each begins, which one each is, and how many there are of each."""
    return np.unique(labels, return_index=True, return_inverse=True, return_counts=True)


def _buckets(
    records: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    sizes: Int[np.ndarray, "records 2"],
    people: int,
    cap: int,
) -> list[_Bucket]:
    """Share each person's min(n, cap) slots among the buckets that hold photos of that person."""
    distinct, index = np.unique(sizes[records], axis=0, return_inverse=True)
    index = index.reshape(-1)
    held = np.zeros((people, len(distinct)), np.int64)
    np.add.at(held, (groups, index), 1)
    total = held.sum(1, keepdims=True)
    share = np.minimum(total, cap)
    # Largest remainder: rounded down, then one more for the buckets that lost most.
    slots, lost = np.divmod(held * share, np.maximum(total, 1))
    rank = np.argsort(np.argsort(-lost, axis=1, kind="stable"), axis=1, kind="stable")
    slots += rank < share - slots.sum(1, keepdims=True)
    found = []
    for bucket, (h, w) in enumerate(distinct):
        here = index == bucket
        if slots[:, bucket].any():
            found.append(_Bucket((int(h), int(w)), records[here], groups[here], slots[:, bucket]))
    return found
