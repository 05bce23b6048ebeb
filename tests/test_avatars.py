"""The generated people of the miniature: who they are, that labels and captions tell what is drawn, and the styles."""

import dataclasses
import hashlib
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import avatar_captions, avatars
from data_pipeline.avatar_captions import LOOKS, MEDIA, PROMPTS, WORDS, Scene, caption, with_looks
from data_pipeline.avatar_styles import STYLES
from data_pipeline.avatars import CLASSES, IDENTITY, Person, attributes, complete, keypoints, person, render, sample
from infinite_id_jax.errors import InputError, MissingExtraError

PLAIN = Person("light", "short", "ginger", "none", "arched", "small", "none")
OPEN = Scene("hoodie", "blue", "serious", "none", "none", "grey", "portrait")
SEEN = 40  # of 255 in some channel: a pixel that a viewer sees to differ


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return int((abs(one.astype(int) - other).max(-1) > SEEN).sum())


def look(someone: Person) -> tuple[str, ...]:
    return tuple(value for name, value in dataclasses.asdict(someone).items() if name != "nose")


# ---------------------------------------------------------------------------------------------------------------------
# People.


def test_people_are_distinct_and_nobody_has_a_double_in_the_other_split():
    train = [person(i, "train") for i in range(20_000)]
    test = [person(i, "test") for i in range(200)]
    assert len(set(train + test)) == 20_200
    assert not set(map(look, train)) & set(map(look, test))  # not even one who differs in the nose alone
    # Each bald person without a beard stands for all hair colours, so there are a few less.
    assert math.prod(map(len, IDENTITY.values())) == 172_800


def test_the_same_people_for_all_time():
    assert person(0, "train") == person(0, "train")
    text = "".join(repr(person(i, split)) for split in ("train", "test") for i in range(100))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "79e62292da932b7d"


def test_every_trait_occurs_and_none_is_rare():
    everybody = [dataclasses.asdict(person(i, split)) for split in ("train", "test") for i in range(1000)]
    for name, classes in IDENTITY.items():
        counts = [sum(who[name] == value for who in everybody) for value in classes]
        assert min(counts) > 0.03 * len(everybody), name  # 20 kinds of hair
    assert {who["hair_colour"] for who in everybody if (who["hair"], who["facial_hair"]) == ("bald", "none")} == {
        "none"
    }


@pytest.mark.parametrize("index", [-1, avatars.PEOPLE["test"]])
def test_there_are_so_many_people(index):
    with pytest.raises(InputError, match=f"0 to {avatars.PEOPLE['test'] - 1}"):
        person(index, "test")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


@pytest.mark.parametrize("style", STYLES)
def test_pictures_are_a_function_of_the_arguments(style):
    someone = person(3, "test")
    image = render(someone, {"expression": "happy"}, style, 64, seed=1)
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    np.testing.assert_array_equal(image, render(someone, Scene(expression="happy"), style, 64, seed=1))
    assert differ(image, render(someone, {"expression": "happy"}, style, 64, seed=2)) > 200


def test_another_process_draws_the_same():
    code = (
        "import hashlib; from data_pipeline.avatars import sample\n"
        "images = [sample(i, 'test', 'base', size=64).image.tobytes() for i in range(5)]\n"
        "print(hashlib.sha256(b''.join(images)).hexdigest())"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    here = hashlib.sha256(b"".join(sample(i, "test", "base", size=64).image.tobytes() for i in range(5)))
    assert done.stdout.strip() == here.hexdigest()


@pytest.mark.parametrize(("style", "limit"), [("flat", 1.5), ("photo", 4.5)])
def test_small_pictures_are_large_ones_seen_from_afar(style, limit):
    """Measured, of 255 on average: 0.4 for a flat drawing, 2.9 for a photograph, whose grain differs."""
    small, large = (render(person(0, "test"), OPEN, style, size) for size in (64, 128))
    shrunk = np.asarray(Image.fromarray(large).reduce(2), np.float32)
    assert abs(shrunk - small).mean() < limit


# Where attributes differ least: measured at 128 pixels, flat, 106 for the nose, 138 for brows, 145 for expressions.
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "style"])
def test_all_values_of_an_attribute_are_seen_to_differ(name):
    pictures = []
    for value in CLASSES[name]:
        someone = dataclasses.replace(PLAIN, **{name: value}) if name in IDENTITY else PLAIN
        scene = dataclasses.replace(OPEN, **({} if name in IDENTITY else {name: value}))
        pictures.append(render(someone, scene, "flat", 128))
    assert min(differ(*pair) for pair in itertools.combinations(pictures, 2)) > 80


