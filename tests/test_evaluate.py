"""evaluate.py from a configuration to a report, in a little world: plain pictures, judged by their mean colours."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from configs.base import load_study
from infinite_id_jax import InfiniteIDPipeline
from infinite_id_jax.errors import InputError
from infinite_id_jax.evaluation.metrics import interval, kid
from infinite_id_jax.evaluation.study import Claim, Method, StudyConfig
from infinite_id_jax.evaluation.world import Person, Prompt, Seen, World
from infinite_id_jax.faces.protocol import Face, FaceBackend
from infinite_id_jax.images import read_metadata, shrunk
from tests.conftest import write_small_adapter

ROOT = Path(__file__).parent.parent
SIZE = 64
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "yellow": (200, 200, 40)}
SCENES = {"day": (230, 230, 210), "night": (20, 20, 50)}
LOOKS = ("red", "green", "blue", "yellow", "red")


def plain(look: str, scene: str, shade: int = 0) -> np.ndarray:
    """Somebody is a square in their colour, before a scene."""
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = SCENES[scene]
    image[16:48, 16:48] = np.clip(np.array(COLOURS[look]) + shade, 0, 255)
    return image


def nearest(colour: np.ndarray, among: dict[str, tuple[int, int, int]]) -> str:
    return min(among, key=lambda name: float(np.abs(colour - np.array(among[name])).sum()))


class LittleFaces:
    """Finds the square in the middle, unless all of it is dark, and knows it by its colours."""

    name = "little"
    embedding_dim = 16

    def detect(self, photo):
        height, width = photo.shape[:2]
        middle = photo[height // 4 : -height // 4, width // 4 : -width // 4]
        if middle.max() < 150:  # the grey border of a second try is darker
            return []
        points = np.array([[0.4, 0.4], [0.6, 0.4], [0.5, 0.5], [0.42, 0.6], [0.58, 0.6]]) * [width, height]
        return [Face((0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height), 1.0, points)]

    def align(self, photo, face):
        x0, y0, x1, y1 = map(round, face.box)
        return np.asarray(Image.fromarray(photo[y0:y1, x0:x1]).resize((16, 16)))

    def embed(self, crop):
        return np.resize(np.asarray(crop, np.float32).reshape(-1, 3).mean(0) / 255, 16)


class LittleWorld:
    """Five people, five prompts (photographs and others by turns); what judges see are means of colours."""

    name = "little"
    judges = {"m_face": "the middle", "clip_i": "a part of it", "clip_t": "all of it"}  # noqa: RUF012
    judged = 0  # pictures, by all worlds
    interrupt_at: int | None = None  # this many: a real Ctrl-C

    def people(self, count):
        if count > len(LOOKS):
            raise InputError(f"There are {len(LOOKS)} people: take no more identities than that.")
        found = []
        for i, look in enumerate(LOOKS[:count]):
            photos = [plain(look, "day", shade=5 * i + k) for k in range(4)]
            found.append(Person(f"{i:04}", photos[0], np.stack(photos[1:]), {"colour": look}))
        return found

    def prompts(self, count):
        said = [("day", "photo"), ("night", "drawn"), ("night", "photo"), ("day", "drawn"), ("day", "photo")]
        listed = [Prompt(f"a {style} person by {scene}", style, {"scene": scene}) for scene, style in said]
        if count > len(listed):
            raise InputError(f"There are {len(listed)} prompts: take no more than that.")
        return listed[:count]

    def random_prompts(self, count):
        return (self.prompts(5) * count)[:count]

    def drawn(self, person, prompt):
        return plain(person.look["colour"], prompt.attributes["scene"])

    def judge(self, pictures):
        LittleWorld.judged += len(pictures)
        if LittleWorld.interrupt_at is not None and LittleWorld.judged >= LittleWorld.interrupt_at:
            LittleWorld.interrupt_at = None
            signal.raise_signal(signal.SIGINT)
        found = np.array([bool(LittleFaces().detect(picture)) for picture in pictures])
        colours = pictures.reshape(len(pictures), 4, 16, 4, 16, 3).mean((2, 4)) / 255  # [n, 4, 4, 3]
        face = colours[:, 1:3, 1:3].reshape(len(pictures), -1) - 0.5
        whole = colours.reshape(len(pictures), -1)
        face, whole = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (face, whole))
        features, clip_face = face.copy(), face[:, :6] / np.linalg.norm(face[:, :6], axis=1, keepdims=True)
        for rows in (face, clip_face, features):
            rows[~found] = np.nan
        corner, middle = pictures[:, 2:10, 2:10].mean((1, 2)), pictures[:, 20:44, 20:44].mean((1, 2))
        attributes = {
            "scene": [nearest(colour, SCENES) for colour in corner],
            "colour": [nearest(colour, COLOURS) for colour in middle],
            "style": ["photo" if picture.std() > 40 else "drawn" for picture in pictures],
        }
        return Seen(found, face, clip_face, whole, attributes, features)

    def judge_texts(self, texts):
        rows = np.stack([plain("red", "night" if "night" in text else "day") for text in texts])
        return self.judge(rows).clip

    def asked(self, prompt):
        return {"scene": prompt.attributes["scene"], "style": prompt.style}

    def expected(self, person, prompt):
        return self.asked(prompt), {"colour": person.look["colour"]}

    def chance(self):
        return {"scene": 0.5, "style": 0.5, "colour": 0.4}


class RenamedWorld(LittleWorld):
    name = "another"


class DottedWorld(LittleWorld):
    """The second person's photo is dark but for dots, which go where it is made smaller."""

    name = "dotted"

    def people(self, count):
        dots = np.zeros((SIZE, SIZE, 3), np.uint8)
        dots[::8, ::8] = 255
        found = super().people(count)
        return [found[0], found[1]._replace(photo=dots), *found[2:]]


