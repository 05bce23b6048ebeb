"""Everything that decides what the records hold: its hash marks each shard, and a change is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path

from data_pipeline.records import DatasetSpec
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import fingerprint, save_json
from infinite_id_jax.stable_diffusion.config import CLIPVisionConfig, VAEConfig

# Cosines of two embeddings above which a backend takes two faces for one person. dlib's own line is a distance of 0.6
# between embeddings of norm 1.4: 1 - 0.6^2 / (2 * 1.4^2). ArcFace's same-person cosines start at about 0.3.
SIMILARITY = {"offline": 0.91, "insightface": 0.3}

ID_FEATURES = ("cached", "on_device")
CLIP_LAYERS = ("last", "penultimate")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The offline stage's configuration; `input` and `model` are digests. Raises InputError for a bad value."""

    input: str  # of the list of photos, with what is said of each
    model: str  # of the VAE and the image encoder
    face_backend: str  # FaceBackend.name
    similarity: float  # least cosine of a face to the mean of its person's
    resolutions: tuple[int, ...] = (512, 1024)  # pixels a side of the target pictures
    id_features: str = "cached"
    clip_layer: str = "last"
    dtype: str = "float32"  # of the encoders; records are bfloat16
    batch_size: int = 8  # photos encoded at once: a row's last bits may depend on it
    validation_share: float = 0.02  # of the people
    photos_per_shard: int = 256
    min_photos: int = 2  # of a person: pairs need two
    min_face: int = 48  # pixels of the face's shorter side
    min_score: float = 0.6  # of the detector
    near_duplicate: int = 4  # bits of 64 in which the hashes of near duplicates differ at most; -1 keeps them

    def __post_init__(self) -> None:
        for name, choices in (("id_features", ID_FEATURES), ("clip_layer", CLIP_LAYERS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{flag(name)} {getattr(self, name)} is unknown: choose {' or '.join(choices)}.")
        for name in ("batch_size", "photos_per_shard", "min_photos"):
            if getattr(self, name) < 1:
                raise InputError(f"{flag(name)} {getattr(self, name)} is too small: give 1 or more.")
        for name, least, most in (
            ("validation_share", 0, 1),
            ("min_score", 0, 1),
            ("similarity", -1, 1),
            ("min_face", 0, 10_000),
            ("near_duplicate", -1, 64),
        ):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{flag(name)} {getattr(self, name)} is out of range: give {least} to {most}.")
        if not self.resolutions or any(size < 64 or size > 4096 or size % 64 for size in self.resolutions):
            raise InputError(f"--resolutions {self.resolutions}: give multiples of 64 from 64 to 4096, as 512,1024.")

    @property
    def hash(self) -> str:
        """16 hex digits that differ whenever a value does."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def check_same(config: PipelineConfig, folder: Path) -> None:
    """Raises InputError if `folder` was begun with another configuration, naming what differs."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise InputError(f"{folder} is a file, or lies in one: choose another --output.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): choose another --output, or delete {folder}.") from None
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    names = sorted(saved.keys() | now.keys())
    changes = [f"{name}: {saved.get(name)} -> {now.get(name)}" for name in names if saved.get(name) != now.get(name)]
    if changes:
        raise InputError(
            f"{folder} was begun with another configuration ({'; '.join(changes)}): choose another --output, "
            "or delete this one."
        )


def save(config: PipelineConfig, folder: Path) -> None:
    """Write config.json. Raises InputError for what the disk refuses."""
    save_json(dataclasses.asdict(config), folder / "config.json")


def read_spec(model: Path, config: PipelineConfig, face_dim: int, recogniser_size: int) -> DatasetSpec:
    """What the records will hold, from the model's configurations alone. Raises InputError for what is missing."""
    vision, vae = read_configs(model)
    if any(size % vae.downscale for size in config.resolutions):
        raise InputError(f"--resolutions {config.resolutions}: give multiples of {vae.downscale}.")
    return DatasetSpec(
        face_backend=config.face_backend,
        face_dim=face_dim,
        clip_dim=vision.hidden_size,
        clip_tokens=vision.tokens,
        clip_layer=config.clip_layer,
        clip_size=vision.image_size,
        recogniser_size=recogniser_size,
        latent_channels=vae.latent_channels,
        id_features=config.id_features,
        model=config.model,
    )


def read_configs(model: Path) -> tuple[CLIPVisionConfig, VAEConfig]:
    """The configurations of the two encoders in a model folder. Raises InputError if one is missing."""
    for part in ("image_encoder", "vae"):
        if not (model / part / "config.json").is_file():
            raise InputError(f"--model {model} holds no {part}: give an SDXL folder with vae/ and image_encoder/.")
    vision = CLIPVisionConfig.from_json(model / "image_encoder" / "config.json")
    return vision, VAEConfig.from_json(model / "vae" / "config.json")


def model_fingerprint(model: Path) -> str:
    """16 hex digits of the two encoders; the rest of the model plays no part in the records."""
    parts = fingerprint(model / "image_encoder") + fingerprint(model / "vae")
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