def test_scored_attributes_are_seen_in_the_picture():
    """Another value of a scored attribute changes the picture, whatever hats, glasses, hair and beards there are."""
    faint = []
    for seed in range(27):
        style = tuple(STYLES)[seed % len(STYLES)]
        someone, scene = person(seed, "test"), complete({}, seed)
        if someone.hair_colour == "none":
            someone = dataclasses.replace(someone, hair_colour="brown")  # so that hair can be put on
        before = render(someone, scene, style, 128, seed)
        for name, label in attributes(someone, scene, style).items():
            if label == -1 or name in ("style", "background", "view"):
                continue
            value = CLASSES[name][label - 1]
            who = dataclasses.replace(someone, **{name: value}) if name in IDENTITY else someone
            said = scene if name in IDENTITY else dataclasses.replace(scene, **{name: value})
            if attributes(who, said, style)[name] == -1:
                continue
            changed = int((abs(render(who, said, style, 128, seed).astype(int) - before).max(-1) > 12).sum())
            if changed < 30:
                faint.append((name, CLASSES[name][label], value, style, changed))
    assert not faint


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hair", {"hat": "wide hat"}),
        ("hair_colour", {"hat": "helmet"}),
        ("glasses", {"accessory": "sunglasses"}),
        ("glasses", {"accessory": "eyepatch"}),
        ("clothing_colour", {"clothing": "spacesuit"}),
    ],
)
def test_what_is_not_drawn_is_not_scored(name, said):
    scene = dataclasses.replace(OPEN, **said)
    pictures = set()
    for value in CLASSES[name]:
        someone = dataclasses.replace(PLAIN, **{name: value}) if name in IDENTITY else PLAIN
        shown = dataclasses.replace(scene, **({} if name in IDENTITY else {name: value}))
        pictures.add(render(someone, shown, "flat", 64).tobytes())
        assert attributes(someone, shown, "flat")[name] == -1
        assert attributes(someone, dataclasses.replace(OPEN, clothing_colour="red"), "flat")[name] >= 0
    assert len(pictures) == 1


@pytest.mark.parametrize("style", ["line art", "sketch", "sepia"])
def test_colours_are_not_scored_without_colour(style):
    labels = attributes(PLAIN, OPEN, style)
    assert {labels[name] for name in ("skin", "hair_colour", "clothing_colour", "background")} == {-1}
    assert min(labels[name] for name in ("hair", "facial_hair", "clothing", "expression", "style")) >= 0


def test_labels_are_the_classes_of_what_is_said():
    scene = Scene(clothing="tuxedo", background="snow")
    labels = attributes(PLAIN, scene, "pixel art")
    assert labels.keys() == CLASSES.keys()
    told = {name: CLASSES[name][label] for name, label in labels.items() if label != -1}
    person_ = {name: value for name, value in dataclasses.asdict(PLAIN).items() if name != "nose"}
    assert told == {**person_, "clothing": "tuxedo", "background": "snow", "style": "pixel art"}
    for colour in ("none", "ginger"):
        bald = dataclasses.replace(PLAIN, hair="bald", hair_colour=colour)
        assert attributes(bald, scene, "photo")["hair_colour"] == -1
    assert render(bald, OPEN, "photo", 64).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("call", "choices"),
    [
        (lambda: render(PLAIN, {"trousers": "jeans"}, "photo", 64), "clothing, clothing_colour, expression"),
        (lambda: render(PLAIN, {"hat": "crown"}, "photo", 64), "none, wide hat, bobble hat"),
        (lambda: render(PLAIN, {}, "oil", 64), "photo, flat, line art"),
        (lambda: render(PLAIN, {}, "photo", 16), "32 to 1024"),
        (lambda: render(dataclasses.replace(PLAIN, skin="green"), {}, "photo", 64), "pale, light, tan"),
        (lambda: render(dataclasses.replace(PLAIN, hair_colour="none"), {}, "photo", 64), "black, brown, ginger"),
        (lambda: caption({"hat": "crown"}, "photo", 0), "none, wide hat"),
        (lambda: caption({}, "oil", 0), "photo, flat"),
        (lambda: attributes(PLAIN, {}, "oil"), "photo, flat"),
        (lambda: person(0, "validation"), "train, test"),
        (lambda: sample(0, "train", "portrait"), "base, identity"),
    ],
)
def test_mistakes_are_answered_with_the_choices(call, choices):
    with pytest.raises(InputError, match=choices):
        call()


