"""The loader: two different photos of one person, each person min(n, cap) times an epoch, and batches that depend on
the step alone, whoever reads them."""

import collections
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import main as benchmark
from benchmarks.loader import random_record
from data_pipeline.loader import Batch, Loader, LoaderConfig
from data_pipeline.pairs import Pairs
from data_pipeline.records import PhotoDataset, finish, write_shard
from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.tokenizer import CLIPTokenizer
from tests.test_records import SPEC

ROOT = Path(__file__).parent.parent
CAP = 4
# Photos of each person by latent size; one has a single photo, one a single photo in each of two sizes.
PHOTOS = {
    "ada": {(8, 8): 3},
    "ben": {(8, 8): 7, (12, 6): 3},
    "cem": {(8, 8): 1},
    "dee": {(8, 8): 1, (12, 6): 1},
    "eli": {(12, 6): 6},
}


def write(folder: Path, *, captions: bool = True, id_features: str = "cached", photos=PHOTOS) -> PhotoDataset:
    spec = type(SPEC)(**(vars(SPEC) | {"id_features": id_features}))
    names = [(person, size) for person, sizes in photos.items() for size, n in sizes.items() for _ in range(n)]
    records = [
        random_record(spec, person, i, size, f"photo {i} of {person}" if captions else "")
        for i, (person, size) in enumerate(names)
    ]
    for shard in range(2):
        write_shard(folder, "train", shard, 2, spec, records[shard::2], "c0")
    write_shard(folder, "validation", 0, 1, spec, [], "c0")
    finish(folder, spec, {"train": 2, "validation": 1}, "c0")
    return PhotoDataset(folder, "train")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PhotoDataset:
    return write(tmp_path_factory.mktemp("dataset"))


def make_pairs(dataset: PhotoDataset, seed: int = 0, cap: int = CAP) -> Pairs:
    return Pairs(dataset.people, dataset.photos, dataset.buckets, cap=cap, seed=seed)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def test_an_epoch_takes_each_person_min_n_cap_times(dataset):
    pairs = make_pairs(dataset)
    people = np.array(dataset.people)
    for epoch in range(5):
        drawn = [
            pairs.pair(bucket, epoch * slots + slot)
            for bucket, slots in enumerate(pairs.slots)
            for slot in range(slots)
        ]
        targets = [pair.target for pair in drawn]
        assert collections.Counter(people[targets]) == {"ada": 3, "ben": 4, "dee": 2, "eli": 4}
        assert len(set(targets)) == len(targets), "a photo is a target once an epoch"
        for pair in drawn:
            assert people[pair.target] == people[pair.identity]
            assert dataset.photos[pair.target] != dataset.photos[pair.identity]
    for bucket, size in enumerate(pairs.buckets):
        assert {tuple(dataset.buckets[pairs.pair(bucket, i).target]) for i in range(50)} == {size}


def test_every_photo_and_every_other_photo_is_drawn_evenly(dataset):
    """Over the epochs a person's photos of a bucket share its slots, and the others serve as identity alike."""
    pairs = make_pairs(dataset)
    (bucket,) = [i for i, size in enumerate(pairs.buckets) if size == (12, 6)]
    epochs = 3000
    drawn = [pairs.pair(bucket, i) for i in range(epochs * pairs.slots[bucket])]
    eli = [i for i, person in enumerate(dataset.people) if person == "eli"]
    counts = collections.Counter(pair for pair in drawn if pair.target in eli)
    expected = epochs * 4 / (6 * 5)
    # 30 ordered pairs, 400 each expected, standard deviation 20.
    assert len(counts) == 30
    assert all(pair.target != pair.identity for pair in counts)
    assert all(abs(count - expected) < 5 * 20 for count in counts.values())


def test_epochs_and_seeds_differ_and_repeat_exactly(dataset):
    def epoch(number: int, seed: int) -> list[tuple[int, int]]:
        pairs = make_pairs(dataset, seed)
        return [pairs.pair(0, number * pairs.slots[0] + slot) for slot in range(pairs.slots[0])]

    assert epoch(3, 0) == epoch(3, 0)
    assert epoch(3, 0) != epoch(4, 0)
    assert epoch(3, 0) != epoch(3, 1)
    # Going back draws an epoch again that was put away.
    pairs = make_pairs(dataset)
    there = [pairs.pair(0, i) for i in range(100)]
    assert [pairs.pair(0, i) for i in range(100)] == there
    assert len(pairs._epochs) <= 2 * len(pairs.buckets)


