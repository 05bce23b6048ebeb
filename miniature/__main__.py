"""Trains the miniature, part by part: python -m miniature FOLDER [PART ...].

What is finished is not repeated, and what was interrupted goes on where it was. `python -m miniature.curves` tells what
each part cost.
"""

import argparse
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from examples.tiny_sdxl import SCHEDULER
from infinite_id_jax.command_line import exit_code
from infinite_id_jax.files import MINIATURE, save_json
from infinite_id_jax.weights.export import save_tensors, save_weights
from infinite_id_jax.weights.folder import load_tokenizers
from miniature import check, clip, faces, identities, judges, pictures, polish, unet, vae, vocabulary

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
CONFIG = Path(__file__).parent.parent / "configs" / "miniature.py"


def train_vae(folder: Path) -> None:
    model = vae.train(folder / "vae", drawn(folder, "base"))
    save_module(vae.scaled(model, drawn(folder, "base").images[:512]), folder / "model" / "vae")


def polish_decoder(folder: Path) -> None:
    """Latents stay as they are, so that this may come before or after the U-Net's training."""
    model = polish.polish(folder / "polish", vae.read(folder / "model" / "vae"), drawn(folder, "base"))
    save_module(model, folder / "model" / "vae")


def train_clip(folder: Path) -> None:
    model = clip.train(folder / "clip", drawn(folder, "base"), vocabulary.tokenizer(folder / "model"))
    save_module(model.vision, folder / "model" / "image_encoder")
    for name, text in zip(TEXT_ENCODERS, model.texts, strict=True):
        save_module(text, folder / "text" / name)


def train_detector(folder: Path) -> None:
    save_arrays(
        faces.train_detector(folder / "detector", drawn(folder, "base")), folder / "model" / "faces" / "detector"
    )


def train_recogniser(folder: Path) -> None:
    arrays = faces.train_recogniser(folder / "recogniser", drawn(folder, "identity"))
    save_arrays(arrays, folder / "model" / "faces" / "recogniser")


def train_judge_attributes(folder: Path) -> None:
    arrays = judges.train_attributes(folder / "judge_attributes", drawn(folder, "judge"))
    save_arrays(arrays, folder / "judges" / "attributes")


def train_judge_recogniser(folder: Path) -> None:
    arrays = judges.train_recogniser(folder / "judge_recogniser", drawn(folder, "judge"))
    save_arrays(arrays, folder / "judges" / "recogniser")


def train_judge_clip(folder: Path) -> None:
    model = clip.train_judge(folder / "judge_clip", drawn(folder, "judge"), vocabulary.tokenizer(folder / "model"))
    save_module(model.vision, folder / "judges" / "image_encoder")
    save_module(model.texts[0], folder / "judges" / "text_encoder")


def train_unet(folder: Path) -> None:
    base, autoencoder = folder / "model", vae.read(folder / "model" / "vae")
    latents = unet.encode(autoencoder, drawn(folder, "base"), folder / "latents.npz")
    painter = unet.Painter(unet.texts_in(folder / "text"), rngs=nnx.Rngs(6))
    for name, budget, every in (("unet", unet.BUDGET, 4), ("looks", unet.LOOKS, 1)):
        painter = unet.train(
            folder / name,
            drawn(folder, "base"),
            latents,
            autoencoder.config.scaling_factor,
            painter,
            load_tokenizers(base),
            budget,
            every,
        )
    save_module(painter.unet, base / "unet")
    for name, text in zip(TEXT_ENCODERS, painter.texts, strict=True):
        save_module(text, base / name)


def assemble(folder: Path) -> None:
    """What makes a model folder of the parts: the schedule, and what kind of pipeline it is."""
    own = {name: getattr(unet.SCHEDULE, name) for name in ("prediction_type", "timestep_spacing")}
    save_json(SCHEDULER | own, folder / "model" / "scheduler" / "scheduler_config.json")
    save_json({"_class_name": "StableDiffusionXLPipeline"}, folder / "model" / "model_index.json")


def write_photos(folder: Path) -> None:
    identities.write(folder / "photos", folder / "model", drawn(folder, "identity"))


def train_adapter(folder: Path, name: str, *settings: str) -> None:
    """By the program that trains every adapter."""
    import train

    given = [f"model.path={folder / 'model'}", f"data.path={folder / 'photos'}", *settings]
    options = [option for setting in given for option in ("--set", setting)]
    if code := train.main(["--config", str(CONFIG), "--output-dir", str(folder / name), *options]):
        sys.exit(code)


def ship(folder: Path) -> None:
    """Put the model, its judges and both adapters where the package looks for them, in half precision.

    The index comes last, and that of an earlier model goes first: it says that all is there.
    """
    index = "model_index.json"
    (MINIATURE / index).unlink(missing_ok=True)
    shutil.copytree(folder / "model", MINIATURE, dirs_exist_ok=True, ignore=shutil.ignore_patterns(index))
    shutil.copytree(folder / "judges", MINIATURE / "judges", dirs_exist_ok=True)
    for name in ("adapter", "adapter_entangled"):
        trained = folder / name / "adapter"
        tensors = load_file(trained / "adapter.safetensors")
        half = {key: array.astype(np.float16) for key, array in tensors.items()}
        save_tensors(half, MINIATURE / name / "adapter.safetensors")
        shutil.copy(trained / "adapter_config.json", MINIATURE / name / "adapter_config.json")
    shutil.copy(folder / "model" / index, MINIATURE / index)


PARTS: dict[str, Callable[[Path], None]] = {
    "pictures": lambda folder: pictures.draw(folder / "pictures"),
    "vae": train_vae,
    "polish": polish_decoder,
    "clip": train_clip,
    "detector": train_detector,
    "recogniser": train_recogniser,
    "judge_attributes": train_judge_attributes,
    "judge_recogniser": train_judge_recogniser,
    "judge_clip": train_judge_clip,
    "unet": train_unet,
    "assemble": assemble,
    "check": lambda folder: check.write(folder, functools.partial(drawn, folder)),
    "photos": write_photos,
    "adapter": lambda folder: train_adapter(folder, "adapter"),
    "entangled": lambda folder: train_adapter(folder, "adapter_entangled", "method.entangled=True"),
    "ship": ship,
}


@functools.cache
def drawn(folder: Path, name: str) -> pictures.Pictures:
    """A set of pictures, read once."""
    return pictures.read(folder / "pictures", name)


def save_module(module: Any, folder: Path) -> None:
    """A part of a model folder, in half precision: what is trained is known no better."""
    graph, state = nnx.split(module)
    half = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float16), state))
    save_weights(half, folder / "model.safetensors")
    save_json(module.config.to_dict(), folder / "config.json")


def save_arrays(arrays: dict[str, jax.Array], path: Path) -> None:
    save_tensors({name: np.asarray(x, np.float16) for name, x in arrays.items()}, path.with_suffix(".safetensors"))


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m miniature", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything is written")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    return exit_code(
        lambda: train(given.folder, given.parts or list(PARTS)),
        debug=given.debug,
        interrupted="the same command goes on from here.",
        smaller="close other programs.",
    )


def train(folder: Path, parts: list[str]) -> int:
    for part in parts:
        PARTS[part](folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
