"""What counts as a photo of the input, in which order, and what each is found to be."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline import ingest
from data_pipeline.provenance import Row, load_rows, save_rows, shown
from data_pipeline.sources import Source, digest, list_sources
from data_pipeline.targets import cut_target, target_size
from infinite_id_jax.errors import InputError, PhotoError
from infinite_id_jax.faces.photo import open_photo
from tests import photos

ROOT = Path(__file__).parent.parent
PICTURE = Image.fromarray(photos.astronaut()).resize((64, 64))


def encoded(image: Image.Image = PICTURE, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listed(*inputs: Path | str) -> list[tuple[str, str, str]]:
    return [(one.row.path, one.row.person, one.row.reason) for one in list_sources([str(one) for one in inputs])]


def archive(path: Path, *files: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# Folders


def test_a_folder_is_listed_by_bytes_with_the_first_folder_as_the_person(tmp_path):
    names = ["zoe/1.jpg", "anna/holiday/two words.jpg", "anna/1.jpg", "anna/letter.txt", "stray.png", ".hidden/1.jpg"]
    for name in random.Random(0).sample(names, len(names)):
        write(tmp_path / name)
    assert listed(tmp_path) == [
        ("anna/1.jpg", "anna", ""),
        ("anna/holiday/two words.jpg", "anna", ""),
        ("anna/letter.txt", "anna", ""),
        ("stray.png", "", "no_person"),
        ("zoe/1.jpg", "zoe", ""),
    ]
    assert [source.row.index for source in list_sources([str(tmp_path)])] == list(range(5))


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    write(tmp_path / "elsewhere" / "1.jpg")
    photos = tmp_path / "photos"
    write(photos / "anna" / "1.jpg")
    (photos / "anna" / "back").symlink_to("..")
    (photos / "bob").symlink_to(tmp_path / "elsewhere")
    (photos / "carl").symlink_to(tmp_path / "elsewhere")
    assert listed(photos) == [
        ("anna/1.jpg", "anna", ""),
        ("anna/back", "anna", "link_loop"),
        ("bob/1.jpg", "bob", ""),
        ("carl", "", "link_loop"),
    ]


def test_a_name_that_is_no_unicode_is_shown_and_still_read(tmp_path):
    person = tmp_path / "J\udcfcrgen"  # Jürgen in Latin-1
    write(person / "new\nline.png", encoded())
    (source,) = list_sources([str(tmp_path)])
    assert source.row.path == "J\\xfcrgen/new\nline.png"
    assert ingest.examine(source).reason == ""


@pytest.mark.parametrize("text", ["plain", "\udcff", "\ud800 alone", "emoji 🙂"])
def test_any_text_can_be_saved_and_comes_back(tmp_path, text):
    row = Row(3, shown(text), "anna").rejected("damaged", text)
    save_rows([row], tmp_path / "rows")
    assert load_rows(tmp_path / "rows", 1) == [row]
    assert json.loads((tmp_path / "rows").read_text(encoding="utf-8"))["status"] == "rejected"


def test_the_digest_sees_what_the_list_says(tmp_path):
    write(tmp_path / "anna" / "1.jpg", b"123")
    before = digest(list_sources([str(tmp_path)]))
    assert digest(list_sources([str(tmp_path)])) == before
    write(tmp_path / "anna" / "1.jpg", b"1234")
    longer = digest(list_sources([str(tmp_path)]))
    write(tmp_path / "anna" / "2.jpg")
    assert len({before, longer, digest(list_sources([str(tmp_path)]))}) == 3


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere", None, "does not exist"),
        ("x-{00..01}.tar", None, "x-00.tar does not exist"),
        ("notes.md", b"", "is no folder, .csv, .parquet or .tar"),
        ("empty.csv", b"path,person\n", "holds no photo"),
        ("table.csv", b"file,name\n1.jpg,anna\n", "has no column path and no person"),
        ("table.parquet", b"PAR1", "cannot be read"),
        ("binary.csv", b"path,person\n\x00\x00" + b'"' * 3 + b"x" * 200_000, "cannot be read"),
    ],
)
def test_an_input_that_is_none_is_refused(tmp_path, name, content, says):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(InputError, match=says):
        list_sources([str(tmp_path / name)])


# Manifests

TABLE = [
    {"path": "a/1.png", "person": "anna", "caption": "in the snow", "licence": "CC0", "source": "NASA", "opt_out": ""},
    {"path": "a/2.png", "person": "anna", "caption": "", "licence": "", "source": "", "opt_out": "0"},
    {"path": "nowhere.png", "person": "bob", "caption": "", "licence": "", "source": "", "opt_out": "yes"},
    {"path": "nowhere.png", "person": "bob", "caption": "", "licence": "", "source": "", "opt_out": "please"},
    {"path": "a/2.png", "person": "", "caption": "", "licence": "", "source": "", "opt_out": "False"},
    {"path": "", "person": "carl", "caption": "", "licence": "", "source": "", "opt_out": ""},
]


def csv_manifest(path: Path) -> Path:
    lines = [",".join(TABLE[0]), *(",".join(row.values()) for row in TABLE)]
    return write(path / "manifest.csv", "\ufeff".encode() + "\r\n".join(lines).encode())


def parquet_manifest(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), path / "manifest.parquet")
    return path / "manifest.parquet"


@pytest.mark.parametrize("manifest", [csv_manifest, parquet_manifest])
def test_a_manifest_names_photos_beside_it_and_opt_outs_are_not_opened(tmp_path, manifest):
    write(tmp_path / "a" / "1.png", encoded())
    write(tmp_path / "a" / "2.png", encoded(ImageOps.mirror(PICTURE)))
    sources = list_sources([str(manifest(tmp_path))])
    rows = [ingest.examine(source) for source in sources]
    # Opened, a photo that is nowhere would be `missing`.
    assert [row.reason for row in rows] == ["", "", "opt_out", "opt_out", "no_person", "missing"]
    assert (rows[0].caption, rows[0].licence, rows[0].source) == ("in the snow", "CC0", "NASA")
    assert [row.opt_out for row in rows] == [False, False, True, True, False, False]


# WebDataset


def test_archives_hold_photos_and_what_is_said_of_them(tmp_path):
    one, two = encoded(), encoded(ImageOps.mirror(PICTURE), "JPEG")
    said = {"person": "anna", "license": "CC0", "opt_out": False, "caption": "\ud800"}
    archive(
        tmp_path / "x-00.tar", ("a/1.png", one), ("a/1.json", json.dumps(said).encode()), ("a/1.txt", b"in the snow")
    )
    archive(
        tmp_path / "x-01.tar",
        ("1.cls", b"bob"),
        ("1.jpg", two),
        ("2.jpg", two),
        ("2.json", b"{"),
        ("3.jpg", two),
        ("4.json", b'{"person": "carl", "opt_out": 1}'),
        ("4.jpg", b"unread"),
    )
    sources = list_sources([str(tmp_path / "x-{00..01}.tar")])
    rows = [ingest.examine(source) for source in sources]
    assert [(row.path, row.person, row.reason) for row in rows] == [
        ("x-00.tar/a/1.png", "anna", ""),
        ("x-01.tar/1.jpg", "bob", ""),
        ("x-01.tar/2.jpg", "", "bad_metadata"),
        ("x-01.tar/3.jpg", "", "no_person"),
        ("x-01.tar/4.jpg", "carl", "opt_out"),
    ]
    assert (rows[0].caption, rows[0].licence) == ("in the snow", "CC0")
    assert ingest.read_bytes(sources[1]) == two
    assert list_sources([str(tmp_path / "x-*.tar")]) == sources


def test_an_archive_that_breaks_off_gives_what_is_whole_and_a_row_for_the_rest(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    files = [(f"{i}.{kind}", content) for i in range(4) for kind, content in (("cls", b"x"), ("png", encoded(noise)))]
    whole = archive(tmp_path / "whole.tar", *files).read_bytes()
    cut = write(tmp_path / "cut.tar", whole[: len(whole) * 6 // 10])
    rows = [ingest.examine(source) for source in list_sources([str(cut)])]
    assert [row.reason for row in rows[:2]] == ["", ""]
    assert rows[-1].reason == "damaged_archive"
    assert {row.reason for row in rows[2:-1]} <= {"damaged"}
    no_archive = write(tmp_path / "text.tar", b"not an archive" * 100)
    assert listed(no_archive) == [("text.tar", "", "damaged_archive")]


# tensorflow-datasets


def test_a_prepared_dataset_is_read_without_tensorflow(tmp_path):
    """In a process of its own, because other tests may have imported TensorFlow's stand-ins."""
    pictures = [encoded(), encoded(ImageOps.mirror(PICTURE))]
    code = f"""
import sys, tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
features = tfds.features.FeaturesDict({{
    "image": tfds.features.Image(encoding_format="png"), "label": tfds.features.ClassLabel(names=["anna", "bob"])}})
folder = epath.Path({str(tmp_path)!r}) / "faces" / "1.0.0"
folder.mkdir(parents=True)
template = tfds.core.ShardedFileTemplate(folder, dataset_name="faces", filetype_suffix="array_record", split="train")
writer = ArrayRecordWriter(str(folder / "faces-train.array_record-00000-of-00001"), "group_size:1")
for label, picture in enumerate({pictures!r}):
    writer.write(features.serialize_example({{"image": picture, "label": label}}))
writer.close()
split = tfds.core.SplitInfo(name="train", shard_lengths=[2], num_bytes=1, filename_template=template)
tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split],
                                   filename_template=template, check_data=False)
from data_pipeline import ingest, sources
found = sources.list_sources(["tfds:faces"])
rows = [ingest.examine(source) for source in found]
assert [(row.path, row.person, row.reason) for row in rows] == [
    ("tfds:faces/train/0", "anna", ""), ("tfds:faces/train/1", "bob", "")], rows
assert [ingest.read_bytes(source) for source in found] == {pictures!r}
assert "tensorflow" not in sys.modules
try:
    sources.list_sources(["tfds:lfw"])
except ValueError as error:
    assert "tfds:lfw is not prepared" in str(error), error
"""
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What a photo is found to be


