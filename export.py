"""From what was trained or loaded here to files for PyTorch: an adapter for diffusers or ComfyUI, or a whole base."""

import argparse
import csv
import gc
import importlib.resources
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinite_id_jax.command_line import exit_code
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import is_hub_id, save_json, write_folder

if TYPE_CHECKING:
    import numpy as np
    from flax import nnx

    from infinite_id_jax.identity.config import EncoderConfig
    from infinite_id_jax.weights.model_card import Facts
    from infinite_id_jax.weights.settings import Settings

RUNTIME, ALIAS = "infinite_id_diffusers.py", "pipeline.py"
LONGEST_NAME = 240  # in bytes; file systems take 255, and what is being written is called ".NAME.partial"
FORMATS = ("infinite_id", "diffusers", "comfyui")
_OF_PICTURES = ("image_encoder", "feature_extractor")  # which a base is sampled with, and is whole without
_BASE_FILES = {
    "unet/, vae/, text_encoder/, text_encoder_2/": "the models",
    "tokenizer/, tokenizer_2/, scheduler/, model_index.json": "what diffusers needs beside them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when done, 2 for what cannot be exported, 130 if interrupted."""
    args = parser().parse_args(argv)
    return exit_code(
        lambda: run(args),
        debug=args.debug,
        interrupted="nothing was written.",
        smaller="export on a machine with more memory; nothing was written.",
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="output folder of train.py or one of its checkpoints, an adapter's folder or file, or a whole SDXL, as a "
        "folder in diffusers' layout or a single file",
    )
    p.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet")
    p.add_argument(
        "--format",
        default="infinite_id",
        choices=FORMATS,
        help="of an adapter: infinite_id for this project (default), diffusers for PyTorch, with a runtime of its own, "
        "or comfyui for its IPAdapter nodes; of a whole SDXL: infinite_id and diffusers are the same folder, in "
        "diffusers' layout, and comfyui is a single file in the original one",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        help="of a whole SDXL, whatever it was saved in: float32 (default), bfloat16, or float16, where the VAE is in "
        "float32; an adapter keeps its own",
    )
    p.add_argument(
        "--model-config",
        type=Path,
        metavar="DIR",
        help="configurations and tokenizers of a whole SDXL in a single file that are not SDXL 1.0's",
    )
    p.add_argument("--data", type=Path, metavar="D", help="the dataset it was trained on, for the model card")
    p.add_argument("--base-model", metavar="ID", help="the base it was trained over or made from, for the model card")
    p.add_argument("--licence", metavar="TEXT", help="under which you give the weights, for the model card")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def run(args: argparse.Namespace) -> int:
    """Find out what the checkpoint is, read it whole, write the folder."""
    check_paths(args)
    if _is_base(args.checkpoint):
        return export_base(args)
    if args.model_config is not None:
        raise InputError("--model-config concerns a whole SDXL in a single file: an adapter has its own configuration.")
    if args.dtype != "float32":
        raise InputError("--dtype concerns a whole SDXL: an adapter keeps the numbers that it has.")
    config, tensors, facts = read_checkpoint(args)
    print(f"{args.checkpoint}: {config.describe()}.")
    files = export_adapter(args.output, args.format, config, tensors, facts)
    print(f"Done: {', '.join(str(args.output / name) for name in files)}")
    return 0


def check_paths(args: argparse.Namespace) -> None:
    """Before anything is read. Raises InputError for an --output or a --checkpoint that cannot be one."""
    output, checkpoint = args.output, args.checkpoint
    try:
        if os.path.lexists(output):
            raise InputError(f"--output {output} exists already: name a folder that does not.")
        if len(os.fsencode(output.name)) > LONGEST_NAME:
            raise InputError(f"--output has a name of {len(output.name)} letters: give a shorter one.")
        above = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise InputError(f"--output {output} lies below {above}, which is no folder: name another place.")
        if not checkpoint.exists():
            of_the_hub = is_hub_id(str(checkpoint)) and not checkpoint.parent.is_dir()
            cure = ", or download it from the hub first: only local files are exported" if of_the_hub else ""
            raise InputError(f"--checkpoint {checkpoint} does not exist: check the path{cure}.")
        if not (checkpoint.is_file() or checkpoint.is_dir()):
            raise InputError(f"--checkpoint {checkpoint} is neither a file nor a folder: check the path.")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise InputError(f"{error.filename} cannot be used ({error.strerror}): name another path.") from None


def _is_base(path: Path) -> bool:
    """Whether this is a whole SDXL: a folder in diffusers' layout, or one file in the original one."""
    from contextlib import ExitStack

    from infinite_id_jax.weights.load import open_tensors

    if path.is_dir():
        return (path / "model_index.json").is_file() or (path / "unet").is_dir()
    with ExitStack() as stack:
        return any(key.startswith("model.diffusion_model.") for key in open_tensors(path, stack))


def export_base(args: argparse.Namespace) -> int:
    """The whole base: a folder, or a folder with the single file in it."""
    from infinite_id_jax.conditioning import DTYPES
    from infinite_id_jax.weights.folder import load_tokenizers, read_settings
    from infinite_id_jax.weights.model_card import Facts, base_usage, model_card
    from infinite_id_jax.weights.save_base import fill_folder, write_single_file

    if args.dtype not in DTYPES:
        raise InputError(f"--dtype {args.dtype} is unknown: choose from {', '.join(DTYPES)}.")
    source, given = args.checkpoint, given_facts(args)
    name = os.path.basename(os.path.abspath(source)) if source.is_dir() else source.stem  # not that of a link's target
    kept = " (the VAE in float32, as it overflows in float16)" if args.dtype == "float16" else ""
    kind = f"Stable Diffusion XL in {args.dtype}{kept}"
    print(f"Reading {source} ...")
    settings, tokenizers = read_settings(source, args.model_config), load_tokenizers(source, args.model_config)
    parts = base_parts(source, settings, args.dtype)
    single = f"{name}.safetensors" if args.format == "comfyui" else None
    files = {single: "all of it, in the original layout"} if single else dict(_BASE_FILES)
    pictures = [part for part in _OF_PICTURES if (source / part).is_dir()]
    if not single:
        files |= {f"{part}/": f"as it was in {name}" for part in pictures}
    facts = Facts(what=f"{kind}, made from {name}", whole_base=True, **given)

    def write(beside: Path) -> None:
        if single:
            write_single_file(beside / single, settings, parts)
        else:
            fill_folder(beside, settings, tokenizers, parts)
            copy_parts(source, beside, pictures)
        (beside / "README.md").write_text(model_card(facts, files, base_usage(args.dtype, single)), encoding="utf-8")

    write_folder(args.output, write)
    if single:
        left_out = f"; {' and '.join(pictures)} left out, as such a file holds none" if pictures else ""
        print(f"Done: {args.output / single}, for ComfyUI's models/checkpoints: {kind}{left_out}.")
    else:
        copied = f"; {' and '.join(pictures)} copied unchanged" if pictures else ""
        reader = "diffusers' StableDiffusionXLPipeline.from_pretrained"
        print(f"Done: {args.output}, which {reader} reads: {kind}{copied}.")
    return 0


def base_parts(source: Path, settings: "Settings", dtype: str) -> Iterator[tuple[str, "nnx.Module"]]:
    """The modules of a base as `load_base` gives them, one after the other: each is read when it is asked for."""
    from infinite_id_jax.weights import folder

    yield "unet", folder.load_unet(source, settings, dtype=dtype)
    gc.collect()  # modules refer to themselves: the arrays of one that nobody holds would stay
    yield "vae", folder.load_vae(source, settings, dtype="float32" if dtype == "float16" else dtype)
    texts = list(folder.load_text_encoders(source, settings, dtype=dtype))
    for part in ("text_encoder", "text_encoder_2"):
        yield part, texts.pop(0)
    gc.collect()


def copy_parts(source: Path, folder: Path, parts: Sequence[str]) -> None:
    """Folders of `source` that are no part of our base, with what its model_index.json says of them.

    Settings and safetensors alone. Raises InputError for a link that leads out of the model.
    """
    from infinite_id_jax.stable_diffusion.config import read_json

    said = read_json(source / "model_index.json") if (source / "model_index.json").is_file() else {}
    for part in parts:
        (folder / part).mkdir(parents=True)
        for file in sorted((source / part).iterdir()):
            if file.suffix not in (".json", ".txt", ".safetensors"):
                continue
            real = file.resolve()  # in a hub's cache files are links to blobs/
            if not real.is_relative_to(source.resolve()) and real.parent.name != "blobs":
                raise InputError(f"{file} is a link out of the model: put the file itself there, or remove it.")
            shutil.copyfile(real, folder / part / file.name)
    index = read_json(folder / "model_index.json") | {part: said[part] for part in parts if part in said}
    save_json(index, folder / "model_index.json")


def given_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says for the model card. Raises InputError for a --data that is no dataset."""
    data = dataset_facts(args.data) if args.data else None
    return {"base_model": args.base_model, "licence": args.licence, "data": data}


def read_checkpoint(args: argparse.Namespace) -> tuple["EncoderConfig", dict[str, "np.ndarray"], "Facts"]:
    """An adapter in PyTorch's layout, and what is known of it. Raises InputError for anything else."""
    from infinite_id_jax.identity.config import AdapterConfig
    from infinite_id_jax.training.checkpoint import find_checkpoint, read_trained
    from infinite_id_jax.weights.adapter import read_adapter, torch_layout
    from infinite_id_jax.weights.model_card import Facts

    given = given_facts(args)
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint.is_dir() else None
    if checkpoint is None:
        config, tensors = read_adapter(_result_of(args.checkpoint))
        return config, tensors, Facts(what=config.describe(), **given)
    trained = read_trained(checkpoint)
    config = AdapterConfig.from_dict(trained.run["adapter"])
    known = {"step": trained.step, "run": trained.run, "metrics": newest_metrics(trained.folder, trained.step)}
    return config, torch_layout(trained.adapter), Facts(what=config.describe(), **known, **given)


def _result_of(path: Path) -> Path:
    """The adapter that a run left whose checkpoints were removed; any other path as it is."""
    from infinite_id_jax.weights.adapter import CONFIG, FILES

    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    of_a_run = path.name == "checkpoints" or (path / "checkpoints").is_dir() or (path / "metrics.csv").is_file()
    if of_a_run and not any(file.suffix in FILES for file in path.iterdir()):
        raise InputError(
            f"--checkpoint {path} is a run of train.py that has saved nothing yet: let it go on until then."
        )
    return path


def dataset_facts(folder: Path) -> dict[str, Any]:
    """Counts and licences of a dataset made by `python -m data_pipeline`. Raises InputError if it is none."""
    from data_pipeline.provenance import load_rows
    from infinite_id_jax.stable_diffusion.config import read_json

    if not (folder / "summary.json").is_file():
        raise InputError(
            f"--data {folder} is no finished dataset of `python -m data_pipeline`: it has no summary.json."
        )
    count = read_json(folder / "summary.json").get("input", 0)
    rows = [row for row in load_rows(folder / "provenance.jsonl", count) if not row.reason]
    licences, sources = (Counter(getattr(row, name) or "unknown" for row in rows) for name in ("licence", "source"))
    return {
        "photos": len(rows),
        "people": len({row.person for row in rows}),
        "licences": ", ".join(f"{name} ({count})" for name, count in licences.most_common()),
        "sources": ", ".join(f"{name} ({count})" for name, count in sources.most_common(20)),
    }


def newest_metrics(folder: Path, step: int) -> dict[str, str]:
    """The newest value of each column of metrics.csv up to this step."""
    path = folder / "metrics.csv"
    newest: dict[str, str] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row.get("step") or "").isdigit() and int(row["step"]) <= step:
                    newest |= {key: value for key, value in row.items() if key and value}
    return newest