class DarkWorld(LittleWorld):
    """The second person's photo shows nobody."""

    name = "dark"

    def people(self, count):
        found = super().people(count)
        return [found[0], found[1]._replace(photo=np.ones((SIZE, SIZE, 3), np.uint8)), *found[2:]]


MEAN = {"style_merge": "adain_mean"}


def study_of(model: str, adapters: dict[str, str], world: type[LittleWorld] = LittleWorld) -> StudyConfig:
    return StudyConfig(
        model=model,
        adapters=adapters,
        world=world,
        methods=(
            Method("full", "Infinite-ID", "full", {}, MEAN),
            Method("smaller", "photo of an eighth of the size", "full", {}, None, shrink=8),
            Method("other", "another adapter", "other", {}, {}),
            Method("int8", "with 8-bit products", "full", {}, None, quantization="int8"),
        ),
        claims=(
            Claim("Full keeps more of the face", "m_face", "full", "other"),
            Claim("A mean of means gains style", "prompted_style", "full", "text_only", prompts="style"),
            Claim("An eighth of the size loses little", "m_face", "smaller", "full", -2.5, "photo"),
        ),
        sampling={"steps": 2, "height": SIZE, "width": SIZE, "guidance_scale": 1.0},
        faces=LittleFaces(),
        identities=5,
        prompts=3,
        group=2,  # of five people
        interpolation_weights=(0.0, 1.0),
        base_pictures=3,
        half_way=("colour",),
    )


@pytest.fixture(scope="module")
def config(small, tmp_path_factory) -> Path:
    """A configuration file whose study has two adapters; beside it the same in other worlds."""
    folder = tmp_path_factory.mktemp("study")
    other = write_small_adapter(folder / "other", clip_dim=32, face_dim=16, seed=2)
    adapters = {"full": str(small.adapter), "other": str(other)}
    for world in ("LittleWorld", "RenamedWorld", "DottedWorld", "DarkWorld"):
        text = f"study = little.study_of({str(small.model)!r}, {adapters!r}, little.{world})"
        (folder / f"{world}.py").write_text(f"from tests import test_evaluate as little\n\n{text}\n")
    return folder / "LittleWorld.py"


@pytest.fixture(scope="module", autouse=True)
def calls():
    """Each pipeline is loaded and compiled once for all runs of this module; what was drawn with them, in order."""
    load, call = InfiniteIDPipeline.from_pretrained, InfiniteIDPipeline.__call__
    loaded, drawn = {}, []

    def loading(model, adapter, **more):
        which = adapter, more["quantization"]
        if which not in loaded:
            loaded[which] = load(model, adapter, **more)
        return loaded[which]

    def counted(self, prompts, identities=None, **settings):
        drawn.append((prompts, identities, settings))
        return call(self, prompts, identities, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InfiniteIDPipeline, "from_pretrained", staticmethod(loading))
        patch.setattr(InfiniteIDPipeline, "__call__", counted)
        yield drawn


