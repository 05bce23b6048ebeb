"""Pictures and their scores in a folder, drawn and judged where they are missing."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from infinite_id_jax.errors import NoFaceError
from infinite_id_jax.evaluation.metrics import cosine, pairwise_cosine
from infinite_id_jax.evaluation.study import BASE, DRAWN, INTERPOLATION, MIXING, REFERENCE
from infinite_id_jax.evaluation.tables import STYLE
from infinite_id_jax.evaluation.world import Person, Pictures, Prompt, Seen, World
from infinite_id_jax.files import replacing
from infinite_id_jax.images import is_whole, save_png


class Results(NamedTuple):
    """All that was scored."""

    rows: list[dict[str, Any]]  # of people x prompts
    base: list[dict[str, Any]]  # of the base's pictures
    steps: list[dict[str, Any]]  # of interpolations: similarity to the first and to the second, by weight
    mixtures: list[dict[str, Any]]  # the same of two people's tokens side by side
    features: dict[str, Float[np.ndarray, "n f"]]  # of each method's faces, in the order of its rows
    faces: dict[str, Float[np.ndarray, "n d"]]  # the judging recogniser's embeddings of them
    people: list[Person]
    prompts: list[Prompt]
    photos: Seen  # of everybody's given photo
    others: Seen  # of everybody's other photos, one person after the other
    chance: dict[str, float]  # of guessing what a person looks like
    asked: dict[str, float]  # of guessing what the prompts ask for
    asked_of_base: dict[str, float]  # and those of the base alone
    judges: dict[str, float]  # accuracy on pictures that the world drew itself
    judged_by: Mapping[str, str]  # World.judges


class Judged:
    """The scores of a study. What the folder already holds is not drawn again."""

    def __init__(
        self,
        world: World,
        people: list[Person],
        prompts: list[Prompt],
        group: int,
        folder: Path,
        part: tuple[int, int] = (1, 1),
    ) -> None:
        """`group` neighbouring people share the noise of a prompt; part (i, n) draws the i-th of n parts alone."""
        self.world, self.people, self.prompts, self.folder = world, people, prompts, folder
        self._group, self._part = group, part
        self._texts = world.judge_texts([prompt.text for prompt in prompts])
        self._base_prompts: list[Prompt] = []
        self._scored: list[tuple[str, int]] = []
        self._others: list[tuple[str, int]] = []

    def check(self) -> None:
        """Raises NoFaceError for a given photo in which the judges find no face: nothing could be compared with it."""
        for person, found in zip(self.people, self.seen_photos.found, strict=True):
            if not found:
                raise NoFaceError(f"No face was found in the photo of {person.name}: take --identities before them.")

    @cached_property
    def photos(self) -> Pictures:
        """Everybody's given photo."""
        return np.stack([person.photo for person in self.people])

    @cached_property
    def seen_photos(self) -> Seen:
        return self.world.judge(self.photos)

    def drawn(self, prompt: Prompt) -> Pictures:
        """Everybody as a perfect model would draw them."""
        return np.stack([self.world.drawn(person, prompt) for person in self.people])

    def method(
        self,
        name: str,
        p: int,
        draw: Callable[[], Pictures],
        more: Callable[[], Sequence[Mapping[str, float]]] | None = None,
    ) -> None:
        """Score a method's pictures of everybody in prompt `p`; `more` gives each person's row further columns."""
        self._scored.append((name, p))
        path = self._path(name, p)
        if self._is_drawn(path, p // 2):  # neighbours are of two kinds, of which each part has some
            return
        files = [self._file(name, p, i) for i in range(len(self.people))]
        images = self._kept(files, draw)
        seen = self.world.judge(images)
        rows = [self._row(name, p, i, seen) for i in range(len(self.people))]
        if more is not None:
            rows = [{**row, **columns} for row, columns in zip(rows, more(), strict=True)]
        for row, image in zip(rows, images, strict=True):
            if name not in (DRAWN, REFERENCE):  # which nobody generated
                save_png(Image.fromarray(image), self.folder / row["file"], {"prompt": row["text"], "method": name})
            else:
                _save_plain(image, self.folder / row["file"])
        self._save(path, rows, seen)

    def _row(self, name: str, p: int, i: int, seen: Seen) -> dict[str, Any]:
        person, prompt = self.people[i], self.prompts[p]
        asked, looks = self.world.expected(person, prompt)
        given = self.seen_photos
        said = {f"prompted_{key}": float(seen.attributes[key][i] == value) for key, value in asked.items()}
        kept = {f"identity_{key}": float(seen.attributes[key][i] == value) for key, value in looks.items()}
        content = [right for name, right in said.items() if name != STYLE]
        found = bool(seen.found[i])
        return {
            "method": name,
            "identity": person.name,
            "group": i // self._group,
            "prompt": p,
            "style": prompt.style,
            "text": prompt.text,
            "file": self._file(name, p, i),
            "found": float(found),
            "m_face": float(cosine(seen.face[i : i + 1], given.face[i : i + 1])[0]) if found else None,
            "rank_1": float(found and self._nearest(seen.face[i]) == i),
            "clip_i": float(cosine(seen.clip_face[i : i + 1], given.clip_face[i : i + 1])[0]) if found else None,
            "clip_t": float(seen.clip[i] @ self._texts[p]),
            "prompted": float(np.mean(content)) if content else None,
            "identity_attributes": float(np.mean(list(kept.values()))) if kept else None,
            **said,
            **kept,
        }

    def _file(self, name: str, p: int, i: int) -> str:
        return f"images/{name}/prompt{p:02}/{self.people[i].name}.png"

    def _kept(self, files: Sequence[str], draw: Callable[[], Pictures]) -> Pictures:
        """The pictures of an earlier run whose scores were deleted, or not yet written, where all are there."""
        paths = [self.folder / file for file in files]
        if not all(is_whole(path) for path in paths):
            return draw()
        return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])

    def _nearest(self, face: np.ndarray) -> int:
        """Whose given photo is the most like a face."""
        return int(np.argmax(np.nan_to_num(pairwise_cosine(face[None], self.seen_photos.face)[0], nan=-2.0)))

    def base(self, count: int, draw: Callable[[Sequence[Prompt], int], Pictures], batch: int = 50) -> None:
        """Score the base alone on `count` prompts that say all, and its judge on the world's own pictures of them."""
        prompts = self.world.random_prompts(count)
        self._base_prompts = prompts
        for number, start in enumerate(tqdm(range(0, count, batch), "base", unit="batch")):
            some = prompts[start : start + batch]
            path = self._path(BASE, start)
            self._others.append((BASE, start))
            if self._is_drawn(path, number):
                continue
            files = [f"images/{BASE}/{start + i:04}.png" for i in range(len(some))]
            images = self._kept(files, partial(draw, some, start))
            seen = self.world.judge(images)
            people = [self.people[(start + i) % len(self.people)] for i in range(len(some))]
            drawn = np.stack([self.world.drawn(*each) for each in zip(people, some, strict=True)])
            judged = self.world.judge(drawn)
            rows = []
            for i, prompt in enumerate(some):
                asked, shown = self.world.asked(prompt), self.world.expected(people[i], prompt)[0]
                right = {f"prompted_{key}": float(seen.attributes[key][i] == value) for key, value in asked.items()}
                right |= {f"drawn_{key}": float(judged.attributes[key][i] == value) for key, value in shown.items()}
                save_png(Image.fromarray(images[i]), self.folder / files[i], {"prompt": prompt.text})
                rows.append({"text": prompt.text, "style": prompt.style, "file": files[i], "index": start + i, **right})
            self._save(path, rows)

    def between(
        self,
        name: str,
        weights: Sequence[float | None],
        draw: Callable[[int, Sequence[float | None], int], Pictures],
        prompts: Sequence[int],
    ) -> None:
        """Score what is drawn of each even person (by number) and the next, for some prompts: one for each weight."""
        for first in tqdm(range(0, len(self.people) - 1, 2), name, unit="pair"):
            self._others.append((name, first))
            path = self._path(name, first)
            if self._is_drawn(path, first // 2):
                continue
            rows = []
            for p in prompts:
                images = draw(first, weights, p)
                seen = self.world.judge(images)
                rows += self._steps(name, first, p, weights, seen)
                for row, image in zip(rows[-len(weights) :], images, strict=True):
                    save_png(Image.fromarray(image), self.folder / row["file"], {"prompt": self.prompts[p].text})
            self._save(path, rows)

    def _steps(
        self, name: str, first: int, p: int, weights: Sequence[float | None], seen: Seen
    ) -> list[dict[str, Any]]:
        one, other = self.people[first].name, self.people[first + 1].name
        rows = []
        for k, weight in enumerate(weights):
            near = [
                float(cosine(seen.face[k : k + 1], self.seen_photos.face[i : i + 1])[0]) for i in (first, first + 1)
            ]
            rest = np.delete(pairwise_cosine(seen.face[k : k + 1], self.seen_photos.face)[0], [first, first + 1])
            near.append(float(np.mean(rest[~np.isnan(rest)])) if len(rest) else np.nan)
            to_first, to_second, to_others = (None if np.isnan(value) else value for value in near)
            file = f"images/{name}/prompt{p:02}/{one}-{other}-{k}.png"
            row = {"first": one, "second": other, "prompt": p, "weight": weight, "file": file}
            rows.append({**row, "to_first": to_first, "to_second": to_second, "to_others": to_others})
        return rows

    def results(self) -> Results:
        """All that was scored, with the baselines."""
        rows = [row for key in self._scored for row in self._read(*key)]
        names = dict.fromkeys(name for name, _ in self._scored)
        seen = {name: [self._arrays(*key) for key in self._scored if key[0] == name] for name in names}
        return Results(
            rows=rows,
            base=[row for key in self._others if key[0] == BASE for row in self._read(*key)],
            steps=[row for key in self._others if key[0] == INTERPOLATION for row in self._read(*key)],
            mixtures=[row for key in self._others if key[0] == MIXING for row in self._read(*key)],
            features={name: np.concatenate([each["features"] for each in parts]) for name, parts in seen.items()},
            faces={name: np.concatenate([each["face"] for each in parts]) for name, parts in seen.items()},
            people=self.people,
            prompts=self.prompts,
            photos=self.seen_photos,
            others=self.world.judge(np.concatenate([person.others for person in self.people])),
            chance=self.world.chance(),
            asked=_guessed([self.world.asked(prompt) for prompt in self.prompts]),
            asked_of_base=_guessed([self.world.asked(prompt) for prompt in self._base_prompts]),
            judged_by=self.world.judges,
            judges=_judges([row for row in rows if row["method"] == DRAWN]),
        )

    def _is_drawn(self, path: Path, number: int) -> bool:
        """Whether the scores are there, or another process is to make them."""
        part, parts = self._part
        return path.is_file() or number % parts != part - 1

    def _path(self, name: str, number: int) -> Path:
        return self.folder / "scores" / name / f"{number:04}.json"

    def _save(self, path: Path, rows: list[dict[str, Any]], seen: Seen | None = None) -> None:
        if seen is not None:
            with replacing(path.with_suffix(".npz")) as beside, beside.open("wb") as file:
                np.savez(file, features=seen.features.astype(np.float16), face=seen.face.astype(np.float16))
        with replacing(path) as beside:  # last: a file of scores is what says that all is there
            beside.write_text(json.dumps(rows), encoding="utf-8")

    def _read(self, name: str, number: int) -> list[dict[str, Any]]:
        return json.loads(self._path(name, number).read_text())

    def _arrays(self, name: str, number: int) -> dict[str, np.ndarray]:
        with np.load(self._path(name, number).with_suffix(".npz")) as file:
            return {key: file[key].astype(np.float32) for key in file.files}


def _guessed(asked: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """How often the most frequent answer is right, by attribute."""
    values = {name: [each[name] for each in asked if name in each] for each in asked for name in each}
    return {name: max(map(each.count, set(each))) / len(each) for name, each in values.items()}


def _save_plain(image: np.ndarray, path: Path) -> None:
    with replacing(path) as beside:
        Image.fromarray(image).save(beside, format="png")


def _judges(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of the judges by column, where the right answer is known."""
    columns = dict.fromkeys(name for row in rows for name in row if name.startswith(("prompted_", "identity_")))
    columns.pop("identity_attributes", None)  # their mean
    return {name: float(np.mean([row[name] for row in rows if row.get(name) is not None])) for name in columns}
