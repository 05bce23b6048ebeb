"""From what was trained or loaded here to files for PyTorch: an adapter for diffusers or ComfyUI, or a whole base."""

import argparse
import csv
import importlib.resources
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinite_id_jax.command_line import exit_code
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import write_folder

if TYPE_CHECKING:
    import numpy as np

    from infinite_id_jax.identity.config import EncoderConfig
    from infinite_id_jax.weights.model_card import Facts

RUNTIME, ALIAS = "infinite_id_diffusers.py", "pipeline.py"
FORMATS = ("infinite_id", "diffusers", "comfyui")

_USE = {
    "infinite_id": """```python
from infinite_id_jax import InfiniteIDPipeline

pipe = InfiniteIDPipeline.from_pretrained(SDXL, adapter=FOLDER)
person = pipe.encode_identity("person.jpg")
image = pipe("a photo of a person in the snow", person).images[0]
```""",
    "diffusers": """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(SDXL, custom_pipeline=FOLDER, trust_remote_code=True)  # the code in FOLDER
pipe.load_infinite_id(FOLDER)
person = pipe.encode_identity(clip_hidden_states=..., face_embedding=...)  # the fields that this adapter needs
image = pipe.sample("a photo of a person in the snow", person).images[0]
```""",
    "load_ip_adapter": """Unmodified diffusers, which samples with one stream:
`pipe.load_ip_adapter(FOLDER, subfolder="", weight_name="{name}")`.""",
    "comfyui": """Put the file into ComfyUI's `models/ipadapter` and load it with an IPAdapter node. A LoRA in it is not
used there: FaceID's own LoRA file goes into `models/loras`.""",
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
        help="output folder of train.py or one of its checkpoints, an adapter's folder or file, or a whole SDXL",
    )
    p.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet")
    p.add_argument(
        "--format",
        default="infinite_id",
        choices=FORMATS,
        help="an adapter: for this project, for diffusers with its own PyTorch runtime, for ComfyUI's IPAdapter nodes; "
        "a whole SDXL: diffusers' folder, or with comfyui a single file (default infinite_id)",
    )
    p.add_argument("--dtype", default="float32", help="of a whole SDXL: float32, bfloat16 or float16 (default float32)")
    p.add_argument("--data", type=Path, metavar="D", help="the dataset it was trained on, for the model card")
    p.add_argument("--base-model", metavar="ID", help="the base it was trained over, for the model card")
    p.add_argument("--licence", metavar="TEXT", help="under which you give the weights, for the model card")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def run(args: argparse.Namespace) -> int:
    """Find out what the checkpoint is, read it whole, write the folder."""
    if args.output.exists():
        raise InputError(f"--output {args.output} exists already: name a folder that does not.")
    if not args.checkpoint.exists():
        raise InputError(f"--checkpoint {args.checkpoint} does not exist: check the path.")
    if _is_base(args.checkpoint):
        return export_base(args)
    if args.dtype != "float32":
        raise InputError("--dtype concerns a whole SDXL: an adapter keeps the numbers that it has.")
    config, tensors, facts = read_checkpoint(args)
    print(f"{args.checkpoint}: {config.describe()}.")
    files = export_adapter(args.output, args.format, config, tensors, facts)
    print(f"Done: {', '.join(str(args.output / name) for name in files)}")
    return 0


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
    from infinite_id_jax.pipeline import DTYPES
    from infinite_id_jax.weights.folder import load_base
    from infinite_id_jax.weights.save_base import save_base, save_single_file

    if args.dtype not in DTYPES:
        raise InputError(f"--dtype {args.dtype} is unknown: choose from {', '.join(DTYPES)}.")
    print(f"Reading {args.checkpoint} ...")
    base = load_base(args.checkpoint, dtype=args.dtype)
    if args.format == "comfyui":
        name = f"{args.checkpoint.stem}.safetensors"
        write_folder(args.output, lambda beside: save_single_file(base, beside / name))
        print(f"Done: {args.output / name}, for ComfyUI's models/checkpoints.")
    else:
        save_base(base, args.output)
        print(f"Done: {args.output}, which diffusers' StableDiffusionXLPipeline.from_pretrained reads.")
    return 0


