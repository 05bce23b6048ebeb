"""sample.py as a user meets it: what it refuses and how, what it writes, and how it goes on."""

import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from infinite_id_jax.faces import backends
from infinite_id_jax.faces.extract import extract_face
from infinite_id_jax.faces.mtcnn_dlib import MTCNNDlib
from infinite_id_jax.faces.photo import open_photo
from infinite_id_jax.images import read_metadata
from infinite_id_jax.weights.folder import load_base
from infinite_id_jax.weights.save_base import save_single_file
from tests import photos, published
from tests.conftest import write_small_adapter
from tests.reference_torch import TWO_LEVELS, tiny_sdxl_unet

SCRIPT = Path(sample.__file__)
PROMPTS = ("a man in the snow", "ein Förster, 人 🙂")


@pytest.fixture(scope="module")
def place(small, tmp_path_factory) -> Path:
    """A user's folder: photos, an adapter for the offline face backend, a model."""
    folder = tmp_path_factory.mktemp("user's place")
    write_small_adapter(folder / "adapter", clip_dim=32, face_dim=128)
    (folder / "model").symlink_to(small.model)
    Image.fromarray(photos.astronaut()[0:300, 70:370]).save(folder / "Eileen Collins ü.png")
    Image.fromarray(photos.photographer()[40:340, 80:380]).save(folder / "him.png")
    Image.fromarray(photos.group()).save(folder / "family.png")
    Image.fromarray(photos.without_face()).save(folder / "coffee.jpg")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_pipeline():
    """Compile once: every run of this module shares the pipeline of the same model, adapter and dtype."""
    load = sample.load_pipeline
    cache: dict[tuple[str, ...], object] = {}

    @functools.wraps(load)
    def loaded(args, model):
        key = (str(model), args.adapter, args.dtype, args.quantization)
        if key not in cache:
            cache[key] = load(args, model)
        return cache[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "load_pipeline", loaded)
        yield


