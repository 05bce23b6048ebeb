"""What an experiment says: frozen dataclasses, and how a file and `--set key=value` make one."""

import ast
import dataclasses
import difflib
import importlib.util
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infinite_id_jax.errors import InputError
from infinite_id_jax.evaluation.study import StudyConfig
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.stable_diffusion.config import UNetConfig
from infinite_id_jax.training.objective import MethodConfig
from infinite_id_jax.training.state import OptimizerConfig

SDXL = UNetConfig(
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The frozen base."""

    path: str  # SDXL folder in diffusers' layout, single file, hub id owner/name[@revision], or "miniature"
    dtype: str = "bfloat16"
    sharded: bool = False  # divide the base over fsdp and tensor too; else each device holds all of it
    image_encoder: str | None = None  # folder, if not image_encoder/ of the model; for id_features="on_device"
    architecture: UNetConfig = SDXL  # what --dry-run counts with where `path` is not at hand


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the loader reads: a folder made by `python -m data_pipeline`."""

    path: str
    batch_size: int  # rows of one step over all devices
    photos_per_person_cap: int = 50  # a person counts as min(photos, cap)
    workers: int = 0  # reading processes beside this one; 0 reads in threads
    prefetch: int = 4  # batches read ahead
    resolution: int = 1024  # pixels of a target, for --dry-run alone: records bring their own


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often, how much is kept."""

    steps: int
    seed: int = 0
    mesh: str = "data=-1"  # sizes of data, fsdp, tensor; -1 takes all devices that are left
    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 3
    validate_every: int = 0  # 0 is never
    validation_batches: int = 8
    sample_every: int = 0  # 0 is never
    sample_prompts: tuple[str, ...] = ("a photo of a person in the snow", "a comic book drawing of a person")
    sample_people: int = 4
    sample_steps: int = 30
    tensorboard: bool = False
    wandb: str | None = None  # the project to log to


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    method: MethodConfig = dataclasses.field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    prepare: Callable[[Path, "TrainConfig"], "TrainConfig"] | None = None  # makes what the run reads, where it can

    def __post_init__(self) -> None:
        counts = ("steps", "log_every", "checkpoint_every", "keep")
        for name in (*counts, "validation_batches", "sample_people", "sample_steps"):
            if getattr(self.run, name) < 1:
                raise InputError(f"run.{name} is {getattr(self.run, name)}: give 1 or more.")
        if self.data.batch_size < 1 or self.data.batch_size % self.optimizer.accumulate:
            raise InputError(
                f"data.batch_size {self.data.batch_size} must be a positive multiple of optimizer.accumulate "
                f"{self.optimizer.accumulate}."
            )


def load_config(path: Path, settings: Sequence[str] = ()) -> TrainConfig:
    """The `config` of a Python file, with each "section.key=value" put in its place.

    Raises InputError for a file without one, an unknown key or a value of another type.
    """
    config = getattr(load_module(path), "config", None)
    if not isinstance(config, TrainConfig):
        raise InputError(f"The configuration {path} must define `config`, a configs.base.TrainConfig.")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting} is not of the form key=value, as in optimizer.learning_rate=1e-5.")
        config = _replace(config, key.split("."), value, key)
    return config


def load_study(path: Path) -> StudyConfig:
    """The `study` of a configuration file. Raises InputError for a file without one."""
    study = getattr(load_module(path), "study", None)
    if not isinstance(study, StudyConfig):
        raise InputError(f"The configuration {path} defines no `study`: evaluate configs/miniature.py, or write one.")
    return study


def load_module(path: Path) -> types.ModuleType:
    """What a configuration file defines. Raises InputError where it is missing or fails."""
    if not path.is_file():
        raise InputError(f"The configuration {path} does not exist: give a file such as configs/infinite_id_sdxl.py.")
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"The configuration {path} is no Python file: it must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"The configuration {path} fails: {type(error).__name__}: {error}") from None
    return module


def _replace(node: Any, parts: list[str], value: str, key: str) -> Any:
    fields = typing.get_type_hints(type(node))
    if parts[0] not in fields:
        near = difflib.get_close_matches(parts[0], fields, 1)
        hint = f"did you mean {near[0]}" if near else f"choose from {', '.join(fields)}"
        raise InputError(f"--set {key}: there is no {parts[0]}; {hint}?")
    child = getattr(node, parts[0])
    if len(parts) > 1 and dataclasses.is_dataclass(child):
        new = _replace(child, parts[1:], value, key)
    elif len(parts) > 1 or dataclasses.is_dataclass(child):
        raise InputError(f"--set {key}: name one value, such as optimizer.learning_rate.")
    else:
        new = _parse(value, fields[parts[0]], key)
    return dataclasses.replace(node, **{parts[0]: new})


def _parse(text: str, kind: Any, key: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is str and not isinstance(value, str):
            value = text if type(None) not in options or value is not None else value
        if origin is float and type(value) is int:
            value = float(value)
        if origin is tuple and isinstance(value, list):
            value = tuple(value)
        if isinstance(origin, type) and type(value) is origin:
            return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise InputError(f"--set {key}={text}: the value must be {names}.")
