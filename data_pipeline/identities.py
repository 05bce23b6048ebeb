"""The third stage: are a person's photos of that person, are they different, and are they enough?"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Int

from data_pipeline.config import PipelineConfig
from data_pipeline.faces import FoundFace
from data_pipeline.ingest import differing_bits
from data_pipeline.provenance import Row

_ROWS = 1024  # of a matrix of similarities held at once


def verify_people(faces: Iterable[FoundFace], config: PipelineConfig) -> tuple[list[FoundFace], list[Row]]:
    """The faces of the people that can be trained on, and the rows of those rejected; order by person, then input."""
    kept, rejected = [], []
    by_person = sorted(faces, key=lambda face: (face.row.person, face.row.index))
    for _, group in itertools.groupby(by_person, key=lambda face: face.row.person):
        good, bad = _verify_person(list(group), config)
        kept += good
        rejected += bad
    return kept, rejected


def _verify_person(faces: list[FoundFace], config: PipelineConfig) -> tuple[list[FoundFace], list[Row]]:
    similarity = similarity_to_person(np.stack([face.embedding for face in faces]), config.similarity)
    faces = [_with(face, similarity=round(float(cosine), 4)) for face, cosine in zip(faces, similarity, strict=True)]
    same = [face for face, cosine in zip(faces, similarity, strict=True) if cosine >= config.similarity]
    rejected = [face.row.rejected("other_person") for face in faces if face not in set(same)]
    originals = drop_near_duplicates(same, config.near_duplicate)
    rejected += [face.row.rejected("near_duplicate") for face in same if face not in set(originals)]
    if len(originals) < config.min_photos:
        return [], rejected + [face.row.rejected("too_few_photos") for face in originals]
    return originals, rejected


def similarity_to_person(embeddings: Float32[np.ndarray, "n E"], threshold: float) -> Float32[np.ndarray, " n"]:
    """Cosines to the person's mean face, the mean being over the face with most faces like it, and those.

    Two faces are alike from cosine `threshold` on. Photos of others, as long as they are fewer, do not move the mean.
    """
    directions = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    parts = [directions[start : start + _ROWS] @ directions.T for start in range(0, len(directions), _ROWS)]
    alike = np.concatenate([_count_alike(part, threshold) for part in parts])
    centre = int(np.argmax(alike))  # the first of equals
    mean = directions[directions @ directions[centre] >= threshold].mean(axis=0)
    return directions @ (mean / max(float(np.linalg.norm(mean)), 1e-12))


def _count_alike(cosines: Float32[np.ndarray, "m n"], threshold: float) -> Int[np.ndarray, " m"]:
    return (cosines >= threshold).sum(axis=1)


def drop_near_duplicates(faces: Sequence[FoundFace], bits: int) -> list[FoundFace]:
    """Of photos whose hashes differ in at most `bits` of 64 the largest, then the first; in the given order."""
    hashes = np.asarray([int(face.row.phash or "0", 16) for face in faces], np.uint64)
    areas = [face.photo_size[0] * face.photo_size[1] for face in faces]
    originals: list[int] = []
    for i in sorted(range(len(faces)), key=lambda i: -areas[i]):
        if not originals or differing_bits(int(hashes[i]), hashes[originals]).min() > bits:
            originals.append(i)
    return [faces[i] for i in sorted(originals)]


def _with(face: FoundFace, **found: float) -> FoundFace:
    row = dataclasses.replace(face.row, **found)
    return dataclasses.replace(face, source=dataclasses.replace(face.source, row=row))
