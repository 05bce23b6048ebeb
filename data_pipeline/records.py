"""Records of photos on disk: ArrayRecord shards in tensorflow-datasets' layout, each with a mark of completion.

A dataset D is D/records (what `tfds.builder_from_directory` reads), D/marks (one JSON file a shard, written after it:
where a mark is, its shard is whole) and, last of all, D/dataset.json. TensorFlow is never imported.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float32, Int32, UInt8

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.files import replacing, save_json

# tensorflow-datasets and ArrayRecord are imported where they are used: the extra `train` brings them.

NAME = "photos"  # of the dataset, as tensorflow-datasets sees it
SPLITS = ("train", "validation")
# One record is one chunk, read alone; the features do not compress, and zstd made reading several times slower.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What every record of a dataset holds."""

    face_backend: str  # the recogniser of `face_embedding`
    face_dim: int  # E
    clip_dim: int  # C
    clip_tokens: int  # L
    clip_layer: str  # last | penultimate
    clip_size: int  # s, pixels: the image encoder's image_size
    recogniser_size: int  # r, pixels
    latent_channels: int  # c
    id_features: str  # cached: with clip_hidden_states | on_device: without
    model: str  # fingerprint of the VAE and the image encoder


@dataclasses.dataclass(frozen=True)
class PhotoRecord:
    """One photo of one person; the arrays of a record that was read are read-only."""

    person: str
    photo: str  # sha256 of the source's bytes, in hex
    caption: str  # "" if there is none
    clip_crop: UInt8[np.ndarray, "s s 3"]
    recogniser_crop: UInt8[np.ndarray, "r r 3"]
    face_embedding: Float32[np.ndarray, " E"]  # not normalised
    clip_hidden_states: BFloat16[np.ndarray, "L C"] | None  # None if id_features is on_device
    latent_mean: BFloat16[np.ndarray, "h w c"]  # of the VAE's posterior, unscaled
    latent_std: BFloat16[np.ndarray, "h w c"]
    time_ids: Int32[np.ndarray, "6"]  # original height, width; crop's top, left; target height, width (SDXL)


class IndexRow(NamedTuple):
    """What the loader must know of a record before it reads it; h, w of the latents."""

    person: str
    photo: str
    h: int
    w: int


class Mark(TypedDict):
    """Says that a shard is whole, and what is in it."""

    configuration: str
    count: int
    captions: int  # of the records, those that have one
    bytes: int  # of the file
    sha256: str
    index: list[list[Any]]  # IndexRows


def split_of(person: str, validation_share: float) -> str:
    """The split that all photos of a person go to, by hash of the name: no person is in both."""
    value = int.from_bytes(hashlib.sha256(person.encode()).digest()[:8], "big")
    return "validation" if value < validation_share * 2**64 else "train"


def shard_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    """The file of a shard, named as tensorflow-datasets expects."""
    return folder / "records" / f"{NAME}-{split}.array_record-{shard:05}-of-{shards:05}"


def _mark_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    return folder / "marks" / f"{split}-{shard:05}-of-{shards:05}.json"


@functools.cache
def _features(spec: DatasetSpec) -> Any:
    """The records' features (tfds.features.FeaturesDict)."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise MissingExtraError("Reading and writing records", "train") from None

    def tensor(shape: tuple[int | None, ...], dtype: Any) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    features = {
        "person": tfds.features.Text(),
        "photo": tfds.features.Text(),
        "caption": tfds.features.Text(),
        "clip_crop": tensor((spec.clip_size, spec.clip_size, 3), np.uint8),
        "recogniser_crop": tensor((spec.recogniser_size, spec.recogniser_size, 3), np.uint8),
        "face_embedding": tensor((spec.face_dim,), np.float32),
        "latent_mean": tensor((None, None, spec.latent_channels), ml_dtypes.bfloat16),
        "latent_std": tensor((None, None, spec.latent_channels), ml_dtypes.bfloat16),
        "time_ids": tensor((6,), np.int32),
    }
    if spec.id_features == "cached":
        features["clip_hidden_states"] = tensor((spec.clip_tokens, spec.clip_dim), ml_dtypes.bfloat16)
    return tfds.features.FeaturesDict(features)


def encode(record: PhotoRecord, spec: DatasetSpec) -> bytes:
    """A serialised tf.train.Example; ValueError if an array is not as `spec` says."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    if (record.clip_hidden_states is None) != (spec.id_features == "on_device"):
        raise ValueError(f"clip_hidden_states does not fit id_features={spec.id_features!r}.")
    features = _features(spec)
    values = {name: getattr(record, name) for name in features}
    example = ExampleSerializer(features.get_serialized_info()).get_tf_example(features.encode_example(values))
    # Deterministic: the order of a map's entries is otherwise the process's own.
    return example.SerializeToString(deterministic=True)