@pytest.mark.parametrize("package", ["python_avatars", "resvg_py"])
def test_missing_packages_are_named_by_their_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    avatars.avatar_svg._part.cache_clear()
    with pytest.raises(MissingExtraError, match="miniature"):
        render(PLAIN, OPEN, "flat", 64)


def middle(weights: np.ndarray) -> tuple[float, float]:
    """(x, y) of the centre of mass."""
    y, x = np.indices(weights.shape)
    return float((weights * x).sum() / weights.sum()), float((weights * y).sum() / weights.sum())


@pytest.mark.parametrize("view", avatars.VIEW)
def test_keypoints_lie_on_eyes_nose_and_mouth(view):
    """Found in the pictures at 128 px. Furthest off, of 18: an eye 0.2 px, a nose 0.3, a mouth 1.2 across."""
    someone = dataclasses.replace(PLAIN, brows="none")
    scene = dataclasses.replace(OPEN, view=view)
    for seed in range(6):
        picture = render(someone, scene, "flat", 128, seed).astype(int)
        points = keypoints(scene, 128, seed)
        for eye in points[:2]:  # whose pupils are the darkest there
            y, x = np.indices(picture.shape[:2])
            near = np.hypot(x - eye[0], y - eye[1]) < 7
            np.testing.assert_allclose(middle(near * np.clip(90 - picture.mean(-1), 0, None)), eye, atol=0.5)
        other_nose = render(dataclasses.replace(someone, nose="wide"), scene, "flat", 128, seed)
        np.testing.assert_allclose(middle(abs(other_nose - picture).max(-1) > 20), points[2], atol=0.8)
        smiling = render(someone, dataclasses.replace(scene, expression="happy"), "flat", 128, seed)
        changed = abs(smiling - picture).max(-1) > 20
        changed[: int(points[2, 1]) + 3] = False  # the eyes smile too
        y, x = np.nonzero(changed)
        left, right = points[3:, 0]
        assert abs((x.min() + x.max()) / 2 - (left + right) / 2) < 2
        assert x.min() < left < right < x.max()  # a smile is wider, by 4 to 7 px at each end
        assert x.max() - x.min() < 2 * (right - left)
        assert y.min() - 1 < points[3:, 1].min() <= points[3:, 1].max() < y.max()


def test_keypoints_scale_with_the_picture_and_follow_what_is_drawn_at_random():
    small, large = (keypoints({}, size, 3) for size in (64, 256))
    np.testing.assert_allclose((small + 0.5) * 4, large + 0.5, rtol=1e-5)
    np.testing.assert_array_equal(keypoints({}, 64, 3), keypoints(complete({}, 3), 64, 3))  # the view that is drawn
    wandering = np.ptp([keypoints({"view": "portrait"}, 64, seed) for seed in range(16)], axis=0)
    assert 0.3 < wandering.min() <= wandering.max() < 2  # pixels of 64; 0.5 to 1.2 measured


# ---------------------------------------------------------------------------------------------------------------------
# Styles.