def run(config, folder, *options):
    return evaluate.main(["--config", str(config), "--output-dir", str(folder), *options])


def refused(capsys, config, folder, *options):
    """The one sentence after "error: "."""
    capsys.readouterr()
    assert run(config, folder, *options) in (2, 3)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].endswith(".")
    assert "defect" not in lines[0]
    assert "Traceback" not in error
    return lines[0]


def results(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory, calls):
    """One whole run, and what the pipelines were asked for."""
    folder = tmp_path_factory.mktemp("outputs") / "finished"
    calls.clear()
    assert run(config, folder) == 0
    return folder, list(calls)


def test_the_world_and_the_faces_are_of_their_protocols():
    assert isinstance(LittleWorld(), World)
    assert isinstance(LittleFaces(), FaceBackend)


def test_metrics_have_the_promised_surface(finished):
    content = results(finished[0])
    assert set(content["methods"]) == {"full", "smaller", "other", "int8", "text_only", "reference_copy", "drawn"}
    assert set(content["methods_photo"]) == set(content["methods"])
    assert set(content["methods_style"]) == set(content["methods"]) - {"smaller", "int8"}
    for metrics in content["methods"].values():
        for name, (value, low, high) in metrics.items():
            assert value is not None, name
            assert low is None or low <= value <= high
        assert {
            "clip_t",
            "found",
            "rank_1",
            "prompted",
            "prompted_scene",
            "identity_colour",
            "identity_attributes",
        } <= set(metrics)
    for entry in content["claims"]:
        value, low, high = entry["difference"]
        assert low <= value <= high
        assert entry["verdict"] in ("confirmed", "not confirmed", "contradicted")
        assert set(entry) - {"note", "no_face_zero"} == {
            "claim", "metric", "first", "second", "bound", "prompts", "difference", "verdict",
        }  # fmt: skip
        assert ("no_face_zero" in entry) == (entry["metric"] in ("m_face", "clip_i"))
    assert [(entry["metric"], entry["first"], entry["second"]) for entry in content["claims"]] == [
        ("m_face", "full", "other"), ("prompted_style", "full", "text_only"), ("m_face", "smaller", "full"),
        ("m_face", "full", "m_face_impostor_95"), ("m_face", "full", "m_face_cross_impostor_95"),
        ("m_face", "full", "m_face_cross_impostor_95"), ("identity_colour", "full", "half_way"),
        ("prompted", "base", "0.97"), (content["base"]["least"][0], "base", "0.9"),
        ("least_step_to_second", "interpolation", "0"), ("least_step_from_first", "interpolation", "0"),
        ("lead_first", "mixing", "others"), ("to_first", "mixing", "m_face_impostor_95"),
        ("lead_second", "mixing", "others"), ("to_second", "mixing", "m_face_impostor_95"),
    ]  # fmt: skip
    assert content["claims"][2]["verdict"] == "confirmed"  # cosines differ by 2 at most
    steps = np.diff([value for value, _, _ in content["interpolation"]["to_second"]])
    assert any(content["interpolation"]["least_step_to_second"][0] == pytest.approx(step, abs=2e-6) for step in steps)
    assert [bool(entry.get("note")) for entry in content["claims"][:4]] == [True, False, False, False]
    assert "trained once" in content["claims"][0]["note"]
    assert content["settings"]["identities"] == 5
    noted = json.loads((finished[0] / "study.json").read_text())
    assert {name: content["settings"][name] for name in ("model", "adapters", "world")} == {
        name: noted[name] for name in ("model", "adapters", "world")
    }


def test_a_style_is_judged_beside_what_else_is_said(finished):
    content = results(finished[0])
    for table in ("methods", "methods_photo", "methods_style"):
        for metrics in content[table].values():
            assert metrics["prompted"] == metrics["prompted_scene"]
    copy = content["methods"]["reference_copy"]
    assert copy["prompted"] != copy["prompted_style"]  # photographs by day: one of three prompts, two of three styles
    assert content["base"]["mean"] == content["base"]["attributes"]["prompted_scene"]


