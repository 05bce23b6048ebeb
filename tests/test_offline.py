"""The offline stage as a user meets it: what it keeps and why, what the records hold, and what no crash can spoil."""

import collections
import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps

from benchmarks import offline as benchmark
from data_pipeline import __main__ as offline
from data_pipeline.config import PipelineConfig
from data_pipeline.faces import FoundFace, find_face
from data_pipeline.identities import drop_near_duplicates, similarity_to_person, verify_people
from data_pipeline.ingest import examine
from data_pipeline.pipeline import make_pipeline, plan
from data_pipeline.provenance import Row
from data_pipeline.records import PhotoDataset
from data_pipeline.sources import Source, list_sources
from data_pipeline.targets import cut_target
from infinite_id_jax.errors import MissingExtraError
from infinite_id_jax.faces.backends import get_backend
from infinite_id_jax.faces.extract import extract_face
from infinite_id_jax.faces.photo import open_photo
from infinite_id_jax.stable_diffusion.clip_vision import resize_and_crop
from tests import hostile, photos

ROOT = Path(__file__).parent.parent
CONFIG = PipelineConfig(input="", model="", face_backend="offline", similarity=0.91)
SIZES = ("--resolutions", "64,128", "--photos-per-shard", "3", "--batch-size", "2", "--validation-share", "0.5")


def people() -> dict[str, list[Image.Image]]:
    """Real faces, each person's in poses and sizes that differ."""
    anna, bob = Image.fromarray(photos.astronaut()), Image.fromarray(photos.photographer()[40:340, 80:380])
    return {
        "anna": [anna, ImageOps.mirror(anna), anna.rotate(12), anna.crop((70, 0, 370, 300)).rotate(-9)],
        "bob": [bob, ImageOps.mirror(bob), bob.rotate(8)],
        "zoë": [anna.rotate(-15).crop((40, 0, 440, 300)), ImageOps.mirror(anna.rotate(20)), anna.rotate(-12)],
    }


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """A folder of three people, a stranger among them, and files that are no photos."""
    folder = tmp_path_factory.mktemp("an album")
    for person, pictures in people().items():
        (folder / person).mkdir()
        for i, picture in enumerate(pictures):
            picture.save(folder / person / f"{i}.png")
    Image.fromarray(photos.photographer()).save(folder / "anna" / "not her.png")
    people()["anna"][0].resize((400, 400)).save(folder / "anna" / "0 small.jpg")
    (folder / "bob" / "0 copy.png").write_bytes((folder / "bob" / "0.png").read_bytes())
    Image.fromarray(photos.without_face()).save(folder / "zoë" / "coffee.jpg")
    (folder / "zoë" / "letter.jpg").write_text("Dear photo")
    people()["bob"][2].rotate(5).save(folder / "stray.png")
    (folder / "carl").mkdir()
    people()["bob"][1].rotate(-14).save(folder / "carl" / "alone.png")
    return folder


