"""Training on machines that are not here: SDXL's step compiled for them, and what it will take.

    python -m benchmarks.pods [--target NAME ...] [--layout data|fsdp ...] [--json FILE]

The real compiler of a target makes the real program, without a chip of it: memory of a chip is that compiler's own
figure, and so are the bytes that go between chips. FLOPs are counted from the jaxpr. Times are predictions: products
at `EFFICIENCY` of the vendor's peak, bytes at the vendor's bandwidth; "overlapped" is the longer of the two, "in turn"
their sum. TPUs need `pip install libtpu`; nothing is run on them.
"""

import argparse
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json

# jax is imported where it is used: the environment must be set before.

EFFICIENCY = 0.5  # of the peak, that products are taken to reach
LAYOUTS = {"data": (-1, 1, 1), "fsdp": (1, -1, 1)}
_EFFORT = {"exec_time_optimization_effort": -1.0, "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)


class Target(NamedTuple):
    """Chips, and what their vendor says of one."""

    platform: str
    topology: str
    chips: int
    memory_gb: float  # of a chip
    peak_tflops: float  # bfloat16, dense
    link_gb_s: float  # between chips, all links of a chip in one direction

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 2**30


# cloud.google.com/tpu/docs: system architecture of each generation.
TARGETS = {
    "v5e-16": Target("tpu", "v5e:4x4", 16, 16, 197, 200),
    "v5e-256": Target("tpu", "v5e:16x16", 256, 16, 197, 200),
    "v5p-64": Target("tpu", "v5p:4x4x4", 64, 95, 459, 600),
    "v6e-16": Target("tpu", "v6e:4x4", 16, 32, 918, 448),
}


class Traffic(NamedTuple):
    """Of one step."""

    bytes_sent: float  # by one chip
    counts: dict[str, int]  # of each kind of collective


def compile_step(target: Target, layout: str, rows: int, resolution: int, remat: str) -> tuple[Any, float, float]:
    """The compiled step of `configs/infinite_id_sdxl.py`, its FLOPs over all chips, and the seconds it took."""
    from functools import partial

    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from configs.infinite_id_sdxl import config
    from infinite_id_jax.sharding import AXES
    from infinite_id_jax.stable_diffusion.kernels import compiling_for
    from infinite_id_jax.training.budget import make_budget
    from infinite_id_jax.training.objective import MethodConfig
    from infinite_id_jax.training.setup import abstract_inputs
    from infinite_id_jax.training.step import train_step

    devices = topologies.get_topology_desc(platform=target.platform, topology_name=target.topology).devices
    if len(devices) != target.chips:
        raise InputError(f"The topology {target.topology} has {len(devices)} devices, not {target.chips}.")
    shape = [len(devices) if size < 0 else size for size in LAYOUTS[layout]]
    mesh = Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
    inputs = abstract_inputs(
        config.model.architecture,
        config.adapter,
        MethodConfig(identity_drop=config.method.identity_drop, remat=remat),
        config.optimizer,
        mesh,
        rows=rows * target.chips,
        resolution=resolution,
        sharded=layout == "fsdp",
    )
    objective, frozen, state, batch = inputs
    places = jax.tree.map(lambda x: x.sharding, state)
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    step = partial(train_step, objective, config.optimizer, places.adapter)
    start = time.perf_counter()
    with compiling_for(target.platform), jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=1, out_shardings=(places, None)).lower(frozen, state, batch, key)
        compiled = lowered.compile(compiler_options=_EFFORT)
    seconds = time.perf_counter() - start
    return compiled, make_budget(*inputs, mesh.abstract_mesh, 1).all_flops, seconds


def traffic(text: str, chips: int) -> Traffic:
    """What the collectives of a compiled program send, by the rings that bandwidth-optimal algorithms take.

    All-gather and reduce-scatter send (n - 1) / n of the whole array, all-reduce twice that; n is the group's size.
    """
    counts, total = Counter[str](), 0.0
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            kind, n = match["kind"], _group(line, chips)
            size = _size(match["result"]) * (_share_of_results(kind, n) if match["start"] else 1)
            counts[kind] += 1
            ring = (n - 1) / n
            total += {
                "all-gather": ring * size,
                "reduce-scatter": ring * size * n,
                "all-reduce": 2 * ring * size,
                "all-to-all": ring * size,
                "collective-permute": size,
            }[kind]
    return Traffic(total, dict(counts))


