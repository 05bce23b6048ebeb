"""The miniature's world as the evaluation sees it: people nobody was trained on, prompts, and the judges."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from data_pipeline import avatars
from data_pipeline.avatar_captions import PROMPTS, caption
from infinite_id_jax.errors import InputError
from infinite_id_jax.evaluation.world import Person, Pictures, Prompt, Seen
from infinite_id_jax.faces import small_resnet
from infinite_id_jax.faces.miniature import MiniatureFaces, aligned, network
from infinite_id_jax.files import fingerprint
from infinite_id_jax.identity.features import unit
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel, preprocess
from infinite_id_jax.stable_diffusion.tokenizer import CLIPTokenizer
from infinite_id_jax.weights.load import load_module
from miniature import clip, judges, pictures

_OTHERS = 6  # photos of a person beside the one that is given
_BATCHES = (1, 5, 50)  # sizes that the networks are compiled for
_LOOKS = ("skin", "hair", "hair_colour", "facial_hair", "brows", "nose", "glasses")


class MiniatureWorld:
    """People and prompts of avatars.py, judged by the networks in the model's judges/ (`evaluation.world.World`)."""

    def __init__(self, model: Path, *, first: int = 0) -> None:
        """`first` is the number of the first person. Raises InputError where a judge is missing."""
        self._first, self._model = first, model
        self._faces = MiniatureFaces(model / "faces")
        folder = model / "judges"
        self._attributes = network(folder / "attributes.safetensors", judges.ATTRIBUTES)
        self._recogniser = network(folder / "recogniser.safetensors", judges.RECOGNISER)
        self._features = network(folder / "recogniser.safetensors", judges.RECOGNISER, small_resnet.features)
        vision = load_module(lambda rngs: CLIPVisionModel(clip.JUDGE_VISION, rngs=rngs), folder / "image_encoder")
        text = load_module(lambda rngs: CLIPTextModel(clip.SECOND, rngs=rngs), folder / "text_encoder")
        self._see = _compiled(vision, lambda module, images: unit(module(preprocess(images)).image_embeds))
        self._read = _compiled(text, lambda module, ids: unit(module(ids).pooled))
        self._tokenize = CLIPTokenizer.from_folder(model / "tokenizer")

    @property
    def name(self) -> str:
        """The judges' fingerprint."""
        return f"miniature {fingerprint(self._model / 'judges')}"

    @property
    def judges(self) -> dict[str, str]:
        """All of them in the model's judges/."""
        clip_judge = "a CLIP of the miniature, trained apart from its text and image encoders"
        return {
            "m_face": "a recogniser of the miniature, trained apart from the one that conditions",
            "clip_i": f"{clip_judge}, of faces",
            "clip_t": f"{clip_judge}, of pictures and texts",
            "attributes": "a classifier of the miniature's attributes",
        }

    def people(self, count: int) -> list[Person]:
        """People of the test split, hatless."""
        known = avatars.PEOPLE["test"] - self._first
        if count > known:
            raise InputError(f"There are {known} test people: take no more identities than that.")
        return [_person(i) for i in range(self._first, self._first + count)]

    def prompts(self, count: int) -> list[Prompt]:
        """Of avatar_captions.PROMPTS, photographs and other styles by turns."""
        listed = [Prompt(text, style, said) for said, style, text in PROMPTS]
        if count > len(listed):
            raise InputError(f"There are {len(listed)} prompts: take no more than that.")
        half = len(listed) // 2
        turns = [prompt for pair in zip(listed[:half], listed[half:], strict=True) for prompt in pair]
        return turns[:count]

    def random_prompts(self, count: int) -> list[Prompt]:
        """All attributes said, all styles by turns; no hat and no accessory are not something that is said."""
        found = []
        for i in range(count):
            scene = avatars.complete({}, 10**7 + i)
            style = avatars.CLASSES["style"][i % len(avatars.CLASSES["style"])]
            said = {name: str(value) for name, value in asdict(scene).items() if value != "none"}
            found.append(Prompt(caption(scene, style, i), style, said))
        return found

    def drawn(self, person: Person, prompt: Prompt) -> UInt8[np.ndarray, "s s 3"]:
        """The person as the prompt says, by the world's own pen; what it leaves open is no hat and no accessory."""
        said = {"hat": "none", "accessory": "none", **prompt.attributes}
        return avatars.render(avatars.Person(**person.look), said, prompt.style, pictures.SIZE, int(person.name))

    def judge(self, pictures: Pictures) -> Seen:
        """What the judges see, in batches of few sizes."""
        most = _BATCHES[-1]
        parts = [self._judge(pictures[start : start + most]) for start in range(0, len(pictures), most)]
        attributes = {name: [value for part in parts for value in part.attributes[name]] for name in avatars.CLASSES}
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("found", "face", "clip_face", "clip", "features")
        }
        return Seen(attributes=attributes, **arrays)

    def _judge(self, images: Pictures) -> Seen:
        count = len(images)
        size = next(size for size in _BATCHES if size >= count)
        padded = np.concatenate([images, np.repeat(images[-1:], size - count, axis=0)])
        found = [self._faces.detect(image) for image in padded]
        there = np.array([bool(faces) for faces in found])
        empty = np.zeros((judges.RECOGNISER.size,) * 2 + (3,), np.uint8)
        crops = [
            aligned(image, faces[0].keypoints) if faces else empty for image, faces in zip(padded, found, strict=True)
        ]
        size = clip.JUDGE_VISION.image_size
        heads = [
            clip.face_crop(image, faces[0].keypoints, size) if faces else np.zeros((size, size, 3), np.uint8)
            for image, faces in zip(padded, found, strict=True)
        ]
        face = np.array(unit(self._recogniser(np.stack(crops))))
        clip_face = np.array(self._see(np.stack(heads)))
        face[~there], clip_face[~there] = np.nan, np.nan
        outputs = self._attributes(padded)
        named = {
            name: [avatars.CLASSES[name][k] for k in np.argmax(np.asarray(logits), axis=1)[:count]]
            for name, logits in judges.split(outputs).items()
        }
        # Channels of unit length at each place: the squared distance of two such rows is LPIPS' (Zhang et al. 2018,
        # Eq. 1) with all weights alike.
        maps = np.array(unit(self._features(np.stack(crops))))
        features = maps.reshape(len(maps), -1) / np.sqrt(maps.shape[1] * maps.shape[2])
        features[~there] = np.nan
        seen = np.asarray(self._see(padded))
        return Seen(there[:count], face[:count], clip_face[:count], seen[:count], named, features[:count])

    def judge_texts(self, texts: list[str]) -> Float[np.ndarray, "n e"]:
        """By the judging CLIP's text encoder."""
        return np.asarray(self._read(self._tokenize(texts)))

    def expected(self, person: Person, prompt: Prompt) -> tuple[dict[str, str], dict[str, str]]:
        """What a right picture shows, of the prompt and of the person."""
        return _shown(avatars.Person(**person.look), prompt)

    def asked(self, prompt: Prompt) -> dict[str, str]:
        """As of somebody whose beard hides what a beard can: the base alone may draw one."""
        return _shown(replace(avatars.person(0, "test"), facial_hair="long beard"), prompt)[0]

    def chance(self) -> dict[str, float]:
        """Of 1,000 test people."""
        people, shares = [avatars.person(i, "test") for i in range(1000)], {}
        for name in _LOOKS:
            values = [getattr(person, name) for person in people]
            values = [value for value in values if value in avatars.CLASSES[name]]
            shares[name] = max(values.count(value) for value in set(values)) / len(values)
        return shares


def _shown(person: avatars.Person, prompt: Prompt) -> tuple[dict[str, str], dict[str, str]]:
    labels = avatars.attributes(person, prompt.attributes, prompt.style)
    shown = {name: avatars.CLASSES[name][label] for name, label in labels.items() if label >= 0}
    asked = {name: value for name, value in shown.items() if name in (*prompt.attributes, "style")}
    return asked, {name: value for name, value in shown.items() if name in _LOOKS}


def _person(i: int) -> Person:
    look = avatars.person(i, "test")
    photos = [_photo(look, i, k) for k in range(_OTHERS + 1)]
    return Person(f"{i:04}", photos[0], np.stack(photos[1:]), {k: str(v) for k, v in asdict(look).items()})


def _photo(look: avatars.Person, i: int, k: int) -> UInt8[np.ndarray, "s s 3"]:
    bare = {"hat": "none", "accessory": "none"}
    return avatars.render(look, bare, "photo", pictures.SIZE, 10**6 + 100 * i + k)


def _compiled(module: Any, call: Callable[[Any, Any], Any]) -> Callable[[np.ndarray], jax.Array]:
    graph, state = nnx.split(module)
    return jax.jit(lambda inputs: call(nnx.merge(graph, state), inputs))