def decode(serialised: bytes, spec: DatasetSpec) -> PhotoRecord:
    """`encode` backwards, bit for bit; the arrays are views of the parsed message."""
    values = _features(spec).deserialize_example_np(serialised)
    text = {name: values.pop(name).decode() for name in ("person", "photo", "caption")}
    return PhotoRecord(**text, **({"clip_hidden_states": None} | values))


def write_shard(
    folder: Path,
    split: str,
    shard: int,
    shards: int,
    spec: DatasetSpec,
    records: Iterable[PhotoRecord],
    configuration: str,
) -> None:
    """Write one shard whole or not at all, then its mark; its bytes depend on the records alone.

    The records are taken one at a time. `configuration` is a hash of all that decides what they are.
    Raises InputError for what the disk refuses.
    """
    path, mark_path = shard_path(folder, split, shard, shards), _mark_path(folder, split, shard, shards)
    mark_path.unlink(missing_ok=True)  # a mark without its shard would be worse than a shard without its mark
    with replacing(path) as beside:
        index, captions = _write_records(beside, spec, records)
        with beside.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        size = beside.stat().st_size
    mark = Mark(
        configuration=configuration,
        count=len(index),
        captions=captions,
        bytes=size,
        sha256=checksum,
        index=index,
    )
    with replacing(mark_path) as beside:
        beside.write_text(json.dumps(mark, separators=(",", ":")))


def _write_records(path: Path, spec: DatasetSpec, records: Iterable[PhotoRecord]) -> tuple[list[list[Any]], int]:
    """The rows of the index, and how many records have a caption."""
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError:
        raise MissingExtraError("Writing records", "train") from None
    path.touch()  # the writer itself says nothing of a folder it may not write to
    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    index, captions = [], 0
    try:
        for record in records:
            writer.write(encode(record, spec))
            index.append(list(IndexRow(record.person, record.photo, *record.latent_mean.shape[:2])))
            captions += bool(record.caption)
    finally:
        _close(writer, path)
    return index, captions


def _close(writer: Any, path: Path) -> None:
    """Close a writer, which only now tells that the disk is full."""
    try:
        writer.close()
    except RuntimeError as error:
        reason = str(error).removeprefix("write() failed: ").partition(";")[0]
        raise OSError(None, reason, str(path)) from None