def test_a_claim_is_its_figure_less_its_bar(finished):
    """Bars are taken as known: each interval is the figure's own, moved."""
    content = results(finished[0])
    entries = {(entry["metric"], entry["second"], entry["prompts"]): entry["difference"] for entry in content["claims"]}
    full, base = content["methods"]["full"], content["baselines"]
    figures = {
        ("m_face", "m_face_impostor_95", "all"): (full["m_face"], base["m_face_impostor_95"]),
        ("m_face", "m_face_cross_impostor_95", "style"): (
            content["methods_style"]["full"]["m_face"],
            base["m_face_cross_impostor_95"]["style"],
        ),
        ("identity_colour", "half_way", "all"): (full["identity_colour"], base["half_way"]["identity_colour"]),
        ("prompted", "0.97", "all"): (content["base"]["mean"], 0.97),
        ("least_step_to_second", "0", "photo"): (content["interpolation"]["least_step_to_second"], 0),
        ("lead_first", "others", "photo"): (content["mixing"]["lead_first"], 0.0),
        ("to_second", "m_face_impostor_95", "photo"): (content["mixing"]["to_second"], base["m_face_impostor_95"]),
    }
    for key, (figure, bar) in figures.items():
        assert entries[key] == pytest.approx(np.array(figure) - bar, abs=2e-6), key


def test_intervals_are_over_groups_who_share_noise(finished):
    folder = finished[0]
    with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "full"]
    assert [row["group"] for row in rows] == ["0", "0", "1", "1", "2"] * 3
    content = results(folder)
    for table, styles in (("methods", ("photo", "drawn")), ("methods_photo", ("photo",)), ("methods_style", "drawn")):
        some = [row for row in rows if row["style"] in styles]
        values, groups = (np.array([float(row[name]) for row in some]) for name in ("clip_t", "group"))
        assert content[table]["full"]["clip_t"] == pytest.approx(interval(values, groups), abs=1e-5)


def test_bounds_and_baselines_are_what_the_world_is(finished):
    """What is known without any model: copies are themselves, and the world draws what it judges."""
    content = results(finished[0])
    copy, drawn = content["methods"]["reference_copy"], content["methods"]["drawn"]
    assert copy["m_face"] == [1, 1, 1]
    assert copy["clip_i"] == [1, 1, 1]
    assert copy["rank_1"] == [1, 1, 1]
    assert copy["diversity_judge"] == [0, 0, 0]  # one photo for all prompts
    assert copy["identity_attributes"] == [1, 1, 1]
    assert copy["prompted_scene"][0] == pytest.approx(1 / 3)  # all photos are by day, as one of three prompts says
    assert drawn["prompted_scene"] == drawn["identity_colour"] == [1, 1, 1]
    base = content["baselines"]
    assert base["m_face_genuine"][0] > 0.99
    assert base["m_face_impostor_mean"] < base["m_face_impostor_95"] <= 1
    assert base["judge_rank_1"][0] > 0.5
    assert base["detection_rate_photos"] == 1
    assert base["judges"] == {"prompted_scene": 1, "prompted_style": drawn["prompted_style"][0], "identity_colour": 1}
    assert base["chance"] == LittleWorld().chance()
    assert base["half_way"] == {"identity_colour": 0.7}
    assert set(base["m_face_cross_impostor_95"]) == {"photo", "style"}
    assert base["chance_prompted"] == pytest.approx({"scene": 2 / 3, "style": 2 / 3}, abs=1e-6)  # of three prompts
    assert content["base"]["judge"]["prompted_scene"] == 1
    assert set(content["base"]["chance"]) == set(content["base"]["attributes"])
    assert copy["kid_judge"][0] < content["methods"]["full"]["kid_judge"][0]
    # Each given photo counts once, not once a prompt, and features of unit length grow to entries of about 1.
    people = LittleWorld().people(5)
    photos = LittleWorld().judge(np.stack([person.photo for person in people])).features
    others = LittleWorld().judge(np.concatenate([person.others for person in people])).features
    scale = np.sqrt(photos.shape[1])
    assert copy["kid_judge"][0] == pytest.approx(kid(scale * photos, scale * others), rel=0.02)  # stored in halves
    with_sets = {name for name, each in content["methods"].items() if "kid_judge" in each}
    with_fid = {name for name, each in content["methods"].items() if "fid_judge_64d" in each}
    assert with_fid == with_sets - {"reference_copy", "text_only"} != set()  # the bounds have fewer pictures
    assert set(content["interpolation"]["weights"]) == {0.0, 1.0}
    assert set(content["base"]["attributes"]) == {"prompted_scene", "prompted_style"}


