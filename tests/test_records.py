"""Records: bit-exact, whole or absent, readable by tensorflow-datasets without TensorFlow; and the drawn people."""

import dataclasses
import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import random_record
from data_pipeline.drawing import Identity, Scene, draw, picture
from data_pipeline.generated import embed, write_generated
from data_pipeline.records import (
    DatasetSpec,
    PhotoDataset,
    PhotoRecord,
    finish,
    shard_is_complete,
    shard_path,
    split_of,
    write_shard,
)
from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.config import VAEConfig

ROOT = Path(__file__).parent.parent
SPEC = DatasetSpec(
    face_backend="random",
    face_dim=16,
    clip_dim=32,
    clip_tokens=5,
    clip_layer="last",
    clip_size=28,
    recogniser_size=14,
    latent_channels=4,
    id_features="cached",
    model="random",
)


def same(a: PhotoRecord, b: PhotoRecord) -> bool:
    """Bit for bit, dtypes and shapes too."""

    def bits(value: object) -> object:
        return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value

    fields = [field.name for field in dataclasses.fields(PhotoRecord)]
    return all(bits(getattr(a, name)) == bits(getattr(b, name)) for name in fields)


def some_records(start: int, stop: int, spec: DatasetSpec = SPEC) -> list[PhotoRecord]:
    sizes = [(8, 8), (12, 6)]
    return [
        random_record(spec, f"Zoë {i // 3}", i, sizes[i % 2], caption="ein Hut" * (i % 3)) for i in range(start, stop)
    ]


def write(folder: Path, spec: DatasetSpec = SPEC) -> list[PhotoRecord]:
    """Three training shards, the middle one empty, and an empty validation split; returns what is in it."""
    parts = [some_records(0, 5, spec), [], some_records(5, 9, spec)]
    for shard, part in enumerate(parts):
        write_shard(folder, "train", shard, 3, spec, iter(part), "c0")
    write_shard(folder, "validation", 0, 1, spec, [], "c0")
    finish(folder, spec, {"train": 3, "validation": 1}, "c0")
    return [record for part in parts for record in part]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("id_features", ["cached", "on_device"])
def test_records_come_back_bit_for_bit(tmp_path, id_features):
    written = write(tmp_path, dataclasses.replace(SPEC, id_features=id_features))
    dataset = pickle.loads(pickle.dumps(PhotoDataset(tmp_path, "train")))
    assert len(dataset) == 9
    assert all(same(dataset[i], record) for i, record in enumerate(written))
    assert dataset.people == [record.person for record in written]
    assert dataset.photos == [record.photo for record in written]
    assert dataset.buckets.tolist() == [list(record.latent_mean.shape[:2]) for record in written]
    assert dataset.captions == sum(bool(record.caption) for record in written) == 6
    assert len(PhotoDataset(tmp_path, "validation")) == 0
    with pytest.raises(IndexError):
        dataset[9]


def test_the_same_records_make_the_same_files(tmp_path):
    """In another process too: protobuf orders the entries of a map by the process's own hash."""
    write(tmp_path / "here")
    code = "import sys, pathlib, tests.test_records as t; t.write(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], cwd=ROOT, check=True)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert PhotoDataset(tmp_path / "here", "train").fingerprint == PhotoDataset(tmp_path / "there", "train").fingerprint