def export_adapter(
    output: Path, form: str, config: "EncoderConfig", tensors: Mapping[str, "np.ndarray"], facts: "Facts"
) -> list[str]:
    """Write the folder whole; returns the names of its files. Raises InputError where the format cannot hold it."""
    from infinite_id_jax.weights.adapter import CONFIG, WEIGHTS, write_adapter
    from infinite_id_jax.weights.export import save_tensors
    from infinite_id_jax.weights.ip_adapter import as_published, check_comfyui
    from infinite_id_jax.weights.model_card import adapter_usage, model_card

    files: dict[str, str] = {}
    published, renamed = None, {}
    if form != "infinite_id":
        try:
            name, renamed = as_published(config, tensors)
            published = f"{name}.safetensors"
        except InputError:
            if form == "comfyui":
                raise
    if form == "comfyui":
        check_comfyui(config)
    else:
        files |= {WEIGHTS: "the weights, with their checksum in the header", CONFIG: "what they are"}
    if form == "diffusers":
        files[RUNTIME] = "two-stream sampling in PyTorch: needs torch, diffusers and transformers"
        files[ALIAS] = "where diffusers looks for it"
    if published:
        files[published] = "the weights under the keys of a published family"

    def write(beside: Path) -> None:
        beside.mkdir(parents=True)
        if form != "comfyui":
            write_adapter(config, tensors, beside)
        if form == "diffusers":
            runtime = importlib.resources.files("infinite_id_jax.weights") / RUNTIME
            (beside / RUNTIME).write_text(runtime.read_text(encoding="utf-8"), encoding="utf-8")
            (beside / ALIAS).write_text("from .infinite_id_diffusers import InfiniteIDPipeline\n", encoding="utf-8")
        if published:
            save_tensors(renamed, beside / published)
        card = model_card(facts, files, adapter_usage(form, config, published))
        (beside / "README.md").write_text(card, encoding="utf-8")

    write_folder(output, write)
    return ["README.md", *files]


if __name__ == "__main__":
    sys.exit(main())