def read_checkpoint(args: argparse.Namespace) -> tuple["EncoderConfig", dict[str, "np.ndarray"], "Facts"]:
    """An adapter in PyTorch's layout, and what is known of it. Raises InputError for anything else."""
    from infinite_id_jax.identity.config import AdapterConfig
    from infinite_id_jax.training.checkpoint import find_checkpoint, read_trained
    from infinite_id_jax.weights.adapter import read_adapter, torch_layout
    from infinite_id_jax.weights.model_card import Facts

    given = {"base_model": args.base_model, "licence": args.licence, "data": args.data and dataset_facts(args.data)}
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint.is_dir() else None
    if checkpoint is None:
        config, tensors = read_adapter(args.checkpoint)
        return config, tensors, Facts(what=config.describe(), **given)
    trained = read_trained(checkpoint)
    config = AdapterConfig.from_dict(trained.run["adapter"])
    known = {"step": trained.step, "run": trained.run, "metrics": newest_metrics(trained.folder, trained.step)}
    return config, torch_layout(trained.adapter), Facts(what=config.describe(), **known, **given)


def dataset_facts(folder: Path) -> dict[str, Any]:
    """Counts and licences of a dataset made by `python -m data_pipeline`. Raises InputError if it is none."""
    from data_pipeline.provenance import load_rows
    from infinite_id_jax.stable_diffusion.config import read_json

    if not (folder / "summary.json").is_file():
        raise InputError(
            f"--data {folder} is no finished dataset of `python -m data_pipeline`: it has no summary.json."
        )
    count = read_json(folder / "summary.json")["input"]
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
                if row["step"] and int(row["step"]) <= step:
                    newest |= {key: value for key, value in row.items() if value}
    return newest


def export_adapter(
    output: Path, form: str, config: "EncoderConfig", tensors: Mapping[str, "np.ndarray"], facts: "Facts"
) -> list[str]:
    """Write the folder whole; returns the names of its files. Raises InputError where the format cannot hold it."""
    from infinite_id_jax.weights.adapter import CONFIG, WEIGHTS, write_adapter
    from infinite_id_jax.weights.export import save_tensors
    from infinite_id_jax.weights.ip_adapter import as_published, check_comfyui
    from infinite_id_jax.weights.model_card import model_card

    files, use = {}, []
    published: dict[str, Mapping[str, np.ndarray]] = {}
    if form != "infinite_id":
        try:
            name, renamed = as_published(config, tensors)
            published[f"{name}.safetensors"] = renamed
        except InputError:
            if form == "comfyui":
                raise
    if form == "comfyui":
        check_comfyui(config)
    if form != "comfyui":
        files |= {WEIGHTS: "the weights, with their checksum in the header", CONFIG: "what they are"}
        use.append(_USE[form])
    if form == "diffusers":
        files[RUNTIME] = "two-stream sampling in PyTorch: needs torch and diffusers alone"
        files[ALIAS] = "where diffusers looks for it"
    for name in published:
        files[name] = "the same weights as a published family has them"
        use.append(_USE["load_ip_adapter"].format(name=name))
        if form == "comfyui":
            use.append(_USE["comfyui"])

    def write(beside: Path) -> None:
        beside.mkdir(parents=True)
        if form != "comfyui":
            write_adapter(config, tensors, beside)
        if form == "diffusers":
            runtime = importlib.resources.files("infinite_id_jax.weights") / RUNTIME
            (beside / RUNTIME).write_text(runtime.read_text(encoding="utf-8"), encoding="utf-8")
            (beside / ALIAS).write_text("from .infinite_id_diffusers import InfiniteIDPipeline\n", encoding="utf-8")
        for name, renamed in published.items():
            save_tensors(renamed, beside / name)
        card = model_card(facts, files, "\n\n".join(use))
        (beside / "README.md").write_text(card, encoding="utf-8")

    write_folder(output, write)
    return ["README.md", *files]


if __name__ == "__main__":
    sys.exit(main())
