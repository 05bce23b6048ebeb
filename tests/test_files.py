"""Files that are whole or not there, pictures that say what they are, and the folder of a run."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from infinite_id_jax.command_line import keep_compiled
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import fingerprint, replacing, save_json, write_folder
from infinite_id_jax.images import is_whole, labelled_grid, read_metadata, save_image, save_png, thumbnail, watermark
from infinite_id_jax.output_folder import OutputFolder, Row
from tests import photos

RED = Image.new("RGB", (64, 48), (255, 0, 0))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path, failure):
    (tmp_path / "a.txt").write_text("old")

    def write():
        with replacing(tmp_path / "a.txt") as beside:
            beside.write_text("ne")
            raise failure

    with pytest.raises(failure):
        write()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_folder_that_was_left_halfway_is_made_anew_and_a_whole_one_kept(tmp_path):
    folder = tmp_path / "model"

    def fail(beside: Path) -> None:
        beside.mkdir()
        (beside / "half").touch()
        raise KeyboardInterrupt

    def make(beside: Path) -> None:
        assert not beside.exists()
        beside.mkdir()
        (beside / "whole").touch()

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, fail)
    assert not folder.exists()
    write_folder(folder, make)
    write_folder(folder, fail)  # is not called
    assert names(folder) == {"whole"}
    assert names(tmp_path) == {"model"}
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_folder(tmp_path / "file" / "model", lambda beside: beside.mkdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    save_png(RED, tmp_path / "a.png", {})
    before = (tmp_path / "a.png").read_bytes()
    # What save_png writes to is a link to the device.
    (tmp_path / f".a.png.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"a\.png cannot be written \(No space left on device\): free"):
        save_png(RED, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_bytes() == before
    assert names(tmp_path) == {"a.png"}


def test_a_place_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        save_json({}, tmp_path / "file" / "a.json")


def test_json_is_readable_in_any_script(tmp_path):
    save_json({"prompt": "ein Förster, 人 🙂"}, tmp_path / "a.json")
    assert "Förster, 人 🙂" in (tmp_path / "a.json").read_text(encoding="utf-8")


def model_folder(folder: Path, size: int) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "a.safetensors").write_bytes(bytes(size))
    (folder / "index.json").write_text("{}")
    return folder


def test_the_fingerprint_is_of_content_not_of_place(tmp_path):
    first, second = (model_folder(tmp_path / name, 1000) for name in ("one", "two"))
    (second / "README.md").write_text("says nothing of images")
    assert fingerprint(first) == fingerprint(second)


def test_a_file_named_itself_counts_whatever_it_is_called(tmp_path):
    seen = set()
    for content in (b"one", b"two"):
        for name in ("adapter.pt", "adapter.ckpt", "adapter"):
            (tmp_path / name).write_bytes(content)
            seen.add(fingerprint(tmp_path / name))
    assert len(seen) == 6


@pytest.mark.parametrize(("size", "changed"), [(1000, 0), (1000, 999), (3 * 2**20, 2**20 + 7), (40 * 2**20, 5 << 19)])
def test_one_byte_changes_the_fingerprint(tmp_path, size, changed):
    folder = model_folder(tmp_path / "model", size)
    before = fingerprint(folder)
    with (folder / "unet" / "a.safetensors").open("r+b") as file:
        file.seek(changed)
        file.write(b"\1")
    assert fingerprint(folder) != before


def test_name_size_and_linked_folders_count(tmp_path):
    folder = model_folder(tmp_path / "model", 1000)
    seen = {fingerprint(folder)}
    (folder / "unet" / "a.safetensors").write_bytes(bytes(1001))
    seen.add(fingerprint(folder))
    (folder / "unet" / "a.safetensors").rename(folder / "unet" / "b.safetensors")
    seen.add(fingerprint(folder))
    model_folder(tmp_path / "other", 5)
    (folder / "vae").symlink_to(tmp_path / "other" / "unet")
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_a_png_says_what_it_is(tmp_path):
    save_png(RED, tmp_path / "a.png", {"prompt": "人 \n 🙂", "settings": {"b": 1, "a": None}})
    found = read_metadata(tmp_path / "a.png")
    assert found["prompt"] == "人 \n 🙂"
    assert json.loads(found["settings"]) == {"a": None, "b": 1}
    assert found["AI-generated"] == "true"
    assert "cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" in found["XML:com.adobe.xmp"]


def test_an_image_saved_from_python_says_what_it_is(tmp_path):
    save_image(RED, str(tmp_path / "a.PNG"), prompt="in the snow", seed=3)
    found = read_metadata(tmp_path / "a.PNG")
    assert (found["AI-generated"], found["prompt"], found["seed"]) == ("true", "in the snow", "3")
    with pytest.raises(InputError, match=r"a\.jpg is no PNG"):
        save_image(RED, tmp_path / "a.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]


def test_a_cut_or_zeroed_png_is_not_whole(tmp_path):
    whole = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    save_png(Image.fromarray(noise), whole, {"prompt": "x" * 500})
    content = whole.read_bytes()
    assert is_whole(whole)
    damaged = tmp_path / "b.png"
    for length in (*range(0, len(content), 97), len(content) - 13):
        damaged.write_bytes(content[:length])
        assert not is_whole(damaged), length
        damaged.write_bytes(content[:length].ljust(len(content), b"\0"))
        assert not is_whole(damaged), length


def test_small_images_stay_as_they_are_without_a_watermark():
    assert watermark(RED) is RED


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (640, 512)])
def test_the_watermark_is_read_by_sdxls_detectors(size):
    imwatermark = pytest.importorskip("imwatermark")
    from diffusers.pipelines.stable_diffusion_xl.watermark import WATERMARK_BITS

    marked = np.asarray(watermark(Image.fromarray(photos.astronaut()).resize(size)))
    bgr = np.ascontiguousarray(marked[..., ::-1])
    found = np.array(imwatermark.WatermarkDecoder("bits", 48).decode(bgr, "dwtDct"), int)
    # Measured: 48 of 48 at each size; without a watermark 21 to 23.
    assert (found == WATERMARK_BITS).sum() >= 44


def test_the_grid_keeps_labels_and_pictures_apart():
    """Whatever the labels say, the pictures stand whole, and the end of a long label (its seed) is kept."""
    cells = [[RED, RED.rotate(90, expand=True), RED] for _ in range(2)]
    head = Image.new("RGB", (100, 100), (0, 0, 255))
    plain = np.asarray(labelled_grid(cells, ["", ""], [head] * 3))
    long = np.asarray(labelled_grid(cells, ["word " * 300 + "\nseed 7", "W" * 2000 + "\nseed 7"], [head] * 3))
    short = np.asarray(labelled_grid(cells, ["x", "x"], [head] * 3))
    assert plain.shape == (132 + 2 * 260, 256 + 3 * 260, 3)
    np.testing.assert_array_equal(long[:, 252:], plain[:, 252:])
    np.testing.assert_array_equal(long[:132], plain[:132])
    ink = (long[:, :252] < 128).any(axis=(1, 2))
    assert ink[132:388].any()
    assert ink[394:].any()
    assert not ink[388:394].any()
    assert (short[:, :252] < 128).any()


def test_a_grid_of_one_picture_needs_no_head():
    assert labelled_grid([[RED]], ["a"]).size == (516, 260)


SETTINGS = {"steps": 2, "step_range": (0, None)}
ROWS = [Row("a", 0, 0), Row("a", 0, 1), Row("b", 1, 0)]


@pytest.fixture
def run(tmp_path) -> OutputFolder:
    """A finished run of two columns."""
    folder = OutputFolder(tmp_path / "out", SETTINGS, 2)
    assert folder.missing(ROWS, overwrite=False) == ROWS
    assert not folder.path.exists()
    folder.prepare(ROWS)
    assert names(folder.path) == set()
    for row in ROWS:
        folder.save(row, [RED, RED])
    folder.finish(ROWS, [RED, RED])
    return folder


def test_a_finished_run_misses_nothing(run):
    assert run.missing(ROWS, overwrite=False) == []
    assert run.missing(ROWS, overwrite=True) == []
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["ai_generated"] is True
    assert manifest["settings"] == {"steps": 2, "step_range": [0, None]}
    assert [(image["prompt"], image["seed"], image["identity"]) for image in manifest["images"]] == [
        (row.prompt, row.seed, column) for row in ROWS for column in range(2)
    ]
    files = {image["file"] for image in manifest["images"]} | set(manifest["grids"]) | {"manifest.json"}
    assert files == names(run.path)


def test_more_seeds_or_prompts_go_on(run):
    more = [*ROWS, Row("b", 1, 1), Row("c", 2, 0)]
    assert run.missing(more, overwrite=False) == more[3:]


@pytest.mark.parametrize("damage", ["cut", "zeros", "absent", "empty"])
def test_what_a_crash_left_is_drawn_again(run, damage):
    path = run.path / ROWS[1].file(1)
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-30], "zeros": bytes(len(content)), "empty": b""}[damage])
    assert run.missing(ROWS, overwrite=False) == [ROWS[1]]


def test_what_others_wrote_is_left_alone(tmp_path):
    """A manifest of a web application, a picture of a grid: refused, unless they may be replaced; others never."""
    run = OutputFolder(tmp_path, SETTINGS, 2)
    (tmp_path / "manifest.json").write_text('{"name": "an application"}')
    (tmp_path / "gridlock.png").write_bytes(b"a holiday")
    with pytest.raises(InputError, match=r"manifest\.json was not written by this program"):
        run.missing(ROWS, overwrite=False)
    assert names(tmp_path) == {"manifest.json", "gridlock.png"}
    run.missing(ROWS, overwrite=True)
    run.prepare(ROWS)
    assert names(tmp_path) == {"gridlock.png"}


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (SETTINGS | {"steps": 3}, ROWS),
        (SETTINGS | {"steps": 3}, [Row("a", 0, 9)]),  # no name in common, yet one folder is one run
        (SETTINGS, [Row("other", 0, 0)]),
    ],
)
def test_another_run_is_refused_or_replaced(run, settings, rows):
    other = OutputFolder(run.path, settings, 2)
    before = names(run.path)
    with pytest.raises(InputError, match=r"is of another run.*--output-dir.*--overwrite"):
        other.missing(rows, overwrite=False)
    assert names(run.path) == before
    assert other.missing(rows, overwrite=True) == rows
    other.prepare(rows)
    assert "manifest.json" not in names(run.path)
    for row in rows:
        other.save(row, [RED, RED])
    other.finish(rows, [])
    for path in run.path.glob("prompt*.png"):
        assert json.loads(read_metadata(path)["settings"])["steps"] == settings["steps"]


def test_a_picture_of_somebody_else_is_not_overwritten(tmp_path):
    folder = OutputFolder(tmp_path, SETTINGS, 1)
    RED.save(tmp_path / ROWS[0].file(0))
    with pytest.raises(InputError, match="another run"):
        folder.missing(ROWS, overwrite=False)


def test_what_a_killed_run_left_half_written_is_removed(run):
    for name in (ROWS[0].file(0), "manifest.json", "grid-2.png", "aligned0-clip.png", "notes"):
        (run.path / f".{name}.4711.partial").touch()
    run.prepare(ROWS)
    assert [path.name for path in run.path.glob(".*")] == [".notes.4711.partial"]


def test_a_folder_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        folder = OutputFolder(place, SETTINGS, 1)
        with pytest.raises(InputError, match=r"cannot be written \(.*file is a file\): choose another"):
            folder.missing(ROWS, overwrite=False)
    with pytest.raises(InputError, match=r"cannot be written \(File name too long\)"):
        OutputFolder(tmp_path / ("x" * 300), SETTINGS, 1).missing(ROWS, overwrite=False)


def test_many_rows_take_several_grids(tmp_path):
    rows = [Row("a", 0, seed) for seed in range(41)]
    folder = OutputFolder(tmp_path, SETTINGS, 1)
    for row in rows:
        folder.save(row, [RED])
    assert [path.name for path in folder.finish(rows, [])] == ["grid.png", "grid-2.png"]
    with Image.open(tmp_path / "grid-2.png") as second:
        assert second.size == (516, 260)
    folder.prepare(rows[:3])  # a smaller run has but one
    assert not (tmp_path / "grid-2.png").exists()


def test_a_thumbnail_is_the_picture_on_white(tmp_path):
    save_png(RED, tmp_path / "a.png", {})
    small = np.asarray(thumbnail(tmp_path / "a.png", size=32))
    assert small.shape == (32, 32, 3)
    np.testing.assert_array_equal(small[16, 16], [255, 0, 0])
    np.testing.assert_array_equal(small[0, 16], [255, 255, 255])


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """As on a user's machine where nothing was said about JAX's cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_where_caches_belong(no_cache, tmp_path):
    keep_compiled()
    folder = no_cache / "infinite_id_jax" / "compiled"
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    keep_compiled(tmp_path / "other")  # what was said first stands
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_compiled_programs_are_not_kept_where_nothing_can_be_written(no_cache):
    no_cache.touch()
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