def test_the_same_photo_twice_is_no_pair_and_shards_may_be_packed_in_any_order():
    people, photos = ["a", "a", "b", "b", "b"], ["1", "1", "2", "3", "2"]
    sizes = np.full((5, 2), 8)
    pairs = Pairs(people, photos, sizes, cap=9, seed=0)
    assert pairs.slots == [2]
    assert {pairs.pair(0, i) for i in range(20)} == {(2, 3), (3, 2)}
    with pytest.raises(InputError, match="None of 2 people has two different photos"):
        Pairs(people[:3], photos[:3], sizes[:3], cap=9, seed=0)
    order = [3, 0, 2]
    moved = Pairs([people[i] for i in order], [photos[i] for i in order], sizes[:3], cap=9, seed=0)
    assert [order[moved.pair(0, i).target] for i in range(20)] == [pairs.pair(0, i).target for i in range(20)]


def test_steps_share_the_buckets_in_proportion():
    sizes = np.array([[8, 8]] * 6 + [[8, 12]] * 3 + [[12, 8]] * 2)
    people = ["a"] * 6 + ["b"] * 3 + ["c"] * 2
    pairs = Pairs(people, [str(i) for i in range(11)], sizes, cap=9, seed=0)
    seen = collections.Counter()
    for step in range(1100):
        bucket, before = pairs.bucket(step)
        assert before == seen[bucket], "a bucket's batches follow each other without a gap"
        seen[bucket] += 1
        assert all(abs(seen[i] - (step + 1) * slots / 11) < 2 for i, slots in enumerate(pairs.slots))
    assert dict(seen) == {0: 600, 1: 300, 2: 200}


def test_a_batch_holds_targets_of_one_size_and_the_features_of_another_photo(dataset):
    loader = Loader(dataset, LoaderConfig(4, photos_per_person_cap=CAP))
    by_latent = {dataset[i].latent_mean.tobytes(): i for i in range(len(dataset))}
    by_face = {dataset[i].face_embedding.tobytes(): i for i in range(len(dataset))}
    sizes = set()
    for step in range(20):
        batch = loader.batch(step)
        h, w = batch["latent_mean"].shape[1:3]
        sizes.add((h, w))
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            "latent_mean": ("bfloat16", (4, h, w, 4)),
            "latent_std": ("bfloat16", (4, h, w, 4)),
            "time_ids": ("float32", (4, 6)),
            "face_embedding": ("float32", (4, 16)),
            "clip_hidden_states": ("bfloat16", (4, 5, 32)),
        }
        for row in range(4):
            target = by_latent[batch["latent_mean"][row].tobytes()]
            identity = by_face[batch["face_embedding"][row].tobytes()]
            assert target != identity
            assert dataset.people[target] == dataset.people[identity]
            assert batch["latent_std"][row].tobytes() == dataset[target].latent_std.tobytes()
            assert batch["time_ids"][row].tolist() == dataset[target].time_ids.tolist()
            assert batch["clip_hidden_states"][row].tobytes() == dataset[identity].clip_hidden_states.tobytes()
    assert sizes == {(8, 8), (12, 6)}


def test_features_made_on_the_device_start_from_crops(tmp_path):
    dataset = write(tmp_path, id_features="on_device")
    batch = Loader(dataset, LoaderConfig(3)).batch(0)
    assert "clip_hidden_states" not in batch
    assert batch["clip_crop"].shape == (3, 28, 28, 3)
    crops = {dataset[i].clip_crop.tobytes(): dataset[i].face_embedding.tobytes() for i in range(len(dataset))}
    assert [crops[crop.tobytes()] for crop in batch["clip_crop"]] == [x.tobytes() for x in batch["face_embedding"]]