def arguments(inputs: Path, output: Path, model: Path, *options: str) -> list[str]:
    where = ("--input", str(inputs), "--output", str(output), "--model", str(model))
    return [*where, "--face-backend", "mtcnn_dlib", *SIZES, *options]


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "data_pipeline", *arguments(*args)]  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def finished(album, tiny, tmp_path_factory) -> Path:
    """What an uninterrupted run in a process of its own leaves."""
    output = tmp_path_factory.mktemp("finished") / "D"
    done = subprocess.run(command(album, output, tiny.model), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "provenance.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    """The one sentence after "error: " of a command that is refused."""
    assert offline.main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


# What becomes of each photo


def test_every_photo_has_a_row_and_a_reason(finished):
    rows = rows_of(finished)
    assert {row["path"]: row["reason"] for row in rows if row["reason"]} == {
        "anna/0 small.jpg": "near_duplicate",
        "anna/not her.png": "other_person",
        "bob/0.png": "duplicate",
        "carl/alone.png": "too_few_photos",
        "stray.png": "no_person",
        "zoë/coffee.jpg": "no_face",
        "zoë/letter.jpg": "not_an_image",
    }
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert all((row["status"] == "kept") == (row["reason"] == "") for row in rows)
    kept = [row for row in rows if row["status"] == "kept"]
    assert len(kept) == 10
    for row in kept:
        assert row["split"] in ("train", "validation")
        assert row["face_size"] >= CONFIG.min_face
        assert 0.9 <= row["score"] <= 1
        assert row["similarity"] >= CONFIG.similarity
        assert len(row["sha256"]) == 64
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["kept"] + summary["rejected"] == summary["input"] == len(rows)
    assert summary["reasons"] == collections.Counter(row["reason"] for row in rows if row["reason"])


def test_hostile_inputs_are_all_accounted_for(capsys, tmp_path, tiny):
    """`python -m benchmarks.offline --hostile 2000` does the same with many more."""
    folder = tmp_path / "photos"
    expected = hostile.write_hostile(folder, 330)
    (folder / "anna").mkdir()
    for i, picture in enumerate(people()["anna"][:2]):
        picture.save(folder / "anna" / f"{i}.png")
    assert offline.main(arguments(folder, tmp_path / "D", tiny.model, "--id-features", "on_device")) == 0
    rows = rows_of(tmp_path / "D")
    assert len(rows) == len(expected) + 2
    assert hostile.unexpected(expected, rows) == {}
    assert [row["path"] for row in rows if row["status"] == "kept"] == ["anna/0.png", "anna/1.png"]
    out = capsys.readouterr().out
    assert "332 photos: 2 of 1 people kept, 330 rejected." in out
    assert "not_an_image" in out


# What the records hold


def datasets(output: Path) -> list[PhotoDataset]:
    return [PhotoDataset(output, split) for split in ("train", "validation")]


def test_the_records_are_the_kept_photos_and_no_person_is_in_two_places(finished):
    kept = {row["sha256"]: row for row in rows_of(finished) if row["status"] == "kept"}
    where = collections.defaultdict(set)
    for dataset in datasets(finished):
        assert len(dataset) > 0
        for person, photo in zip(dataset.people, dataset.photos, strict=True):
            row = kept.pop(photo)
            assert (row["person"], row["split"]) == (person, dataset.split)
    assert not kept
    for mark in (finished / "marks").iterdir():
        for person, *_ in json.loads(mark.read_text())["index"]:
            where[person].add(mark.name)
    assert all(len(shards) == 1 for shards in where.values())


def test_a_record_is_what_the_encoders_make_of_its_photo(finished, album, tiny):
    """Faces by the functions of sample.py, CLIP and VAE by PyTorch; records are bfloat16, of 8 bits.

    Measured: 0.0026 of the largest value, which is what bfloat16 rounds away.
    """
    backend = get_backend("offline")
    clip = transformers.CLIPVisionModelWithProjection.from_pretrained(tiny.model / "image_encoder")
    vae = diffusers.AutoencoderKL.from_pretrained(tiny.model / "vae")
    processor = transformers.CLIPImageProcessor()
    paths = {row["sha256"]: row["path"] for row in rows_of(finished)}
    sizes = set()
    for dataset in datasets(finished):
        for i in (0, len(dataset) - 1):
            record = dataset[i]
            photo = open_photo(album / paths[record.photo])
            face = extract_face(photo, backend)
            np.testing.assert_array_equal(record.clip_crop, face.clip_crop)
            np.testing.assert_array_equal(record.recogniser_crop, face.recogniser_crop)
            np.testing.assert_array_equal(record.face_embedding, face.embedding)
            side = 8 * record.latent_mean.shape[0]
            sizes.add(side)
            target = cut_target(photo, face.face.box, side)
            np.testing.assert_array_equal(record.time_ids, target.time_ids)
            with torch.no_grad():
                pixels = processor(Image.fromarray(record.clip_crop), return_tensors="pt").pixel_values
                states = clip(pixels, output_hidden_states=True).hidden_states[-1][0].numpy()
                picture = torch.from_numpy(target.picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
                posterior = vae.encode(picture).latent_dist
            assert record.clip_hidden_states is not None
            _assert_close(record.clip_hidden_states, states)
            _assert_close(record.latent_mean, posterior.mean[0].permute(1, 2, 0).numpy())
            _assert_close(record.latent_std, posterior.std[0].permute(1, 2, 0).numpy())
    assert sizes == {128}


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(np.float32) - expected).max() <= 0.008 * np.abs(expected).max()


def test_on_device_features_are_left_out_and_the_layer_is_chosen(tmp_path, tiny, album):
    shutil.copytree(album / "anna", tmp_path / "photos" / "anna")
    outputs = {}
    for name, options in {
        "last": (),
        "penultimate": ("--clip-layer", "penultimate"),
        "none": ("--id-features", "on_device", "--resolutions", "64,320"),
    }.items():
        outputs[name] = tmp_path / name
        assert offline.main(arguments(tmp_path / "photos", tmp_path / name, tiny.model, *options)) == 0
    first, second, none = (next(one[0] for one in datasets(outputs[name]) if len(one)) for name in outputs)
    assert first.clip_hidden_states is not None
    assert second.clip_hidden_states is not None
    assert not np.array_equal(first.clip_hidden_states, second.clip_hidden_states)
    np.testing.assert_array_equal(first.latent_mean, second.latent_mean)
    assert none.clip_hidden_states is None
    buckets = np.concatenate([one.buckets for one in datasets(outputs["none"])])
    assert set(buckets[:, 0].tolist()) == {8, 40}  # the crop of 300 px, and the larger photos


# Going on


def test_a_finished_dataset_is_left_as_it_is_and_a_lost_shard_is_made_again(finished, album, tiny, tmp_path):
    output = tmp_path / "D"
    shutil.copytree(finished, output)
    shards = sorted((output / "records").glob("*.array_record*"), key=lambda path: path.stat().st_size)
    lost = shards.pop()
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert offline.main(arguments(album, output, tiny.model)) == 0
    assert contents(output) == contents(finished)
    assert {path: path.stat().st_mtime_ns for path in shards} == before


def test_killed_at_any_moment_it_goes_on_to_the_same_files(finished, album, tiny, tmp_path):
    """At a moment after a random line of progress, so that it comes early and late on any machine."""
    output, seed = tmp_path / "D", int.from_bytes(os.urandom(4), "big")
    rng = random.Random(seed)
    for lines in (rng.randint(2, 5), rng.randint(2, 5)):
        process = subprocess.Popen(command(album, output, tiny.model), cwd=ROOT, stderr=subprocess.PIPE)
        assert process.stderr is not None
        for _ in range(lines):
            process.stderr.readline()
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.stderr.close()
        assert process.wait() == -signal.SIGKILL
        assert not (output / "dataset.json").exists(), seed
    assert offline.main(arguments(album, output, tiny.model)) == 0
    assert contents(output) == contents(finished), seed


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: memory [while running 'x']")])
def test_a_full_memory_is_no_defect(album, tiny, tmp_path, monkeypatch, capsys, error):
    def full(args):
        raise error

    monkeypatch.setattr(offline, "run", full)
    assert offline.main(arguments(album, tmp_path / "D", tiny.model)) == 2
    assert capsys.readouterr().err == "error: The memory is full: take a smaller --batch-size, or --dtype bfloat16.\n"


def test_a_missing_extra_is_named_by_other_processes_too():
    error = pickle.loads(pickle.dumps(MissingExtraError("Photos in Parquet", "data")))
    assert str(error).startswith("Photos in Parquet needs the extra `data`")


def test_two_processes_make_the_same_files_as_one(finished, album, tiny, tmp_path):
    workers = ("--", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
    subprocess.run(command(album, tmp_path / "D", tiny.model, *workers), cwd=ROOT, check=True, capture_output=True)
    assert contents(tmp_path / "D") == contents(finished)


def test_a_full_disk_is_one_clear_error_and_costs_no_finished_shard(finished, album, tiny, tmp_path):
    """No file may be so large as the largest shard, which is not the first to be written."""
    output, whole = tmp_path / "D", contents(finished)
    limit = sorted(len(content) for content in whole.values())[-2]
    code = (
        f"import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"from data_pipeline.__main__ import main\nsys.exit(main({arguments(album, output, tiny.model)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "cannot be written (File too large): free some space or choose another place." in error
    assert not (output / "dataset.json").exists()
    left = contents(output)
    assert any(name.startswith("marks/") for name in left)
    assert all(whole[name] == content for name, content in left.items())
    assert offline.main(arguments(album, output, tiny.model)) == 0
    assert contents(output) == whole


def test_a_folder_that_may_not_be_written_is_one_clear_error(capsys, album, tiny, tmp_path):
    locked = Path("/sys")  # which not even root may write to
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
    assert f"{locked}/D/config.json cannot be written (" in refused(capsys, arguments(album, locked / "D", tiny.model))


def test_rows_that_are_damaged_are_refused_by_name(capsys, finished, album, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "D")
    rows = tmp_path / "D" / "work" / "ingest-000000.jsonl"
    os.truncate(rows, rows.stat().st_size - 10)
    argv = arguments(album, tmp_path / "D", tiny.model)
    assert f"{rows} is damaged" in refused(capsys, argv)
    rows.unlink()
    assert offline.main(argv) == 0
    assert contents(tmp_path / "D") == contents(finished)


# What is refused


def test_another_configuration_is_refused_and_the_difference_shown(capsys, finished, album, tiny, tmp_path):
    error = refused(capsys, arguments(album, finished, tiny.model, "--min-face", "50", "--clip-layer", "penultimate"))
    assert "(clip_layer: last -> penultimate; min_face: 48 -> 50): choose another --output" in error
    shutil.copytree(album / "anna", tmp_path / "photos" / "anna")
    assert "(input: " in refused(capsys, arguments(tmp_path / "photos", finished, tiny.model))


def test_a_smaller_encoder_is_shown_the_head_as_sampling_shows_it(album):
    photo, backend = album / "anna" / "0.png", get_backend("offline")
    source = Source(Row(0, "anna/0.png", "anna"), str(photo))
    found = find_face(dataclasses.replace(source, row=examine(source)), backend, CONFIG, 112)
    seen = extract_face(open_photo(photo), backend).clip_crop
    np.testing.assert_array_equal(found.clip_crop, resize_and_crop(Image.fromarray(seen), 112))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--face-backend", "eigenfaces"], "There is no face backend `eigenfaces`"),
        (["--face-backend", "miniature"], "to miniature is not known: give --similarity, a cosine."),
        (["--id-features", "some"], "--id-features some is unknown: choose cached or on_device."),
        (["--validation-share", "1.5"], "--validation-share 1.5 is out of range: give 0 to 1."),
        (["--min-score", "nan"], "--min-score nan is out of range"),
        (["--batch-size", "0"], "--batch-size 0 is too small"),
        (["--resolutions", "500"], "--resolutions (500,): give multiples of 64"),
        (["--model", "/nowhere"], "The model folder /nowhere does not exist"),
        (["--model", str(ROOT)], "holds no image_encoder: give an SDXL folder"),
        (["--runner", "Turtle"], "--runner Turtle cannot be used: Unexpected pipeline runner: Turtle."),
        (["--output", str(ROOT / "README.md" / "D")], "is a file, or lies in one: choose another --output."),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(capsys, tmp_path, album, tiny, options, says):
    assert says in refused(capsys, arguments(album, tmp_path / "D", tiny.model, *options))
    assert not (tmp_path / "D").exists()


def test_a_cut_weight_file_is_found_before_any_photo_is_read(capsys, tmp_path, album, tiny):
    shutil.copytree(tiny.model, tmp_path / "model")
    weights = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    assert f"{weights} is not a whole safetensors file" in refused(
        capsys, arguments(album, tmp_path / "D", tmp_path / "model")
    )
    assert not (tmp_path / "D").exists()


def test_when_nothing_is_kept_the_rows_say_why(capsys, tmp_path, tiny):
    (tmp_path / "photos" / "anna").mkdir(parents=True)
    (tmp_path / "photos" / "anna" / "1.jpg").write_bytes(b"")
    error = refused(capsys, arguments(tmp_path / "photos", tmp_path / "D", tiny.model))
    assert error.endswith("No photo was kept: " + str(tmp_path / "D" / "provenance.jsonl") + " says why.")
    assert [row["reason"] for row in rows_of(tmp_path / "D")] == ["not_an_image"]
    assert not (tmp_path / "D" / "dataset.json").exists()


def test_a_dry_run_writes_nothing(capsys, tmp_path, album, tiny):
    assert offline.main(arguments(album, tmp_path / "D", tiny.model, "--dry-run")) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "D").exists()


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom data_pipeline import __main__\n__main__.parser().format_help()\n"
        "heavy = {'jax', 'flax', 'numpy', 'cv2', 'dlib', 'PIL', 'apache_beam', 'tensorflow_datasets'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_direct_runner_is_the_one_in_this_process():
    """Beam's own choice for that name may download a server."""
    assert type(make_pipeline("DirectRunner", ()).runner).__name__ == "FnApiRunner"
    assert type(make_pipeline("FlinkRunner", ()).runner).__name__ == "FlinkRunner"


# One face a photo


def found_in(tmp_path: Path, picture: np.ndarray, **changes: object) -> FoundFace | Row:
    path = tmp_path / "anna" / "1.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(path)
    (source,) = list_sources([str(tmp_path)])
    source = dataclasses.replace(source, row=examine(source))
    return find_face(source, get_backend("offline"), dataclasses.replace(CONFIG, **changes), 224)


def test_of_several_faces_one_must_be_twice_as_large(tmp_path):
    found = found_in(tmp_path, photos.group())
    assert isinstance(found, FoundFace)
    assert found.row.faces == 3
    assert found.row.face_size is not None
    assert found.row.face_size > 100  # the one in the middle
    head = photos.astronaut()[0:230, 110:340]
    both = found_in(tmp_path, np.concatenate([head, head], axis=1))
    assert isinstance(both, Row)
    assert (both.reason, both.faces) == ("many_faces", 2)


def test_small_and_uncertain_faces_are_rejected(tmp_path):
    small = found_in(tmp_path, photos.astronaut(), min_face=100)
    assert isinstance(small, Row)
    assert small.reason == "small_face"
    assert small.face_size is not None
    assert 80 <= small.face_size < 100
    assert small.detail == f"{small.face_size} px, 100 are asked for"
    uncertain = found_in(tmp_path, photos.astronaut(), min_score=1.0)
    assert isinstance(uncertain, Row)
    assert (uncertain.reason, uncertain.faces) == ("no_face", 0)


# One person a name


def face(index: int, direction: np.ndarray, *, person: str = "anna", phash: int = 0, side: int = 100) -> FoundFace:
    row = Row(index, f"{index}.jpg", person, phash=f"{phash:016x}", width=side, height=side)
    crop = np.zeros((2, 2, 3), np.uint8)
    box = (0.0, 0.0, 1.0, 1.0)
    return FoundFace(Source(row, ""), (side, side), box, crop, crop, direction.astype(np.float32))


def around(centre: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return centre + 0.1 * rng.normal(size=(count, len(centre)))


def test_a_persons_face_is_that_of_most_photos(monkeypatch):
    """The majority is found wherever it stands, at any length of the embeddings, and in pieces of the matrix."""
    monkeypatch.setattr("data_pipeline.identities._ROWS", 4)
    rng = np.random.default_rng(0)
    anna, bob = np.eye(16)[0], np.eye(16)[1]
    directions = np.concatenate([around(bob, 3, rng), around(anna, 6, rng), around(bob, 2, rng)]).astype(np.float32)
    directions *= rng.uniform(0.5, 20, (11, 1)).astype(np.float32)
    similarity = similarity_to_person(directions, 0.7)
    assert (similarity >= 0.7).tolist() == [False] * 3 + [True] * 6 + [False] * 2


def test_people_are_verified_each_for_themselves():
    rng = np.random.default_rng(1)
    anna, bob = np.eye(16)[0], np.eye(16)[1]
    hashes = [0, 2**40 - 1, 2**64 - 1, 0xF0F0F0F0F0F0F0F0]
    faces = [face(i, around(anna, 1, rng)[0], phash=hashes[i]) for i in range(3)]
    faces += [face(3 + i, around(bob, 1, rng)[0], person="bob", phash=hashes[i]) for i in range(2)]
    faces += [face(5, bob, phash=hashes[3]), face(6, anna, person="bob", phash=hashes[3])]
    faces += [face(7, bob, person="carl")]
    kept, rejected = verify_people(faces, dataclasses.replace(CONFIG, similarity=0.7))
    assert [one.row.index for one in kept] == [0, 1, 2, 3, 4]
    assert {row.index: row.reason for row in rejected} == {5: "other_person", 6: "other_person", 7: "too_few_photos"}
    assert {row.index: row.similarity for row in rejected}[7] == 1


def test_of_near_duplicates_the_largest_stays():
    one = np.ones(4)
    faces = [
        face(0, one, phash=0b0000),
        face(1, one, phash=0b1111, side=200),
        face(2, one, phash=0b11111111),
        face(3, one, phash=0b1111, side=200),
    ]

    def kept(bits: int) -> list[int]:
        return [one.row.index for one in drop_near_duplicates(faces, bits)]

    assert kept(-1) == [0, 1, 2, 3]
    assert kept(0) == [0, 1, 2]
    assert kept(3) == [0, 1, 2]
    assert kept(4) == [1]


def test_shards_hold_whole_people_of_one_split():
    sources = [Source(Row(i, f"{i}.jpg", f"person {i % 60}"), "") for i in range(600)]
    sources.append(Source(Row(600, "bad.jpg", "person 1", reason="damaged"), ""))
    shards = plan(sources, dataclasses.replace(CONFIG, validation_share=0.2, photos_per_shard=50))
    placed = [source.row.index for shard in shards for source in shard.photos]
    assert sorted(placed) == list(range(600))
    splits: dict[str, set[tuple[str, int]]] = collections.defaultdict(set)
    for shard in shards:
        for source in shard.photos:
            splits[source.row.person].add((shard.split, shard.number))
    assert all(len(places) == 1 for places in splits.values())
    train = [shard for shard in shards if shard.split == "train"]
    assert 8 <= len(train) <= 11
    assert sum(bool(shard.photos) for shard in train) >= len(train) - 2
    assert {shard.split for shard in plan(sources, dataclasses.replace(CONFIG, validation_share=0.0))} == {"train"}


# The benchmark


def test_the_benchmark_times_every_part(tmp_path, capsys, tiny):
    size = ("--photos", "4", "--side", "330", "--resolution", "64", "--batch-size", "2")
    assert benchmark.main([*size, "--model", str(tiny.model), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kept"] == report["photos"] == 4
    assert min(report["stages_s"].values()) > 0
    assert {"detect", "recognise", "VAE", "CLIP", "write"} <= report["stages_s"].keys()
    assert report["stages_photos_per_s"]["detect"] == pytest.approx(4 / report["stages_s"]["detect"])
    out = capsys.readouterr().out
    assert all(name in out for name in report["stages_s"])