@pytest.fixture(scope="module", autouse=True)
def faces_found_once():
    """The same few photos are looked at in every test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("detect", "embed"):
            patch.setattr(MTCNNDlib, name, _remembered(getattr(MTCNNDlib, name)))
        patch.setattr(backends, "get_backend", functools.cache(backends.get_backend))
        yield


def _remembered(method):
    known = {}

    @functools.wraps(method)
    def call(self, image):
        key = (image.shape, image.tobytes())
        if key not in known:
            known[key] = method(self, image)
        return known[key]

    return call


def arguments(place: Path, out: Path, *options: str) -> list[str]:
    """A command that works; later options override."""
    models = ("--model", str(place / "model"), "--adapter", str(place / "adapter"), "--faces", "offline")
    size = ("--steps", "2", "--height", "64", "--width", "64")
    if "--id-image" not in options:
        options = ("--id-image", str(place / "Eileen Collins ü.png"), *options)
    if not {"--prompt", "--prompts-file"} & set(options):
        options = ("--prompt", PROMPTS[0], *options)
    return [*models, *size, "--output-dir", str(out), *options]


def refused(capsys, argv: list[str], code: int = 2) -> str:
    """The one sentence after "error: " of a command that is refused."""
    assert sample.main(argv) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].endswith((".", ")"))
    assert "defect" not in errors[0]
    return errors[0]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# Usage


def test_help_needs_nothing_heavy():
    """What makes --help come in a blink; jax alone takes a second to import."""
    code = (
        "import sys, sample\n"
        "try:\n    sample.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'numpy', 'cv2', 'dlib', 'PIL', 'torch'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--id-image PHOTO" in done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step-range", "abc"], "--step-range: 'abc' is not of the form A:B"),
        (["--layer-range", "1:2:3"], "--layer-range: '1:2:3' is not of the form A:B"),
        (["--steps", "many"], "--steps: invalid int value"),
        (["--id-mode", "blend"], "--id-mode: invalid choice"),
        (["--prompts-file", "a.txt", "--prompt", "a"], "not allowed with argument"),
        (["--stepz", "3"], "unrecognized arguments"),
    ],
)
def test_bad_usage_exits_with_2(capsys, place, tmp_path, options, says):
    with pytest.raises(SystemExit) as end:
        sample.main(arguments(place, tmp_path / "out", *options))
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "  "], "--prompt is empty: say what to draw"),
        (["--prompt", "a\udcff"], "not valid Unicode"),
        (["--negative-prompt", "a\udcff"], "not valid Unicode"),
        (["--num-images", "0"], "--num-images 0 is too small"),
        (["--steps", "0"], "--steps 0 is too small"),
        (["--steps", "-3"], "--steps -3 is too small"),
        (["--batch-size", "0"], "--batch-size 0 is too small"),
        (["--height", "100"], "--height 100 is not a multiple of 8: take 96"),
        (["--height", "400000"], "--height 400000 is more than 8192"),
        (["--width", "-8"], "--width -8 is not a multiple of 8: take 8"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--seed", str(2**32)], "out of range: seeds lie between 0 and 4294967295"),
        (["--seed", str(2**32 - 1), "--num-images", "2"], "4294967296 is out of range"),
        (["--guidance-scale", "nan"], "--guidance-scale is nan: give a finite number"),
        (["--id-scale", "inf"], "--id-scale is inf: give a finite number"),
        (["--guidance-rescale", "1.5"], "--guidance-rescale 1.5 is out of range"),
        (["--id-weights", "0.4"], "--id-weights sum to 0.4: make them sum to 1"),
        (["--id-weights", "nan"], "--id-weights sum to nan"),
        (["--id-weights", ".5", ".5"], "2 numbers for 1 photos"),
        (["--id-weights", "1", "--id-mode", "grid"], "has no meaning in a grid"),
        (["--faces", "eigenfaces"], "no face backend `eigenfaces`: choose one of auto"),
    ],
)
def test_a_senseless_value_is_named_with_its_option(capsys, place, tmp_path, options, says):
    assert says in refused(capsys, arguments(place, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scheduler", "unipc"], "Unknown scheduler 'unipc': choose one of ddim, euler, dpm++"),
        (["--steps", "5000"], "5000 steps were asked for: choose 1 to 1000"),
        (["--step-range", "5:2"], "--step-range 5:2 is no range: give A:B"),
        (["--attention", "on"], "Unknown attention 'on': choose from mixed, mutual, off"),
        (["--mesh", "lots"], "The mesh 'lots' is not of the form data=1"),
        (["--mesh", "data=99"], "needs 99 devices"),
        (["--quantization", "int4"], "Unknown quantization 'int4': choose from none, int8, float8"),
        (["--dtype", "float8"], "--dtype float8 is unknown: choose auto, float32"),
        (["--dtype", "float16"], "float16 does not run on a CPU"),
        (["--step-range", "50:"], "step_range begins at 50 and there are"),
        (["--face-index", "4"], "Eileen Collins ü.png: There is no face 4: the photo has 1"),
        (["--face-index", "0", "1"], "--face-index has 2 numbers for 1 photos: give one for all, or one for each."),
        (["--model", "nowhere"], "The model folder nowhere does not exist"),
        (["--adapter", "nowhere"], "The adapter folder nowhere does not exist"),
        (["--image-encoder", "nowhere"], "no CLIP image encoder at nowhere: name its folder with --image-encoder"),
    ],
)
def test_what_does_not_fit_is_found_before_weights_are_loaded(capsys, place, tmp_path, options, says):
    assert says in refused(capsys, arguments(place, tmp_path / "out", *options, "--dry-run"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\n  \r\n\n", "ein Förster".encode("utf-16"), None])
def test_a_prompts_file_without_prompts_is_refused(capsys, place, tmp_path, content):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    argv = arguments(place, tmp_path / "out", "--prompts-file", str(tmp_path / "list.txt"))
    assert "--prompts-file" in refused(capsys, argv)


def test_a_prompts_file_of_windows_is_read(place, tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa man\r\n\r\n  ein Förster  \r\n".encode())
    argv = arguments(place, tmp_path / "out", "--prompts-file", str(tmp_path / "list.txt"))
    assert sample.read_prompts(sample.parser().parse_args(argv)) == ["a man", "ein Förster"]


# Photos


@pytest.mark.parametrize("kind", photos.BAD_FILES)
def test_a_bad_photo_is_named_with_its_trouble(capsys, place, tmp_path, kind):
    make, says = photos.BAD_FILES[kind]
    photo = make(tmp_path)
    error = refused(capsys, arguments(place, tmp_path / "out", "--id-image", str(photo)))
    assert photo.name in error
    assert says in error


def test_a_photo_without_a_face_exits_with_3(capsys, place, tmp_path):
    argv = arguments(place, tmp_path / "out", "--id-image", str(place / "coffee.jpg"))
    assert "coffee.jpg: No face was found" in refused(capsys, argv, code=3)


def test_a_group_is_warned_of_and_face_index_chooses(capsys, place, tmp_path):
    argv = arguments(place, tmp_path / "out", "--id-image", str(place / "family.png"), "--dry-run")
    assert sample.main(argv) == 0
    captured = capsys.readouterr()
    assert "warning: family.png: The photo has 3 faces" in captured.err
    assert "--face-index 0 to 2" in captured.err
    assert sample.main([*argv, "--face-index", "2"]) == 0
    chosen = capsys.readouterr()
    assert "warning" not in chosen.err
    assert "face 2 of 3" in chosen.out
    assert sample.main([*argv, "--id-image", str(place / "family.png"), "--face-index", "1", "0"]) == 0
    assert re.findall(r"face \d of 3", capsys.readouterr().out) == ["face 1 of 3", "face 0 of 3"]


# Models


@pytest.fixture
def own_model(place, tmp_path) -> Path:
    return shutil.copytree((place / "model").resolve(), tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"])
def test_a_cut_weight_file_is_found_before_any_is_loaded(capsys, place, tmp_path, own_model, part):
    weights = next((own_model / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    error = refused(capsys, arguments(place, tmp_path / "out", "--model", str(own_model), "--dry-run"))
    assert f"{part}/{weights.name} is not a whole safetensors file" in error


def test_a_missing_shard_is_named(capsys, place, tmp_path, own_model):
    name = "diffusion_pytorch_model"
    (own_model / "unet" / f"{name}.safetensors").rename(own_model / "unet" / f"{name}-00001-of-00002.safetensors")
    weight_map = {"a": f"{name}-00001-of-00002.safetensors", "b": f"{name}-00002-of-00002.safetensors"}
    (own_model / "unet" / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    error = refused(capsys, arguments(place, tmp_path / "out", "--model", str(own_model), "--dry-run"))
    assert f"misses the weight shards {name}-00002-of-00002.safetensors" in error


def test_a_model_without_image_encoder_is_found_early(capsys, place, tmp_path, own_model):
    shutil.rmtree(own_model / "image_encoder")
    argv = arguments(place, tmp_path / "out", "--model", str(own_model), "--dry-run")
    assert "no CLIP image encoder" in refused(capsys, argv)
    assert sample.main([*argv, "--image-encoder", str(place / "model" / "image_encoder")]) == 0


@pytest.mark.parametrize(
    ("widths", "says"),
    [
        ({"face_dim": 512}, "face embeddings of 512 numbers"),
        ({"clip_dim": 1664, "face_dim": 128}, "CLIP image encoder of width 1664"),
    ],
)
def test_an_adapter_of_other_encoders_is_refused(capsys, place, tmp_path, widths, says):
    folder = write_small_adapter(tmp_path / "adapter", **({"clip_dim": 32} | widths))
    assert says in refused(capsys, arguments(place, tmp_path / "out", "--adapter", str(folder), "--dry-run"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cross_attention_dim": 2048}, "cross-attention width 2048"),
        ({"face_dim": 512}, "256x128 instead of 256x512"),
        ({"format": "ip_adapter"}, "is no identity adapter of a known family"),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_refused(capsys, place, tmp_path, change, says):
    folder = shutil.copytree(place / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    assert says in refused(capsys, arguments(place, tmp_path / "out", "--adapter", str(folder), "--dry-run"))


def test_a_cut_adapter_is_refused(capsys, place, tmp_path):
    folder = shutil.copytree(place / "adapter", tmp_path / "adapter")
    (folder / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes()[:-100])
    argv = arguments(place, tmp_path / "out", "--adapter", str(folder), "--dry-run")
    assert "adapter.safetensors is not a whole safetensors file" in refused(capsys, argv)


# Output


def test_an_output_folder_that_cannot_be_is_refused_before_weights_are_loaded(capsys, place, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "cannot be written" in refused(capsys, arguments(place, out))
        assert "cannot be written" in refused(capsys, arguments(place, out, "--dry-run"))
    argv = arguments(place, tmp_path / ("x" * 300))
    assert "(File name too long)" in refused(capsys, argv)
    assert "(File name too long)" in refused(capsys, [*argv, "--dry-run"])


def test_a_dry_run_writes_nothing_and_says_what_would_be(capsys, place, tmp_path):
    """A prompt of 300 tokens goes on, and the words that are cut are said."""
    long = " ".join(f"w{i}" for i in range(300))
    options = ("--prompt", long, "--prompt", "b", "--num-images", "3", "--negative-prompt", "x " * 200)
    two = ("--id-image", str(place / "him.png"), "--id-image", str(place / "him.png"))
    argv = arguments(place, tmp_path / "out", *options, *two, "--dry-run")
    assert sample.main(argv) == 0
    captured = capsys.readouterr()
    assert "2 prompts x 3 seeds x 1 identities = 6 images, 6 of them to be drawn" in captured.out
    warnings = [line for line in captured.err.splitlines() if "too long" in line]
    assert len(warnings) == 2
    assert warnings[0].endswith("w298 w299")
    assert "w0" not in warnings[0].split("cut: ")[1].split()
    assert sample.main([*argv, "--id-mode", "grid"]) == 0
    assert "x 2 identities = 12 images" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def command(place):
    """Two people, two prompts, two seeds."""
    two = ("--id-image", str(place / "Eileen Collins ü.png"), "--id-image", str(place / "him.png"))
    prompts = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    options = (*two, *prompts, "--id-mode", "grid", "--num-images", "2", "--seed", "3", "--save-aligned")
    return functools.partial(arguments, place), options


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    argv, options = command
    out = tmp_path_factory.mktemp("finished") / "out put"
    assert sample.main(argv(out, *options)) == 0
    return out


@pytest.fixture
def again(command, finished, tmp_path):
    """A copy of the finished run, and the command that made it."""
    argv, options = command
    out = shutil.copytree(finished, tmp_path / "again")
    return out, argv(out, *options)


def test_a_run_writes_all_it_says(finished, place):
    manifest = json.loads((finished / "manifest.json").read_text(encoding="utf-8"))
    images = [f"prompt00{p}-seed{s}-id{m}.png" for p in (0, 1) for s in (3, 4) for m in (0, 1)]
    crops = {f"aligned{i}-{kind}.png" for i in (0, 1) for kind in ("clip", "recogniser")}
    assert [image["file"] for image in manifest["images"]] == images
    assert {path.name for path in finished.iterdir()} == {*images, *crops, "grid.png", "manifest.json"}
    found = read_metadata(finished / images[-1])
    assert (found["prompt"], found["seed"], found["AI-generated"]) == (PROMPTS[1], "4", "true")
    assert "trainedAlgorithmicMedia" in found["XML:com.adobe.xmp"]
    settings = json.loads(found["settings"])
    assert settings == manifest["settings"]
    assert {key: settings[key] for key in ("steps", "height", "scheduler", "dtype")} == {
        "steps": 2,
        "height": 64,
        "scheduler": "ddim",
        "dtype": "float32",
    }
    assert all(len(settings[key]) == 16 for key in ("model", "adapter", "image_encoder"))
    assert pixels(finished / images[0]).shape == (64, 64, 3)
    assert np.abs(pixels(finished / images[0]) - pixels(finished / images[2])).max() > 10


def test_nothing_tells_where_the_photos_were(finished, place):
    secrets = ("Eileen", "Collins", "him.png", str(place), "user's place")
    forms = [form for secret in secrets for form in (secret.encode(), json.dumps(secret)[1:-1].encode())]
    for name, (content, _) in contents(finished).items():
        assert not [form for form in forms if form in content], name


def test_the_grid_shows_the_faces_over_their_columns(finished):
    grid = pixels(finished / "grid.png")
    assert grid.shape == (132 + 4 * 260, 256 + 2 * 260, 3)
    for column in (0, 1):
        with Image.open(finished / f"aligned{column}-clip.png") as crop:
            head = np.asarray(crop.resize((128, 128), Image.Resampling.LANCZOS)).astype(int)
        x = 256 + column * 260 + 64
        np.testing.assert_array_equal(grid[:128, x : x + 128], head)
        with Image.open(finished / f"prompt001-seed3-id{column}.png") as image:
            cell = np.asarray(image.resize((256, 256), Image.Resampling.LANCZOS)).astype(int)
        np.testing.assert_array_equal(grid[132 + 520 :][:256, x - 64 : x + 192], cell)


def test_the_same_command_draws_nothing_again(capsys, again):
    out, argv = again
    before = contents(out)
    assert sample.main(argv) == 0
    assert "8 images, 0 of them to be drawn" in capsys.readouterr().out
    after = contents(out)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    drawn = [name for name in before if name.startswith("prompt")]
    assert all(before[name][1] == after[name][1] for name in drawn)


def test_damaged_and_missing_images_alone_are_drawn_again(capsys, again):
    out, argv = again
    before = contents(out)
    cut = out / "prompt000-seed4-id1.png"
    cut.write_bytes(before[cut.name][0][:-2000])
    (out / "prompt001-seed3-id0.png").unlink()
    assert sample.main(argv) == 0
    assert "4 of them to be drawn" in capsys.readouterr().out
    for name in before:
        if name.startswith("prompt"):
            redrawn = "prompt000-seed4" in name or "prompt001-seed3" in name
            assert redrawn == (before[name][1] != (out / name).stat().st_mtime_ns)
            # The same program on the same numbers; measured: 0.
            assert np.abs(pixels(out / name) - pixels_of(before[name][0])).max() <= 1


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def test_another_run_is_refused_and_overwrite_replaces_it(capsys, again, place):
    out, argv = again
    before = contents(out)
    other = [*argv, "--id-scale", "0.5"]
    error = refused(capsys, other)
    assert "is of another run" in error
    assert "--overwrite" in error
    assert contents(out) == before
    assert sample.main([*other, "--overwrite"]) == 0
    settings = {json.loads(read_metadata(path)["settings"])["id_scale"] for path in out.glob("prompt*")}
    assert settings == {0.5}


def test_an_image_alone_is_the_image_of_a_larger_run(command, place, finished, tmp_path):
    """Drawn without the other person, prompt and seed; and an interpolation of weight 1 is that person too."""
    argv, _ = command
    options = ("--id-image", str(place / "Eileen Collins ü.png"), "--prompt", PROMPTS[1], "--seed", "4")
    assert sample.main(argv(tmp_path / "alone", *options)) == 0
    alone = pixels(tmp_path / "alone" / "prompt000-seed4-id0.png")
    # Measured: 0 of 255.
    assert np.abs(alone - pixels(finished / "prompt001-seed4-id0.png")).max() <= 1
    weights = ("--id-image", str(place / "him.png"), "--id-weights", "1", "0")
    assert sample.main(argv(tmp_path / "mix", *options, *weights)) == 0
    assert [path.name for path in sorted((tmp_path / "mix").iterdir())] == [
        "grid.png",
        "manifest.json",
        "prompt000-seed4-id0.png",
    ]
    assert np.abs(alone - pixels(tmp_path / "mix" / "prompt000-seed4-id0.png")).max() <= 1


METHOD = (
    *("--style-merge", "adain_mean", "--text-stream", "shared", "--pooled-text", "zeros", "--text-scale", "0.7"),
    *("--id-scale", "0.8", "--negative-prompt", "a dog", "--guidance-scale", "3", "--guidance-rescale", "0.5"),
    *("--guidance-range", "1:", "--scheduler", "euler", "--step-range", "0:2", "--layer-range", "1:3"),
    *("--cache-interval", "2", "--steps", "3", "--width", "128"),
)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (
            METHOD,
            {
                **{"style_merge": "adain_mean", "text_stream": "shared", "pooled_text": "zeros", "text_scale": 0.7},
                **{"id_scale": 0.8, "negative_prompt": "a dog", "guidance_scale": 3.0, "guidance_rescale": 0.5},
                **{"guidance_range": (1, None), "scheduler": "euler", "step_range": (0, 2), "layer_range": (1, 3)},
                **{"cache_interval": 2, "steps": 3, "width": 128},
            },
        ),
        (("--attention", "mutual", "--no-cross-merge"), {"attention": "mutual", "cross_merge": False}),
    ],
    ids=["many", "without the merge"],
)
def test_every_option_of_the_method_reaches_the_pipeline(place, tmp_path, given, asked):
    """Three seeds in batches of two, the last of which is filled up."""
    argv = arguments(place, tmp_path / "out", *given, "--num-images", "3", "--batch-size", "2", "--seed", "5")
    assert sample.main(argv) == 0
    args = sample.parser().parse_args(argv)
    pipe = sample.load_pipeline(args, place / "model")
    person = pipe.encode_identity(sample.find_faces(args)[0])
    options = {"steps": 2, "height": 64, "width": 64, "progress": lambda step: None} | asked
    for seeds, names in (([5, 6], (5, 6)), ([7, 7], (7,))):
        images = pipe([PROMPTS[0]] * 2, person, seed=seeds, **options).images
        for seed, image in zip(names, images, strict=False):
            drawn = pixels(tmp_path / "out" / f"prompt000-seed{seed}-id0.png")
            assert drawn.shape == (options["height"], options["width"], 3)
            np.testing.assert_array_equal(drawn, np.asarray(image))


# Processes


def process(argv: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_an_interrupted_run_goes_on_where_it_stopped(place, tmp_path):
    out = tmp_path / "out"
    run = process(arguments(place, out, "--num-images", "500"))
    while not list(out.glob("*.png")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130
    assert "Interrupted: the same command goes on from here." in err
    assert "Traceback" not in err
    before = contents(out)
    assert 0 < len(before) < 500
    assert {path.suffix for path in out.iterdir()} == {".png"}  # no manifest.json, no half-written file
    assert "grid.png" not in before
    assert sample.main(arguments(place, out, "--num-images", str(len(before) + 1))) == 0
    after = contents(out)
    assert len(after) == len(before) + 3  # one image, the grid and the manifest
    assert all(after[name] == before[name] for name in before)


def test_a_process_fails_in_one_line_and_debug_shows_where(place, tmp_path):
    """Also where the terminal knows no umlauts, and with a file name that is not UTF-8."""
    photo = os.fsencode(tmp_path) + b"/b\xff.png"
    shutil.copy(place / "coffee.jpg", photo)
    argv = arguments(place, tmp_path / "out", "--id-image", os.fsdecode(photo))
    run = process(argv, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = run.communicate()
    assert run.returncode == 3
    assert "Traceback" not in out + err
    run = process([*argv, "--debug"])
    _, err = run.communicate()
    assert run.returncode == 3
    assert "Traceback" in err
    assert "error: " in err.splitlines()[-1]


def test_odd_file_names_can_be_printed(place, tmp_path):
    photo = os.fsencode(tmp_path) + b"/b\xff.png"
    shutil.copy(place / "him.png", photo)
    argv = arguments(place, tmp_path / "out", "--id-image", os.fsdecode(photo), "--dry-run")
    run = process(argv, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    _, err = run.communicate()
    assert run.returncode == 0, err


# Files from elsewhere


@pytest.fixture(scope="module")
def elsewhere(small, tmp_path_factory) -> Path:
    """What a user has downloaded: a single-file model, a FaceID-Plus for the offline face backend, a LoRA."""
    folder = tmp_path_factory.mktemp("downloads")
    (folder / "image_encoder").symlink_to(small.model / "image_encoder")
    save_single_file(load_base(small.model), folder / "model.safetensors")
    unet, sizes = tiny_sdxl_unet(levels=TWO_LEVELS), dataclasses.replace(published.TINY, face=128)
    published.write("faceid_plusv2", folder, published.random_state("faceid_plusv2", unet, sizes))
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{key}.lora_A.weight": torch.ones(1, 64), f"{key}.lora_B.weight": torch.ones(64, 1)}
    save_file(lora, folder / "style=flat.safetensors")
    return folder


def test_files_from_elsewhere_draw(capsys, place, elsewhere, tmp_path):
    model = ("--model", str(elsewhere / "model.safetensors"), "--model-config", str(place / "model"))
    adapter = ("--adapter", str(elsewhere / published.FILES["faceid_plusv2"]))
    scale = ("--id-scale", '{"mid": 1, "up": {"block_0": [0, 1]}}')
    options = (*model, *adapter, *scale, "--streams", "one", "--quantization", "int8", "--save-aligned")
    lora = ("--lora", f"{elsewhere / 'style=flat.safetensors'}=0.5")
    assert sample.main(arguments(place, tmp_path / "out", *options, *lora)) == 0
    assert "IP-Adapter-FaceID-Plus V2: sees the penultimate hidden states" in capsys.readouterr().out
    crop = Image.open(tmp_path / "out" / "aligned0-clip.png")
    face = extract_face(open_photo(place / "Eileen Collins ü.png"), backends.get_backend("offline"))
    np.testing.assert_array_equal(np.asarray(crop), face.arcface_crop)
    (drawn,) = (tmp_path / "out").glob("prompt000-*.png")
    assert json.loads(read_metadata(drawn)["settings"])["quantization"] == "int8"

    # Another strength of the LoRA, another file of the adapter: other images, which the first must not stand for.
    other = ("--lora", str(elsewhere / "style=flat.safetensors"))
    assert "is of another run" in refused(capsys, arguments(place, tmp_path / "out", *options, *other))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--id-scale", '{"down": {"block_0": 1}}'), "down_blocks.0, which has no cross-attention"),
        (("--streams", "one", "--attention", "mutual"), "attention concerns the text stream"),
        (("--lora", "nowhere.safetensors"), "nowhere.safetensors is missing"),
        (("--model-config", "."), "is a folder with configurations of its own"),
        (("--lora", "a.safetensors", "--lora", "./a.safetensors=0.5"), "a.safetensors is named twice"),
        (("--lora", "a.safetensors=inf"), "The scale of --lora a.safetensors is inf"),
    ],
)
def test_what_does_not_go_together_is_refused_early(capsys, place, tmp_path, options, says):
    assert says in refused(capsys, arguments(place, tmp_path / "out", *options, "--dry-run"))


def test_a_dry_run_holds_every_key_against_the_model(capsys, place, elsewhere, tmp_path):
    """An adapter that lacks a layer, and a LoRA of another base, before minutes of loading."""
    folder = shutil.copytree(place / "adapter", tmp_path / "adapter")
    state = load_file(folder / "adapter.safetensors")
    del state["ip_adapter.7.to_k_ip.weight"]
    save_file(state, folder / "adapter.safetensors")
    argv = arguments(place, tmp_path / "out", "--adapter", str(folder), "--dry-run")
    assert "1 missing: ip_adapter.7.to_k_ip.weight" in refused(capsys, argv)

    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    old = {f"{stem}_A.weight": torch.ones(1, 768), f"{stem}_B.weight": torch.ones(64, 1)}
    save_file(old, tmp_path / "old.safetensors")
    argv = arguments(place, tmp_path / "out", "--lora", str(tmp_path / "old.safetensors"), "--dry-run")
    assert "is a LoRA for SD 1.5" in refused(capsys, argv)
    assert not (tmp_path / "out").exists()
