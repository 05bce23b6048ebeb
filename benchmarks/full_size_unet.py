"""One forward of the full-size SDXL U-Net on the CPU in fp32: this package against PyTorch diffusers.

Both read the same random weights from a folder in diffusers' layout, one after the other, each in a process of
its own, and get the same inputs (batch 1, latents 32x32). The table gives the seconds and the peak memory of
loading, compiling, the first forward and the warm ones (median), and the error of the output.

Two things to know when reading it. Diffusers leaves its weights in the mapped files and reads them during its first
forward, so the fair figure for starting up is the time to the first output. Resident memory counts mapped files,
which the system can drop at any time; anonymous memory ("anon") does not, and shows how many copies were made.

    python -m benchmarks.full_size_unet [--size full|tiny] [--repeats N] [--json FILE] [--keep-weights FOLDER]

The full size takes 10.3 GB of disk, 12 GB of free memory and some minutes; `tiny` has the same layers in small.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.compare import machine, of_leaves, relative_error
from benchmarks.meter import PROCESS_STATUS, Meter, Phase, in_fresh_process
from benchmarks.models import SIZES
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json
from infinite_id_jax.stable_diffusion.config import UNetConfig

# jax and torch are imported where they are used: a process that measures one must not hold the other.

SHARD_BYTES = 10**9
INDEX = "diffusion_pytorch_model.safetensors.index.json"


class Case(NamedTuple):
    config: UNetConfig
    latent_size: int


CASES = {
    "full": Case(SIZES["full"].settings.unet, latent_size=32),
    "tiny": Case(SIZES["tiny"].settings.unet, latent_size=16),
}


class Inputs(NamedTuple):
    """What a text-to-image step gives the U-Net; latents are NHWC."""

    latents: np.ndarray
    timestep: np.ndarray
    context: np.ndarray
    pooled: np.ndarray
    time_ids: np.ndarray


def random_inputs(case: Case, seed: int = 1) -> Inputs:
    rng = np.random.default_rng(seed)
    config, size = case.config, case.latent_size
    pixels = 8.0 * size
    return Inputs(
        latents=rng.standard_normal((1, size, size, config.in_channels), np.float32),
        timestep=np.array([601.0], np.float32),
        context=rng.standard_normal((1, 77, config.cross_attention_dim), np.float32),
        pooled=rng.standard_normal((1, config.pooled_dim), np.float32),
        time_ids=np.array([[pixels, pixels, 0, 0, pixels, pixels]], np.float32),
    )


# The weights


def parameter_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """{PyTorch key: shape} of the U-Net."""
    from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
    from infinite_id_jax.weights.keys import key_map
    from infinite_id_jax.weights.load import abstract

    entries = key_map(abstract(lambda rngs: UNet2DConditionModel(config, rngs=rngs))).values()
    return {entry.key: entry.shape for entry in entries}


def random_tensor(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Nothing is 0 or the identity, and activations stay of order 1."""
    noise = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        noise *= 1 / math.sqrt(math.prod(shape[1:]))
        return noise
    return 0.02 * noise if key.endswith("bias") else 1 + 0.1 * noise