def test_tensorflow_datasets_reads_them_without_tensorflow_or_network(tmp_path):
    written = write(tmp_path)
    code = (
        "import hashlib, socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import tensorflow_datasets as tfds\n"
        "from pathlib import Path\n"
        "from data_pipeline.loader import Loader, LoaderConfig\n"
        "from data_pipeline.records import PhotoDataset\n"
        "next(Loader(PhotoDataset(Path(sys.argv[1]), 'train'), LoaderConfig(2)).batches(0))\n"
        "rows = tfds.builder_from_directory(sys.argv[1] + '/records').as_data_source('train')\n"
        "print(len(rows), rows[8]['person'].decode(), hashlib.sha256(rows[8]['latent_std'].tobytes()).hexdigest())\n"
        "print([name for name in ('tensorflow', 'torch') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = f"9 {written[8].person} {hashlib.sha256(written[8].latent_std.tobytes()).hexdigest()}"
    assert done.stdout.splitlines() == [expected, "[]"]


def test_a_shard_is_complete_once_it_is_marked(tmp_path):
    assert not shard_is_complete(tmp_path, "train", 0, 1, "c0")
    write_shard(tmp_path, "train", 0, 1, SPEC, some_records(0, 3), "c0")
    assert shard_is_complete(tmp_path, "train", 0, 1, "c0")
    with pytest.raises(InputError, match=r"photos-train.*another configuration \(c0, not c1\)"):
        shard_is_complete(tmp_path, "train", 0, 1, "c1")
    write_shard(tmp_path, "train", 0, 2, SPEC, [], "c0")
    with pytest.raises(InputError, match="00001-of-00002 is not finished"):
        finish(tmp_path, SPEC, {"train": 2}, "c0")
    with pytest.raises(InputError, match="no finished dataset"):
        PhotoDataset(tmp_path, "train")


def test_what_fails_leaves_nothing_and_takes_the_old_mark_away(tmp_path):
    def failing() -> Iterator[PhotoRecord]:
        yield from some_records(0, 2)
        raise RuntimeError("no third")

    write_shard(tmp_path, "train", 0, 1, SPEC, some_records(0, 3), "c0")
    with pytest.raises(RuntimeError, match="no third"):
        write_shard(tmp_path, "train", 0, 1, SPEC, failing(), "c0")
    assert not shard_is_complete(tmp_path, "train", 0, 1, "c0")
    assert not list(tmp_path.rglob("*.partial"))
    wrong = dataclasses.replace(SPEC, face_dim=17)
    with pytest.raises(ValueError, match=r"Shape \(16,\) does not match \(17,\)"):
        write_shard(tmp_path, "train", 0, 1, wrong, some_records(0, 3), "c0")


def test_a_killed_writer_is_cleared_and_done_again(tmp_path):
    """SIGKILL in the middle of a shard: no shard, no mark; the second attempt is as if there had been no first."""
    write(tmp_path / "whole")
    code = (
        "import sys, time, pathlib, tests.test_records as t\n"
        "def slow():\n"
        "    yield from t.some_records(0, 4)\n"
        "    print('ready', flush=True); time.sleep(600)\n"
        "t.write_shard(pathlib.Path(sys.argv[1]), 'train', 0, 3, t.SPEC, slow(), 'c0')"
    )
    folder = tmp_path / "killed"
    writer = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        writer.send_signal(signal.SIGKILL)
    assert [path.suffix for path in folder.rglob("*") if path.is_file()] == [".partial"]
    write(folder)
    assert files(folder) == files(tmp_path / "whole")


def test_a_full_disk_is_said_and_leaves_no_shard(tmp_path):
    """A limit on the size of files stands in for the disk: the writer hears of both on closing only."""
    code = (
        "import resource, signal, sys, pathlib, tests.test_records as t\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "records = t.some_records(0, 3)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: t.write_shard(pathlib.Path(sys.argv[1]), 'train', 0, 1, t.SPEC, records, 'c0')\n"
        "except t.InputError as error: print(error)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "00000-of-00001 cannot be written (File too large): free some space" in done.stdout
    assert not files(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "missing", "mark"])
def test_damage_is_named_on_opening(tmp_path, damage):
    write(tmp_path)
    path = shard_path(tmp_path, "train", 2, 3)
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "missing":
        path.unlink()
    else:
        (tmp_path / "marks" / "train-00002-of-00003.json").write_text('{"count": 4')
    with pytest.raises(InputError, match=r"photos-train.array_record-00002-of-00003 is missing or damaged: delete it"):
        PhotoDataset(tmp_path, "train")


def test_a_changed_bit_is_named_on_reading(tmp_path):
    written = write(tmp_path)
    path = shard_path(tmp_path, "train", 2, 3)
    content = bytearray(path.read_bytes())
    content[content.index(written[8].latent_mean.tobytes())] ^= 1
    path.write_bytes(content)
    dataset = PhotoDataset(tmp_path, "train")
    assert same(dataset[7], written[7])
    with pytest.raises(InputError, match=r"Record 8 of train .* cannot be read .*hash mismatch.*: delete its shard"):
        dataset[8]


def test_the_split_follows_the_person_and_the_share():
    people = [f"person {i}" for i in range(4000)]
    validation = {person for person in people if split_of(person, 0.1) == "validation"}
    # 400 expected, standard deviation 19; measured 400.
    assert 325 < len(validation) < 475
    assert validation < {person for person in people if split_of(person, 0.2) == "validation"}
    assert {split_of(person, 0.0) for person in people} == {"train"}


def test_drawings_are_pure_and_keep_the_person():
    np.testing.assert_array_equal(draw(3, 5, 64), draw(3, 5, 64))
    assert (draw(3, 5, 64) != draw(3, 6, 64)).any()
    embeddings = []
    for person in range(20):
        for photo in range(4):
            scene = Scene.from_seed(100 * person + photo)
            face = picture(Identity.from_seed(person), scene, 64).resize((32, 32), box=scene.head_box(64, 0.75))
            embeddings.append(embed(np.asarray(face)))
    unit = np.stack([x / np.linalg.norm(x) for x in embeddings])
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    nearest = cosine.argmax(1) // 4
    # Chance .04; measured .95.
    assert (nearest == np.arange(80) // 4).mean() > 0.9


def test_generated_people_make_a_whole_dataset_once(tmp_path, tiny):
    arguments = {"people": 5, "photos": 3, "size": 64, "seed": 7}
    write_generated(tmp_path / "a", tiny.model, **arguments)
    dataset, validation = PhotoDataset(tmp_path / "a", "train"), PhotoDataset(tmp_path / "a", "validation")
    assert (len(dataset), len(validation)) == (12, 3)
    assert not set(dataset.people) & set(validation.people)
    assert len(set(dataset.photos)) == 12
    assert dataset.captions == 12
    record = dataset[0]
    downscale = VAEConfig.from_json(tiny.model / "vae" / "config.json").downscale
    assert record.latent_mean.shape[:2] == (64 // downscale, 64 // downscale)
    assert record.clip_hidden_states is not None
    assert np.isfinite(record.clip_hidden_states.astype(np.float32)).all()
    before = files(tmp_path / "a")
    write_generated(tmp_path / "a", tiny.model, **arguments)
    assert files(tmp_path / "a") == before
    with pytest.raises(InputError, match="other parameters"):
        write_generated(tmp_path / "a", tiny.model, **(arguments | {"seed": 8}))
    # What a killed run left is completed, to the same bytes.
    (tmp_path / "a" / "dataset.json").unlink()
    (tmp_path / "a" / "marks" / "train-00001-of-00002.json").unlink()
    write_generated(tmp_path / "a", tiny.model, **arguments)
    assert files(tmp_path / "a") == before