def _read_mark(folder: Path, split: str, shard: int, shards: int) -> Mark | None:
    """The mark of a whole shard; None where mark or shard are missing or do not belong together."""
    try:
        mark: Mark = json.loads(_mark_path(folder, split, shard, shards).read_bytes())
        size = shard_path(folder, split, shard, shards).stat().st_size
        return mark if size == mark["bytes"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def shard_is_complete(folder: Path, split: str, shard: int, shards: int, configuration: str) -> bool:
    """Whether a shard need not be written again, by its mark and size; InputError if its configuration is another."""
    mark = _read_mark(folder, split, shard, shards)
    if mark is not None and mark["configuration"] != configuration:
        raise InputError(
            f"{shard_path(folder, split, shard, shards)} was made with another configuration "
            f"({mark['configuration']}, not {configuration}): choose another output folder, or delete this one."
        )
    return mark is not None


def finish(folder: Path, spec: DatasetSpec, shards_per_split: Mapping[str, int], configuration: str) -> None:
    """Write tensorflow-datasets' metadata, clear what killed writers left, and declare the dataset finished.

    Raises InputError if a shard is missing.
    """
    marks: dict[str, list[Mark]] = {split: [] for split in shards_per_split}
    for split, shards in shards_per_split.items():
        for shard in range(shards):
            shard_is_complete(folder, split, shard, shards, configuration)
            mark = _read_mark(folder, split, shard, shards)
            if mark is None:
                raise InputError(
                    f"{shard_path(folder, split, shard, shards)} is not finished: run the offline stage again."
                )
            marks[split].append(mark)
    for partial in (*folder.glob("records/.*.partial"), *folder.glob("marks/.*.partial")):
        partial.unlink()
    _write_metadata(folder / "records", spec, marks)
    content = {
        "spec": dataclasses.asdict(spec),
        "configuration": configuration,
        "shards": dict(shards_per_split),
        "records": {split: sum(mark["count"] for mark in found) for split, found in marks.items()},
    }
    save_json(content, folder / "dataset.json")


def _write_metadata(folder: Path, spec: DatasetSpec, marks: Mapping[str, list[Mark]]) -> None:
    """features.json and dataset_info.json, which make the folder readable by tensorflow-datasets alone."""
    import tensorflow_datasets as tfds
    from etils import epath

    template = tfds.core.ShardedFileTemplate(epath.Path(folder), dataset_name=NAME, filetype_suffix="array_record")
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(spec),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[mark["count"] for mark in found],
                num_bytes=sum(mark["bytes"] for mark in found),
                filename_template=template.replace(split=split),
            )
            for split, found in marks.items()
            if found
        ],
        filename_template=template,
        check_data=False,  # that would need TensorFlow
        description="Photos of people: crops, face and CLIP features, VAE latents.",
    )


class _Shard(NamedTuple):
    """A whole file, as ArrayRecord's data source takes it without opening it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class PhotoDataset:
    """One split of a finished dataset, by random access; may be pickled, and read by many threads.

    `people`, `photos` and `buckets` ([n, 2], latent h and w) describe the records without reading them; `captions`
    counts those that have one.
    `fingerprint` is equal for equal records of equal meaning, wherever they lie.
    """

    def __init__(self, folder: Path, split: str):
        """Open a split; InputError if the dataset is unfinished or a shard is missing or cut short."""
        description = _read_description(folder)
        self.folder, self.split = folder, split
        self.spec = DatasetSpec(**description["spec"])
        shards = description["shards"].get(split, 0)
        self.captions = 0
        self._shards, rows, digest = [], [], hashlib.sha256(json.dumps(description["spec"]).encode())
        for shard in range(shards):
            mark, path = _read_mark(folder, split, shard, shards), shard_path(folder, split, shard, shards)
            if mark is None:
                raise InputError(f"{path} is missing or damaged: delete it and run the offline stage again.")
            rows += [IndexRow(*row) for row in mark["index"]]
            digest.update(mark["sha256"].encode())
            self.captions += mark["captions"]
            if mark["count"]:
                self._shards.append(_Shard(str(path), 0, mark["count"], mark["count"]))
        self.people = [row.person for row in rows]
        self.photos = [row.photo for row in rows]
        self.buckets = np.asarray([(row.h, row.w) for row in rows], np.int32).reshape(-1, 2)
        self.fingerprint = digest.hexdigest()[:16]
        self._open()

    def _open(self) -> None:
        """Read a record, so that all that is imported late is imported now.

        Of several threads that import tensorflow-datasets' parts at once each may wait for another, for ever.
        """
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError:
            raise MissingExtraError("Reading records", "train") from None
        if self._shards:
            self._source = ArrayRecordDataSource(self._shards)
            self[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_source"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, i: int) -> PhotoRecord:
        """Read record i; InputError if its bytes are not those that were written."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            serialised = self._source[i]
        except RuntimeError as error:
            raise InputError(
                f"Record {i} of {self.split} in {self.folder} cannot be read ({error}): delete its shard and run the "
                "offline stage again."
            ) from None
        return decode(serialised, self.spec)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        return json.loads(path.read_bytes())
    except OSError:
        raise InputError(
            f"{folder} holds no finished dataset: make one with `python -m data_pipeline --output {folder}`, "
            "to the end."
        ) from None
    except ValueError:
        raise InputError(f"{path} is damaged: delete it and run the offline stage again.") from None