def _share_of_results(kind: str, n: int) -> float:
    """What starts a collective names its operands and its results; an all-reduce has these alone."""
    return {"all-gather": n / (n + 1), "reduce-scatter": 1 / (n + 1), "all-reduce": 1.0}.get(kind, 0.5)


def _size(result: str) -> int:
    """Bytes of all arrays of an instruction's result."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    return sum(_BYTES.get(kind, 0) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)


def _group(line: str, chips: int) -> int:
    """How many chips take part: replica_groups is a list, or [groups, size] of an iota."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return chips


def measure(name: str, layout: str, rows: int, resolution: int, remat: str) -> dict[str, Any]:
    """One row of the table."""
    target = TARGETS[name]
    compiled, flops, seconds = compile_step(target, layout, rows, resolution, remat)
    sizes, sent = compiled.memory_analysis(), traffic(compiled.as_text(), target.chips)
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    used = held + sizes.temp_size_in_bytes
    computing = flops / target.chips / (1e12 * target.peak_tflops * EFFICIENCY)
    moving = sent.bytes_sent / (1e9 * target.link_gb_s)
    overlapped, in_turn = max(computing, moving), computing + moving
    return {
        "name": name,
        "layout": layout,
        "chips": target.chips,
        "rows_per_chip": rows,
        "resolution": resolution,
        "remat": remat,
        "memory_bytes": used,
        "held_bytes": held,
        "memory_free_share": 1 - used / target.memory_bytes,
        "tflop_per_chip": flops / target.chips / 1e12,
        "bytes_sent_per_chip": sent.bytes_sent,
        "collectives": sent.counts,
        "computing_s": computing,
        "moving_s": moving,
        "step_s_overlapped": overlapped,
        "step_s_in_turn": in_turn,
        "images_per_s_in_turn": rows * target.chips / in_turn,
        "compile_s": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = ("GiB/chip", "free", "TFLOP/chip", "GB sent", "step s", "images/s")
    widths = (9, 6, 12, 9, 15, 10)
    lines = [f"{'':10}{'layout':8}{''.join(f'{n:>{w}}' for n, w in zip(names, widths, strict=True))}  collectives"]
    for row in rows:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items()))
        step = f"{row['step_s_overlapped']:.2f} to {row['step_s_in_turn']:.2f}"
        lines.append(
            f"{row['name']:10}{row['layout']:8}{row['memory_bytes'] / 2**30:9.2f}{row['memory_free_share']:6.0%}"
            f"{row['tflop_per_chip']:12.1f}{row['bytes_sent_per_chip'] / 1e9:9.2f}{step:>15}"
            f"{row['images_per_s_in_turn']:10.1f}  {counts}"
        )
    return "\n".join(lines)


def find_compiler() -> None:
    """Make libtpu known to JAX without a TPU. Raises InputError where it is not installed."""
    import importlib.util

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    spec = importlib.util.find_spec("libtpu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("Compiling for TPUs needs their compiler: pip install libtpu.")
    os.environ.setdefault("TPU_LIBRARY_PATH", str(Path(spec.submodule_search_locations[0]) / "libtpu.so"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pods", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--target", choices=TARGETS, nargs="+", default=list(TARGETS), metavar="NAME", help=", ".join(TARGETS)
    )
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS), help="default: both")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="images a chip (default 4)")
    parser.add_argument("--resolution", type=int, default=1024, metavar="PIXELS", help="default 1024")
    parser.add_argument("--remat", default="blocks", metavar="POLICY", help="as method.remat (default blocks)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    given = parser.parse_args(arguments)
    try:
        find_compiler()
        rows = []
        for name in given.target:
            for layout in given.layout:
                rows.append(measure(name, layout, given.rows, given.resolution, given.remat))
                print(f"{name}, {layout}: compiled in {rows[-1]['compile_s']:.0f} s", file=sys.stderr)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(rows))
    if given.json:
        save_json({"efficiency": EFFICIENCY, "rows": rows}, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