def test_every_picture_has_a_row_and_a_file(finished):
    folder = finished[0]
    with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Five people in three prompts; "smaller" and "int8" draw the two photographs alone.
    assert len(rows) == 5 * (3 + 2 + 3 + 2 + 3 + 3 + 3)
    assert len({(row["method"], row["identity"], row["prompt"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["text"] == LittleWorld().prompts(3)[int(row["prompt"])].text
        metadata = read_metadata(folder / row["file"])
        if row["method"] in ("drawn", "reference_copy"):
            assert "AI-generated" not in metadata
        else:
            assert metadata["AI-generated"] == "true"
            assert metadata["prompt"] == row["text"]
            assert metadata["method"] == row["method"]
    listed = {folder / row["file"] for row in rows}
    others = {path for path in (folder / "images").rglob("*.png") if path not in listed}
    assert {path.relative_to(folder / "images").parts[0] for path in others} >= {"base", "interpolation"}
    assert all(read_metadata(path)["AI-generated"] == "true" for path in others)
    content = results(folder)
    mean = np.mean([float(row["clip_t"]) for row in rows if row["method"] == "full"])
    assert content["methods"]["full"]["clip_t"][0] == pytest.approx(mean, abs=1e-5)


def test_the_report_is_whole_and_holds_its_pictures(finished):
    assert (finished[0] / "tables.md").read_text().count("\n## ") == 5
    page = (finished[0] / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    for title in (
        "trained once",
        "guessing",
        "the middle",
        "Two people as one",
        "What the paper claims",
        "All methods",
        "Smaller photos",
        "From one person to another",
        "Pictures",
    ):
        assert title in page
    assert "src=" in page
    assert not [part for part in page.split('src="')[1:] if not part.startswith("data:")]
    for text in ("Infinite-ID", "another adapter", "An eighth of the size loses little", "a photo person by day"):
        assert text in page


def test_groups_share_noise_and_settings_follow_the_prompt(finished):
    """Five people in groups of two: the last is drawn twice, in one shape, and one of the pictures is kept."""
    drawn = finished[1]
    full = [(prompt, people, settings) for prompt, people, settings in drawn if people is not None and len(people) == 2]
    first = [each for each in full if each[0] == "a photo person by day"]
    # Three groups, four methods that draw photographs; then interpolations of two pairs, each with its own noise.
    assert [settings["seed"] for _, _, settings in first] == [0, 1, 2] * 4 + [0, 1]
    assert first[2][1][0] is first[2][1][1]
    for mixed, person in zip(first[-2][1], first[0][1], strict=True):  # weights 0 and 1: from the first to the second
        np.testing.assert_allclose(mixed.tokens, person.tokens, rtol=1e-6)
    assert {settings.get("style_merge") for prompt, _, settings in full if "drawn" in prompt} == {"adain_mean", None}
    assert not [settings for prompt, _, settings in full if "photo" in prompt and "style_merge" in settings]
    texts = [(prompt, settings) for prompt, people, settings in drawn if people is None]
    assert texts[0][1]["seed"] == [0, 1, 2]  # of the same noise as the groups'


def test_what_the_text_alone_draws_is_shown_to_all_of_a_group(finished):
    folder = finished[0] / "images" / "text_only" / "prompt01"
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    same = [np.array_equal(pictures[i], pictures[i + 1]) for i in range(4)]
    assert same == [True, False, True, False]


def test_the_same_command_draws_nothing_again(config, finished, calls):
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    metrics = (folder / "metrics.json").read_bytes()
    calls.clear()
    assert run(config, folder) == 0
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
    assert (folder / "metrics.json").read_bytes() == metrics


def test_what_is_missing_alone_is_made_again(config, finished, calls, tmp_path):
    """Scores from the pictures that are there; a prompt's pictures, where one of them is gone."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    for method in ("full", "other", "base"):
        (folder / "scores" / method / "0000.json").unlink()
    calls.clear()
    assert run(config, folder) == 0
    assert not calls
    assert (folder / "metrics.json").read_bytes() == (finished[0] / "metrics.json").read_bytes()
    (folder / "scores" / "other" / "0001.json").unlink()
    next((folder / "images" / "other" / "prompt01").iterdir()).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    calls.clear()
    assert run(config, folder) == 0
    assert [prompt for prompt, _, _ in calls] == ["a drawn person by night"] * 3
    changed = {path.parent for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {folder / "images" / "other" / "prompt01"}
    assert (folder / "metrics.json").read_bytes() == (finished[0] / "metrics.json").read_bytes()


def test_parts_that_processes_draw_beside_each_other_make_the_whole(config, finished, calls, capsys, tmp_path):
    drawn = []
    for part in ("1/2", "2/2"):
        calls.clear()
        assert run(config, tmp_path, "--part", part) == 0
        assert f"Part {part[0]} of 2 is drawn" in capsys.readouterr().out
        assert not (tmp_path / "metrics.json").exists()
        drawn.append(len(calls))
    assert min(drawn) > 0
    assert sum(drawn) == len(finished[1])
    calls.clear()
    assert run(config, tmp_path) == 0
    assert not calls
    assert (tmp_path / "metrics.json").read_bytes() == (finished[0] / "metrics.json").read_bytes()
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(SystemExit, match="2"):
            run(config, tmp_path, "--part", wrong)
        assert "is no part: give I/N" in capsys.readouterr().err


def test_an_interrupted_study_goes_on_where_it_stopped(config, finished, calls, capsys, tmp_path):
    """Ctrl-C while the second prompt of the second adapter is judged."""
    LittleWorld.judged, LittleWorld.interrupt_at = 0, 3 + 5 + 5 * (3 + 2 + 2)
    assert run(config, tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert LittleWorld.interrupt_at is None
    assert not (tmp_path / "metrics.json").exists()
    done = {path.relative_to(tmp_path) for path in (tmp_path / "scores").rglob("*.json")}
    assert len(done) == 6
    calls.clear()
    assert run(config, tmp_path) == 0
    assert not [prompt for prompt, people, _ in calls[:3] if prompt != "a drawn person by night"]
    for name in ("metrics.json", "images.csv"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()


def test_another_study_in_the_same_folder_is_refused(config, finished, capsys):
    for options in (["--steps", "3"], ["--group", "3"], ["--prompts", "2"], ["--methods", "full"]):
        assert "holds another study's scores: choose another --output-dir" in refused(
            capsys, config, finished[0], *options
        )


def test_a_method_may_multiply_8_bit_numbers(finished):
    """Its pictures are not those of full precision, and not far from them."""
    folder = finished[0] / "images"
    names = [path.relative_to(folder / "int8") for path in (folder / "int8").rglob("*.png")]
    both = [[np.asarray(Image.open(folder / method / name), int) for name in names] for method in ("full", "int8")]
    assert 0 < np.abs(np.subtract(*both)).mean() < 1  # of 255; measured: 0.33


def test_another_world_in_the_same_folder_is_refused(config, finished, capsys):
    renamed = config.with_name("RenamedWorld.py")
    assert "holds another study's scores" in refused(capsys, renamed, finished[0])


def test_a_photo_whose_face_is_lost_when_made_smaller_is_drawn_as_nobody(config, tmp_path, calls):
    calls.clear()
    size = ("--methods", "full", "smaller", "--prompts", "1")
    assert run(config.with_name("DottedWorld.py"), tmp_path, *size) == 0
    content = results(tmp_path)["methods"]
    assert content["smaller"]["photo_face"][0] == pytest.approx(4 / 5)
    assert "photo_face" not in content["full"]
    full, smaller = [people for _, people, settings in calls if people and settings["seed"] == 0][:2]
    np.testing.assert_array_equal(smaller[1].tokens, full[1].unconditional)
    np.testing.assert_array_equal(smaller[1].unconditional, full[1].unconditional)
    assert not np.array_equal(smaller[0].tokens, full[0].unconditional)


def test_a_photo_without_a_face_is_named_before_anything_is_drawn(config, capsys, tmp_path, calls):
    calls.clear()
    assert "No face was found in the photo of 0001" in refused(capsys, config.with_name("DarkWorld.py"), tmp_path)
    assert not calls


def test_the_diagrams_are_missed_before_anything_is_drawn(config, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs the extra `evaluate`" in refused(capsys, config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["miniature", "miniature_variants"])
def test_what_our_studies_claim_can_be_measured(name):
    """Both sides of each claim are drawn, in some prompts of its kind."""
    study = load_study(ROOT / "configs" / f"{name}.py")
    methods = {method.name: method for method in study.methods}
    assert len(methods) == len(study.methods)
    assert {method.adapter for method in study.methods} <= set(study.adapters)
    for claim in study.claims:
        for side in {claim.first, claim.second} - {"text_only"}:
            drawn = {"photo": methods[side].photo is not None, "style": methods[side].style is not None}
            assert any(drawn.values()) if claim.prompts == "all" else drawn[claim.prompts], claim.text


@pytest.mark.parametrize("by", [2, 4, 8])
def test_a_photo_made_smaller_keeps_its_size(by):
    """128 px at an eighth are 16, fewer than a photo may have: it is enlarged again, and what is fine is gone."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (128, 96, 3), np.uint8)
    small = shrunk(photo, by)
    assert small.shape == photo.shape
    sides = 128 // by, by, 96 // by, by, 3
    coarse = [x.reshape(sides).mean((1, 3), float).ravel() for x in (photo, small)]
    assert np.corrcoef(coarse)[0, 1] > 0.9  # measured 0.98
    assert (
        np.abs(np.diff(small.astype(float), axis=0)).mean() < np.abs(np.diff(photo.astype(float), axis=0)).mean() / by
    )
    np.testing.assert_array_equal(shrunk(photo, 1), photo)


def test_a_study_that_failed_before_any_score_does_not_stand_in_the_way(config, finished, capsys, tmp_path):
    assert "steps" in refused(capsys, config, tmp_path, "--steps", "1001")  # more than the model has
    assert (tmp_path / "study.json").exists()
    assert run(config, tmp_path, "--methods", "full", "--identities", "2", "--prompts", "1") == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--methods", "full", "half"], "--methods half: choose from full, int8, other, smaller"),
        (["--identities", "0"], "--identities is 0: give 1 or more"),
        (["--prompts", "-1"], "--prompts is -1: give 1 or more"),
        (["--steps", "0"], "--steps is 0: give 1 or more"),
        (["--group", "0"], "--group is 0: give 1 or more"),
        (["--identities", "6"], "There are 5 people"),
        (["--prompts", "6"], "There are 5 prompts"),
        (
            ["--adapter", "runs/adapter"],
            "--adapter runs/adapter is not of the form NAME=DIR with a NAME of full, other",
        ),
        (["--adapter", "none=runs/adapter"], "is not of the form NAME=DIR"),
        (["--adapter", "other=runs/none"], "runs/none"),
    ],
)
def test_mistakes_are_one_sentence(config, capsys, tmp_path, options, says):
    assert says in refused(capsys, config, tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_a_configuration_without_a_study_is_refused(capsys, tmp_path):
    assert "defines no `study`" in refused(capsys, ROOT / "configs" / "debug.py", tmp_path)
    assert "does not exist" in refused(capsys, tmp_path / "none.py", tmp_path)


@pytest.mark.parametrize(("identities", "prompts"), [(1, 1), (2, 1), (5, 1)])
def test_a_small_study_has_what_there_is(config, capsys, tmp_path, identities, prompts):
    """No interval of one person, no style of photographs: what cannot be said is left out, and nothing fails."""
    size = ("--identities", str(identities), "--prompts", str(prompts))
    assert run(config, tmp_path, "--methods", "full", "smaller", *size) == 0
    assert "warning" not in capsys.readouterr().err
    content = results(tmp_path)
    assert "full" in content["methods"]
    style = [entry for entry in content["claims"] if entry["prompts"] == "style"]
    assert not style
    assert ("kid_judge" in content["methods"]["full"]) == (identities > 2)
    assert bool(content["interpolation"]) == (identities > 1)


def test_only_some_methods(config, tmp_path, calls):
    calls.clear()
    assert run(config, tmp_path, "--methods", "other", "--identities", "2", "--prompts", "2") == 0
    content = results(tmp_path)
    assert set(content["methods"]) == {"other", "text_only", "reference_copy", "drawn"}
    assert not [entry for entry in content["claims"] if "full" in (entry["first"], entry["second"])]
    assert set(json.loads((tmp_path / "study.json").read_text())["adapters"]) == {"other"}


def test_the_process_ends_at_ctrl_c(config, tmp_path):
    """As a user's: the signal comes while the model is compiled, and the process does not wait for its pictures."""
    command = [sys.executable, "-W", "ignore", "evaluate.py", "--config", str(config), "--output-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in iter(process.stderr.readline, ""):
        if "methods" in line or "full" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 130, rest
    assert "Traceback" not in rest
    assert "Interrupted: the same command goes on from here." in rest