def statistics(image: np.ndarray) -> list[float]:
    """Of a picture: brightness, contrast, colour, warmth, sharpness, the share of flat areas and of 4-pixel squares."""
    colours = image.astype(np.float32) / 255
    grey = colours.mean(-1)
    steps = abs(np.diff(grey, axis=1))
    warmth = colours[..., 0] - colours[..., 2]
    squares = steps[:, 3::4].sum() / steps.sum()
    return [
        grey.mean(),
        grey.std(),
        np.ptp(colours, -1).mean(),
        warmth.mean(),
        steps.mean(),
        (steps == 0).mean(),
        squares,
    ]


def test_styles_differ_in_their_statistics():
    """The three nearest of 112 pictures tell the style of 56 others by seven numbers: 53 right, chance 8."""
    points = np.array(
        [[statistics(render(person(i, "train"), {}, style, 128, i)) for i in range(24)] for style in STYLES]
    )
    points /= points.std((0, 1))
    known = points[:, :16].reshape(-1, points.shape[-1])
    right = 0
    for style, unknown in enumerate(points[:, 16:]):
        for point in unknown:
            nearest = np.argsort(np.linalg.norm(known - point, axis=-1))[:3] // 16
            right += np.bincount(nearest).argmax() == style
    assert right > 45


def test_a_photograph_has_grain_and_a_drawing_has_none():
    patch = {style: render(PLAIN, OPEN, style, 128)[2:12, 2:12].astype(float) for style in ("photo", "flat")}
    assert patch["flat"].std((0, 1)).max() == 0
    assert patch["photo"].std((0, 1)).min() > 1.5


# ---------------------------------------------------------------------------------------------------------------------
# Captions.


COLOURS = "|".join(word for words in WORDS["clothing_colour"].values() for word in words)


def strip(text: str, said: dict[str, str]) -> str:
    """`text` without the words for what is said; a missing word is an AssertionError."""
    colour = said.get("clothing_colour")
    for name in reversed([name for name in WORDS if name in said]):  # a grey wall before grey clothes
        synonyms = WORDS[name][said[name]]
        if name == "clothing_colour":
            synonyms = () if "clothing" in said else [f"{word} clothes" for word in synonyms]
        if name == "clothing" and not colour:
            synonyms = [re.sub(r" (with|over|and) {} shirt", "", words) for words in synonyms]
        if not synonyms:
            continue
        patterns = [re.escape(words).replace(r"\{\}", f"an? ({COLOURS})" if colour else "a") for words in synonyms]
        found = [match for p in patterns if (match := re.search(rf"\b{p}(?![\w-])", text))]
        assert found, (said[name], text)
        longest = max(found, key=lambda match: len(match.group()))
        if longest.groups():
            assert longest.group(1) in WORDS["clothing_colour"][colour], text
        text = text.replace(longest.group(), "", 1)
    return " ".join(text.split())


def media(style: str) -> set[str]:
    return {" ".join(medium.replace("{}", "").split()) for medium in MEDIA[style]}


@pytest.mark.parametrize("style", STYLES)
def test_captions_say_what_is_said_and_nothing_else(style):
    for seed in range(120):
        rng = np.random.default_rng(seed)
        scene = dataclasses.asdict(complete({}, seed))
        said = {name: value for name, value in scene.items() if rng.random() < 0.6}
        rest = strip(caption(said, style, seed), said)
        # What is left is the medium, the person and "wearing".
        left = re.fullmatch(r"(.+ of) (a person|someone|a character)[ ,]*((in|wearing|dressed in)[ ,]*)?", rest)
        assert left, (said, rest)
        assert left.group(1) in media(style)


def test_captions_vary_in_words_and_order():
    said = {"clothing": "hoodie", "clothing_colour": "red", "expression": "happy", "background": "beach"}
    texts = {caption(said, "photo", seed) for seed in range(200)}
    assert len(texts) > 100
    assert any(
        text.index("hood") > text.index(" on a beach") for text in texts if " on a beach" in text and "hood" in text
    )
    assert caption(said, "photo", 0) == caption(Scene(**said), "photo", 0)


def looks(someone: dict[str, str]) -> dict[str, set[str]]:
    """All that may be said of each attribute of a person."""
    colour, said = someone.get("hair_colour", ""), {}
    for name in someone.keys() & LOOKS.keys():
        phrases = {" ".join(words.replace("{}", colour).split()) for words in LOOKS[name][someone[name]]}
        said[name] = {phrase.replace("a afro", "an afro") for phrase in phrases}
    return said