def test_bytes_are_read_as_their_file_is(tmp_path):
    path = write(tmp_path / "x.jpg", encoded(Image.fromarray(photos.astronaut()), "JPEG"))
    np.testing.assert_array_equal(open_photo(path.read_bytes()), open_photo(path))
    with pytest.raises(PhotoError, match="The image is not an image") as caught:
        open_photo(b"text")
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "missing"),
        ("folder", "not_a_file"),
        ("text", "not_an_image"),
        ("truncated", "damaged"),
        ("four_bytes", "not_an_image"),
        ("one_pixel", "too_small"),
        ("bomb", "too_large"),
        ("over_the_limit", "too_large"),
    ],
)
def test_every_bad_file_has_its_reason(tmp_path, kind, reason):
    path = photos.BAD_FILES[kind][0](tmp_path)
    assert ingest.examine(Source(Row(0, path.name, "anna"), str(path))).reason == reason


def test_a_file_of_more_than_half_a_gigabyte_is_not_read(tmp_path):
    path = write(tmp_path / "video.jpg")
    os.truncate(path, ingest.MAX_BYTES + 1)  # takes no space
    row = ingest.examine(Source(Row(0, path.name, "anna"), str(path)))
    assert (row.reason, row.sha256) == ("too_large", None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read the file")
def test_what_may_not_be_read_is_said_to_be_so(tmp_path):
    """As root may read everything, another user has to try."""
    write(tmp_path / "anna" / "1.png", encoded()).chmod(0)
    write(tmp_path / "bob" / "1.png", encoded()).parent.chmod(0)
    for place in (tmp_path, *tmp_path.parents[:-2]):
        place.chmod(place.stat().st_mode | 0o755)
    code = (
        "from data_pipeline import ingest, sources\nimport os\n"
        f"os.setuid(65534)\nfound = sources.list_sources([{str(tmp_path)!r}])\n"
        "print([(ingest.examine(one).path, ingest.examine(one).reason) for one in found])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[('anna/1.png', 'unreadable'), ('bob', 'unreadable')]", done.stderr
    itself = subprocess.run(
        [sys.executable, "-c", code.replace(repr(str(tmp_path)), repr(str(tmp_path / "bob")))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"--input {tmp_path / 'bob'} may not be read: allow it" in itself.stderr


def test_the_first_of_equal_files_is_kept_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "BLOCK", 2)
    for name in ("anna/1.png", "anna/2.png", "bob/1.png"):
        write(tmp_path / "photos" / name, encoded())
    write(tmp_path / "photos" / "bob" / "2.png", b"damaged")
    write(tmp_path / "photos" / "bob" / "3.png", b"damaged")
    sources = list_sources([str(tmp_path / "photos")])
    for number, block in enumerate(ingest.blocks(sources)):
        ingest.ingest_block(tmp_path, number, block)
    rows = [source.row for source in ingest.collect(tmp_path, sources)]
    assert [(row.reason, row.detail) for row in rows[:3]] == [
        ("", ""),
        ("duplicate", "anna/1.png"),
        ("duplicate", "anna/1.png"),
    ]
    assert [row.reason for row in rows[3:]] == ["not_an_image", "not_an_image"]  # a copy of nothing is no copy


def test_a_photo_that_changes_after_it_was_hashed_is_noticed(tmp_path):
    path = write(tmp_path / "anna" / "1.png", encoded())
    (source,) = list_sources([str(tmp_path)])
    source = Source(ingest.examine(source), source.location)
    np.testing.assert_array_equal(ingest.reopen(source), open_photo(path))
    write(path, encoded(ImageOps.mirror(PICTURE)))
    with pytest.raises(InputError, match=r"anna/1\.png has changed"):
        ingest.reopen(source)
    path.unlink()
    with pytest.raises(InputError, match="was readable before"):
        ingest.reopen(source)


def test_the_difference_hash_tells_copies_from_other_photos():
    """Measured: 0 to 2 bits for copies, 37 for the mirror image and for another photo."""
    picture = Image.fromarray(photos.astronaut())
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    copies = [picture.resize((200, 200)), Image.open(file), picture.point(lambda value: min(255, value + 10))]
    others = [ImageOps.mirror(picture), Image.fromarray(photos.photographer())]
    first = ingest.difference_hash(np.asarray(picture))
    hashes = np.asarray([ingest.difference_hash(np.asarray(one)) for one in (*copies, *others)], np.uint64)
    bits = ingest.differing_bits(first, hashes)
    assert bits[:3].max() <= 4
    assert bits[3:].min() >= 16


# The target picture


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(2000, 1500, 1024), (1024, 1024, 1024), (1023, 4000, 512), (300, 300, 512)]
)
def test_the_bucket_is_the_largest_that_a_photo_fills(height, width, expected):
    assert target_size(height, width, (512, 1024)) == expected


def test_a_square_photo_is_resized_and_conditioned_on_its_size():
    photo = photos.astronaut()
    target = cut_target(photo, (180.0, 60.0, 270.0, 180.0), 256)
    np.testing.assert_array_equal(target.time_ids, [512, 512, 0, 0, 256, 256])
    expected = np.asarray(Image.fromarray(photo).resize((256, 256), Image.Resampling.LANCZOS), np.int16)
    assert np.abs(target.picture - expected).max() <= 2  # Pillow's reducing_gap: measured 1


@pytest.mark.parametrize(
    ("y0", "y1", "top"),
    [
        (250, 300, 64),  # in the middle: the central square
        (100, 150, 37),  # above it: moved up as far as the face and half its height over it need
        (380, 430, 100),
        (-8, 40, 0),  # a box may begin outside
        (0, 512, 64),  # and be larger than the square
    ],
)
def test_a_tall_photo_is_cut_to_its_middle_unless_that_cuts_the_head(y0, y1, top):
    """A photo of 256 x 512 px, halved: each row's value is its place in the halved photo."""
    photo = np.zeros((512, 256, 3), np.uint8)
    photo[..., 0] = (np.arange(512) // 2)[:, None]
    target = cut_target(photo, (40.0, float(y0), 80.0, float(y1)), 128)
    np.testing.assert_array_equal(target.time_ids, [512, 256, top, 0, 128, 128])
    np.testing.assert_array_equal(target.picture[4:-4, 64, 0], top + np.arange(4, 124))
