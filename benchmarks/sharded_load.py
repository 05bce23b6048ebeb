"""Host memory of loading a base that is divided over processes: each reads its own part of every tensor, and no more.

    python -m benchmarks.sharded_load [--size tiny|full] [--processes N] [--dtype NAME] [--json FILE]

Random weights of the U-Net are written in fp32 and loaded under FSDP by N processes on this machine, whose CPU devices
stand for chips. What counts is how much a process's anonymous memory grows at most, over what its devices hold in the
end: 1 would be no copy at all.
"""

import argparse
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.compare import machine
from benchmarks.full_size_unet import CASES, INDEX, write_random_unet
from benchmarks.meter import Meter, in_fresh_process
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json
from infinite_id_jax.stable_diffusion.config import UNetConfig

DEVICES = 4  # of a process


def load(folder: Path, dtype: str, address: str, processes: int, index: int) -> dict[str, Any]:
    """What one process measures."""
    import jax
    from flax import nnx

    from infinite_id_jax.sharding import make_mesh, parameter_sharding
    from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
    from infinite_id_jax.weights.load import load_module

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(address, processes, index)
    mesh = make_mesh(f"fsdp={DEVICES * processes}")
    assert mesh is not None
    config, meter = UNetConfig.from_json(folder / "config.json"), Meter()
    with meter.phase("load"):
        unet = load_module(
            lambda rngs: UNet2DConditionModel(config, rngs=rngs),
            folder,
            dtype=dtype,
            sharding=parameter_sharding(mesh),
        )
        arrays = jax.tree.leaves(nnx.state(unet))
        jax.block_until_ready(arrays)
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    phase = meter.phases["load"]
    growth = phase.anonymous - phase.anonymous_before
    return {"held_bytes": held, "growth_bytes": growth, "growth_over_held": growth / held, "seconds": phase.median}


def run(size: str, processes: int, dtype: str, folder: Path) -> dict[str, Any]:
    """All processes at once, as on a pod."""
    if not (folder / INDEX).exists():
        in_fresh_process(write_random_unet, CASES[size].config, folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with ThreadPoolExecutor(processes) as pool:
        jobs = [pool.submit(in_fresh_process, load, folder, dtype, address, processes, i) for i in range(processes)]
        rows = [{"name": f"process {i}", **job.result()} for i, job in enumerate(jobs)]
    return {"size": size, "dtype": dtype, "devices": DEVICES * processes, "machine": machine(), "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharded_load", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--size", choices=sorted(CASES), default="full", help="full: SDXL's; tiny: seconds")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help=f"of {DEVICES} devices (default 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="that devices hold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--keep-weights", type=Path, metavar="FOLDER", help="keep the weights here, to be used again")
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error(f"--processes {given.processes}: give 1 or more.")
    keep = given.keep_weights
    try:
        with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="sharded_load_") as folder:
            report = run(given.size, given.processes, given.dtype, Path(folder) / given.size)
        if given.json:
            save_json(report, given.json)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for row in report["rows"]:
        print(
            f"{row['name']}: holds {row['held_bytes'] / 1e9:.3f} GB, grew by {row['growth_bytes'] / 1e9:.3f} GB "
            f"({row['growth_over_held']:.3f} times that) in {row['seconds']:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