def test_captions_are_the_targets(dataset, tiny):
    first, second = (CLIPTokenizer.from_folder(tiny.model / name) for name in ("tokenizer", "tokenizer_2"))
    loader = Loader(dataset, LoaderConfig(4, captions=True), tokenizers=(first, second))
    captions = {dataset[i].latent_mean.tobytes(): dataset[i].caption for i in range(len(dataset))}
    batch = loader.batch(2)
    texts = [captions[mean.tobytes()] for mean in batch["latent_mean"]]
    assert len(set(texts)) > 1
    np.testing.assert_array_equal(batch["input_ids"], first(texts))
    np.testing.assert_array_equal(batch["input_ids_2"], second(texts))
    with closing(loader.batches(2)) as batches:
        assert equal(next(batches), batch)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_the_rows_of_one_batch(dataset, processes):
    whole = Loader(dataset, LoaderConfig(8))
    parts = [
        Loader(dataset, LoaderConfig(8), rows=range(8 * p // processes, 8 * (p + 1) // processes))
        for p in range(processes)
    ]
    for step in (0, 1, 7, 1000):
        rows = [part.batch(step) for part in parts]
        assert equal({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, whole.batch(step))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_changes_nothing_and_resumes_anywhere(dataset, workers):
    loader = Loader(dataset, LoaderConfig(4, seed=5, workers=workers, prefetch=2))
    for start in (0, 17):
        with closing(loader.batches(start)) as batches:
            for step in range(start, start + 7):
                batch = next(batches)
                assert equal(batch, loader.batch(step))
                assert {type(array) for array in batch.values()} == {np.ndarray}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_program(dataset, number):
    """Sent to all processes of the group, as a terminal and a scheduler do; SIGKILL to the main one alone."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from data_pipeline.loader import Loader, LoaderConfig\n"
        "from data_pipeline.records import PhotoDataset\n"
        "if __name__ == '__main__':\n"
        "    batches = Loader(PhotoDataset(Path(sys.argv[1]), 'train'), LoaderConfig(2, workers=2)).batches(0)\n"
        "    try:\n"
        "        while True:\n"
        "            next(batches) and next(batches)\n"
        "            print('ready', flush=True)\n"
        "    except KeyboardInterrupt:\n"
        "        batches.close()"
    )
    # A signal may fall between the end of a piece of shared memory and its end in Python's own books.
    strict = ("-W", "error", "-W", "ignore:resource_tracker:UserWarning")
    program = subprocess.Popen(
        [sys.executable, *strict, "-c", code, str(dataset.folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{program.pid}/task").glob("*/children")
        assert sum(len(path.read_text().split()) for path in children) >= 2
        if number == signal.SIGKILL:
            program.kill()
        else:
            os.killpg(program.pid, number)
        # The pipe ends when the last process that holds it has ended, so this waits for the workers.
        errors = program.stderr.read()
    assert program.returncode == (0 if number == signal.SIGINT else -number)
    assert b"Traceback" not in errors


def test_damage_reaches_the_reader_from_a_worker(tmp_path):
    dataset = write(tmp_path)
    for path in tmp_path.glob("records/photos-train*"):
        content = bytearray(path.read_bytes())
        content[content.index(dataset[2 if "00000-of" in path.name else -1 + len(dataset)].latent_mean.tobytes())] ^= 1
        path.write_bytes(content)
    loader = Loader(PhotoDataset(tmp_path, "train"), LoaderConfig(8, workers=1))
    with closing(loader.batches(0)) as batches, pytest.raises(InputError, match="cannot be read"):
        collections.deque(batches, maxlen=0)


def test_the_identity_is_all_that_decides_the_batches(dataset, tmp_path):
    now = Loader(dataset, LoaderConfig(4)).identity()
    assert Loader(dataset, LoaderConfig(4, workers=2, prefetch=1), rows=range(2)).identity() == now
    changed = PhotoDataset(write(tmp_path, photos=PHOTOS | {"fay": {(8, 8): 2}}).folder, "train")
    assert Loader(changed, LoaderConfig(4)).identity() == now | {"dataset": changed.fingerprint}
    assert changed.fingerprint != dataset.fingerprint
    other = LoaderConfig(8, seed=1, photos_per_person_cap=3)
    assert Loader(dataset, other).identity() == now | {"batch_size": 8, "seed": 1, "photos_per_person_cap": 3}


def test_what_cannot_be_read_is_said(dataset, tmp_path):
    with pytest.raises(InputError, match=r"The split validation of .* is empty"):
        Loader(PhotoDataset(dataset.folder, "validation"), LoaderConfig(4))
    silent = write(tmp_path, captions=False)
    with pytest.raises(InputError, match="has no captions"):
        Loader(silent, LoaderConfig(4, captions=True), tokenizers=(np.array, np.array))
    for wrong in ({"batch_size": 0}, {"workers": -1}, {"prefetch": 0}, {"photos_per_person_cap": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}=-?[01]: give"):
            LoaderConfig(**({"batch_size": 1} | wrong))


def test_the_benchmark_counts_what_it_reads(tmp_path, capsys):
    arguments = ["--records", "8", "--batch-size", "2", "--steps", "3", "--workers", "0"]
    assert benchmark(["--json", str(tmp_path / "report.json"), *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["ArrayRecord alone", "batch(step)", "batches, threads"]
    # Two records an image; 257 x 1664 and 2 x 128 x 128 x 4 values of 2 bytes, 224 x 224 x 3 of one, and little more.
    for row in report["rows"]:
        assert row["records_per_s"] == pytest.approx(2 * row["images_per_s"])
    least = 257 * 1664 * 2 + 2 * 128 * 128 * 4 * 2 + 224 * 224 * 3
    assert least < report["rows"][0]["bytes_per_s"] / report["rows"][0]["records_per_s"] < 1.1 * least
    assert report["needed_images_per_s"] == pytest.approx(32.9, abs=0.05)
    assert "32.9 images/s" in capsys.readouterr().out