def test_looks_say_what_shows_and_nothing_else():
    spoken = set()
    for seed in range(1500):
        someone, scene = person(seed, "test"), complete({}, seed)
        style = tuple(STYLES)[seed % len(STYLES)]
        labels = attributes(someone, scene, style)
        shown = {name: CLASSES[name][label] for name, label in labels.items() if label >= 0}
        plain = caption(scene, style, seed)
        text = with_looks(plain, shown, seed)
        assert text == with_looks(plain, shown, seed)
        if text == plain:
            continue
        who = re.match(r".*? of (a person|someone|a character)", plain)
        assert who
        assert text.startswith(f"{who.group()} with ")
        assert text.endswith(plain[who.end() :])
        phrases = re.split(r", | and ", text[len(who.group()) + 6 : len(text) - len(plain) + who.end()])
        about = [name for phrase in phrases for name, said in looks(shown).items() if phrase in said]
        assert len(about) == len(set(about)) == len(phrases), (text, shown)
        assert not re.search(r"\ba [aeiou]", ", ".join(phrases))
        spoken |= {(name, shown[name]) for name in about}
    assert spoken == {(name, value) for name, values in LOOKS.items() for value, words in values.items() if words}


def test_looks_know_the_values_of_people():
    for name, values in LOOKS.items():
        assert list(values) == list(IDENTITY[name])
    assert with_looks("a photo of someone, smiling", {}, 0) == "a photo of someone, smiling"


def test_words_and_pictures_know_the_same_values():
    for name, values in WORDS.items():
        drawn = getattr(avatars, name.upper())
        assert list(values) == list(drawn), name
        assert len({word for words in values.values() for word in words}) == sum(map(len, values.values())), name
        assert all(2 <= len(words) <= 4 for value, words in values.items() if value != "none")
    assert list(MEDIA) == list(STYLES)


def test_the_prompts_of_the_evaluation():
    assert [style == "photo" for _, style, _ in PROMPTS] == [True] * 10 + [False] * 10
    assert {style for _, style, _ in PROMPTS} == set(STYLES)
    for said, style, text in PROMPTS:
        rest = strip(text, said)
        assert any(rest.startswith(medium) for medium in media(style)), text
        labels = attributes(PLAIN, said, style)
        assert all(labels[name] >= 0 for name in said), text  # every word is scored


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to train on.


def test_samples_are_what_their_role_says():
    base, identity = ([sample(i, "train", role, size=32) for i in range(150)] for role in ("base", "identity"))
    assert {each.style for each in base} == set(STYLES)
    assert {each.style for each in identity} == {"photo"}
    assert 0.84 < np.mean([each.scene.hat == "none" for each in identity]) < 0.96
    assert 0.45 < np.mean([each.scene.hat == "none" for each in base]) < 0.75
    for each in base + identity:
        assert each.labels == attributes(person(each.person, "train"), each.scene, each.style)
        if "clothes" in each.caption:
            assert each.scene.clothing not in ("blazer", "tuxedo", "spacesuit")
        for name in ("hat", "accessory"):  # else a prompt that says nothing of them could mean one
            words = WORDS[name][getattr(each.scene, name)]
            assert not words or any(word in each.caption for word in words)
    for name in WORDS:
        assert {getattr(each.scene, name) for each in base} == set(WORDS[name])


def test_samples_of_one_person():
    photos = [sample(i, "test", "identity", person_index=7, size=32) for i in range(6)]
    assert {each.person for each in photos} == {7}
    assert len({each.image.tobytes() for each in photos}) == 6
    again = render(person(7, "test"), photos[0].scene, photos[0].style, 32, photos[0].seed)
    np.testing.assert_array_equal(photos[0].image, again)
    assert sample(0, "train", "identity", size=32).scene != photos[0].scene  # the splits share nothing
    assert avatar_captions.generator("a", 1).random() != avatar_captions.generator("a", 2).random()