def split_shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Keys in groups of about `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        if size >= SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += 4 * math.prod(shape)
    return shards


def write_random_unet(config: UNetConfig, folder: Path, seed: int = 0) -> None:
    """A U-Net folder in diffusers' layout, with one shard in memory at a time.

    The index is written last: where it is, the folder is whole. Raises InputError if the disk has not the room.
    """
    from safetensors.numpy import save_file

    shapes = parameter_shapes(config)
    rng = np.random.default_rng(seed)
    shards = split_shards(shapes)
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    save_json({"_class_name": "UNet2DConditionModel", **config.to_dict()}, folder / "config.json")
    if shutil.disk_usage(folder).free < total:
        raise InputError(f"{folder} has no room for {total / 1e9:.1f} GB of weights: name another with --keep-weights.")
    weight_map = {}
    for i, keys in enumerate(shards):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({key: random_tensor(key, shapes[key], rng) for key in keys}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    save_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)


def weight_bytes(folder: Path) -> int:
    return json.loads((folder / INDEX).read_text())["metadata"]["total_size"]


# The two sides


class Measured(NamedTuple):
    output: np.ndarray  # NHWC
    phases: dict[str, Phase]


def measure_ours(folder: Path, inputs: Inputs, repeats: int) -> Measured:
    import jax
    from flax import nnx

    from infinite_id_jax.stable_diffusion.unet import AddedConditions, UNet2DConditionModel
    from infinite_id_jax.weights.load import load_module

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is part of the measurement
    config = UNetConfig.from_json(folder / "config.json")
    meter = Meter()
    with meter.phase("load"):
        unet = load_module(lambda rngs: UNet2DConditionModel(config, rngs=rngs), folder)
        graph, state = nnx.split(unet)
        jax.block_until_ready(state)

    def forward(state: nnx.State, *arguments: Any) -> jax.Array:
        return nnx.merge(graph, state)(*arguments)

    latents, timestep, context, pooled, time_ids = (jax.numpy.asarray(x) for x in inputs)
    flat, leaves = of_leaves(forward, state)
    arguments = (leaves, latents, timestep, context, AddedConditions(pooled, time_ids))
    with meter.phase("compile"):
        compiled = jax.jit(flat).lower(*arguments).compile()
    return _measure_forward(meter, lambda: jax.block_until_ready(compiled(*arguments)), repeats)


def measure_peer(folder: Path, inputs: Inputs, repeats: int) -> Measured:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    meter = Meter()
    with meter.phase("load"):
        unet = UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=True).eval()
    latents, timestep, context, pooled, time_ids = (torch.from_numpy(x) for x in inputs)
    latents = latents.permute(0, 3, 1, 2).contiguous()
    added = {"text_embeds": pooled, "time_ids": time_ids}

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return unet(latents, timestep, context, added_cond_kwargs=added).sample.permute(0, 2, 3, 1)

    return _measure_forward(meter, forward, repeats)


def _measure_forward(meter: Meter, forward: Callable[[], Any], repeats: int) -> Measured:
    with meter.phase("first forward"):
        forward()
    output = None
    for _ in range(repeats):
        with meter.phase("forward"):
            output = forward()
    return Measured(np.asarray(output), meter.phases)


# The report


def rows(ours: Measured, peer: Measured, weights: int) -> list[dict[str, Any]]:
    """One per phase, memory in bytes; None for what a side does not do. Loading comes first, the warm forward last."""
    result = []
    for name, phase in ours.phases.items():
        other = peer.phases.get(name)  # diffusers does not compile
        row: dict[str, Any] = {
            "name": name,
            "ours_s": phase.median,
            "peer_s": other and other.median,
            "ratio": other and phase.median / other.median,
            "peak_bytes": phase.resident,
            "peer_peak_bytes": other and other.resident,
            "anonymous_peak_bytes": phase.anonymous,
            "peer_anonymous_peak_bytes": other and other.anonymous,
            "ours_runs_s": phase.seconds,
            "peer_runs_s": other and other.seconds,
            "anonymous_growth_over_weights": None,
            "error": None,
        }
        if name == "load":
            row["anonymous_growth_over_weights"] = (phase.anonymous - phase.anonymous_before) / weights
        if name == "forward":
            row["error"] = relative_error(ours.output, peer.output)
        result.append(row)
    return result


def to_first_output(measured: Measured) -> float:
    """Seconds from the start of loading to the first output."""
    return sum(phase.median for name, phase in measured.phases.items() if name != "forward")


def table(report: dict[str, Any]) -> str:
    def line(*cells: str) -> str:
        return f"{cells[0]:14}" + "".join(f"{cell:>13}" for cell in cells[1:])

    def number(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
        return "-" if value is None else f"{value / unit:.{digits}f}"

    lines = [line("", "ours s", "diffusers s", "ratio", "ours GB", "diffusers GB", "ours anon", "diff. anon")]
    for row in report["rows"]:
        memory = (row[key] for key in row if key.endswith("peak_bytes"))
        seconds = (number(row["ours_s"]), number(row["peer_s"]), number(row["ratio"]))
        lines.append(line(row["name"], *seconds, *(number(x, 1e9) for x in memory)))
    load, forward = report["rows"][0], report["rows"][-1]
    return "\n".join(
        [
            f"SDXL U-Net ({report['size']}), {report['weight_bytes'] / 4e6:.1f} M parameters, fp32, "
            f"latents {report['latent_size']}x{report['latent_size']}, batch 1",
            *lines,
            f"To the first output: ours {report['first_output_s']:.1f} s, "
            f"diffusers {report['peer_first_output_s']:.1f} s",
            f"Error, largest absolute over the output's scale: {forward['error']:.1e}",
            "Loading, ours: growth of anonymous host memory over the size of the arrays: "
            f"{load['anonymous_growth_over_weights']:.3f}",
        ]
    )


def run(size: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Write the weights unless `folder` has them, measure both sides, compare."""
    case = CASES[size]
    surroundings = {"cpus": os.cpu_count(), "load_average": os.getloadavg()[0], **machine()}  # the load before ours
    if not (folder / INDEX).exists():
        in_fresh_process(write_random_unet, case.config, folder)
    inputs = random_inputs(case)
    peer = in_fresh_process(measure_peer, folder, inputs, repeats)
    ours = in_fresh_process(measure_ours, folder, inputs, repeats)
    weights = weight_bytes(folder)
    return {
        "size": size,
        "latent_size": case.latent_size,
        "weight_bytes": weights,
        "machine": surroundings,
        "first_output_s": to_first_output(ours),
        "peer_first_output_s": to_first_output(peer),
        "output_scale": float(np.abs(peer.output).max()),
        "rows": rows(ours, peer, weights),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size_unet", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--size", choices=sorted(CASES), default="full", help="full: SDXL's; tiny: seconds")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="warm forwards of each side (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--keep-weights", type=Path, metavar="FOLDER", help="keep the weights here, to be used again")
    args = parser.parse_args(arguments)
    if not PROCESS_STATUS.exists():
        parser.error("memory is read from /proc, which this system has not: run it on Linux.")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more.")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    keep = args.keep_weights
    try:
        with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="full_size_unet_") as folder:
            report = run(args.size, args.repeats, Path(folder) / args.size)
        print(table(report))
        if args.json:
            save_json(report, args.json)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenProcessPool:
        print("A process was killed, most likely for want of memory: the full size needs 12 GB free.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
