"""Photos of a dataset that tensorflow-datasets has prepared on this machine; TensorFlow is not needed."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infinite_id_jax.errors import InputError, MissingExtraError

# Names under which datasets say who is in a picture, in order of preference.
PERSON_FEATURES = ("person", "identity", "subject", "name", "label")


def list_prepared(name: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(place for `read_prepared`, number, what is said) of each picture of dataset `name`, split by split.

    `name` is a folder, or lies in $TFDS_DATA_DIR or ~/tensorflow_datasets. Raises InputError if it is not prepared
    there in a format with random access, or lacks a picture or a person.
    """
    folder = _find(name)
    builder = _builder(folder)
    features = builder.info.features
    person = next((feature for feature in PERSON_FEATURES if feature in features), None)
    if "image" not in features or person is None:
        raise InputError(
            f"--input tfds:{name} has the features {', '.join(features)}: it needs `image`, and one of "
            f"{', '.join(PERSON_FEATURES)}."
        )
    for split in sorted(builder.info.splits):
        place = f"tfds:{folder}/{split}"
        for number in range(builder.info.splits[split].num_examples):
            example = _open(place)[number]
            said = {key: _text(features[key], value) for key, value in example.items() if key != "image"}
            yield place, number, said | {"person": said[person], "path": f"{split}/{number}"}


def read_prepared(place: str, number: int) -> bytes:
    """The encoded picture `number` of a `list_prepared` place."""
    return bytes(_open(place)[number]["image"])


def _text(feature: Any, value: Any) -> str:
    if hasattr(feature, "int2str"):
        return feature.int2str(int(value))
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _find(name: str) -> Path:
    """The folder with dataset_info.json: the dataset's, its configuration's or its version's."""
    home = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    for folder in (Path(name).expanduser(), home / name):
        found = sorted(path.parent for path in folder.glob("**/dataset_info.json"))
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(str(path.relative_to(folder.parent)) for path in found)
            raise InputError(f"--input tfds:{name} is prepared several times: give one of {several}.")
    raise InputError(f"--input tfds:{name} is not prepared in {home}: prepare it with file_format='array_record'.")


@functools.cache
def _builder(folder: Path) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise MissingExtraError("An input tfds:NAME", "train") from None
    return tfds.builder_from_directory(str(folder))


@functools.cache
def _open(place: str) -> Any:
    """The examples of a split, their pictures as encoded bytes."""
    from tensorflow_datasets.core import decode

    folder, _, split = place.removeprefix("tfds:").rpartition("/")
    try:
        return _builder(Path(folder)).as_data_source(split, decoders={"image": decode.SkipDecoding()})
    except NotImplementedError:
        raise InputError(f"{folder} has no random access: prepare it with file_format='array_record'.") from None
