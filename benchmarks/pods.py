"""Training and sampling on machines that are not here: SDXL's steps compiled for them, and what they will take.

    python -m benchmarks.pods [--target NAME ...] [--program train|sample ...] [--layout data|fsdp|tensor ...]
                              [--remat POLICY ...] [--json FILE] [--plot FILE]

The real compiler of a target makes the real program, without a chip of it: memory of a chip is that compiler's own
figure, and so are the bytes that go between chips. FLOPs are counted from the jaxpr, twice what is computed twice to
save memory. Times are predictions: products at `EFFICIENCY` of the vendor's peak, bytes at the vendor's bandwidth;
"overlapped" is the longer of the two, "in turn" their sum. TPUs need `pip install libtpu`, GPUs the extra cuda; nothing
is run on them.

train: the step of configs/infinite_id_sdxl.py. sample: one guided step of two streams with one identity a prompt, of
which an image takes `SAMPLING_STEPS`; its text and its decoding are left out.
"""

import argparse
import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare import SIZES
from benchmarks.pod_programs import LAYOUTS, compile_sampling, compile_training, find_compiler, make_mesh
from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.files import replacing, save_json

EFFICIENCY = 0.5  # of the peak, that products are taken to reach
SAMPLING_STEPS = 30
PROGRAMS = ("train", "sample")
_ASKED = ("name", "program", "layout", "size", "rows", "resolution", "remat")
_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "token": 0},
    **{"f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8},
}
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")


class Target(NamedTuple):
    """Chips, and what their vendor says of one."""

    platform: str  # tpu or cuda
    topology: str
    chips: int
    memory_gb: float  # GiB of a chip
    peak_tflops: float  # bfloat16, dense
    link_gb_s: float  # that a chip sends to others, by the links that rings through all chips can take
    pair_gb_s: float  # that it sends to its neighbour

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 2**30


TARGETS = {
    # cloud.google.com/tpu/docs: system architecture of each generation; a chip sends at half of its bidirectional rate.
    # 4 x 4 chips are no torus: those in the corners have two of four links.
    "v5e-16": Target("tpu", "v5e:4x4", 16, 16, 197, 200 / 2, 200 / 4),
    "v5e-256": Target("tpu", "v5e:16x16", 256, 16, 197, 200, 200 / 4),
    "v5p-64": Target("tpu", "v5p:4x4x4", 64, 95, 459, 600, 600 / 6),
    "v6e-16": Target("tpu", "v6e:4x4", 16, 32, 918, 400 / 2, 400 / 4),
    # NVIDIA's data sheets of H100 SXM (NVLink) and of DGX H100: a ConnectX-7 of 400 Gb/s a GPU between machines, and
    # through each a ring of its own may leave.
    "h100-8": Target("cuda", "1x1x8", 8, 79.1, 989, 450, 450),
    "h100-64": Target("cuda", "1x8x8", 64, 79.1, 989, 8 * 50, 450),
}


class Traffic(NamedTuple):
    """Of one step."""

    bytes_sent: float  # by one chip
    between_pairs: float  # of these, in groups of two
    counts: dict[str, int]  # of each kind of collective


def traffic(text: str, chips: int) -> Traffic:
    """What the collectives of a compiled program send, by the rings that bandwidth-optimal algorithms take.

    All-gather and reduce-scatter send (n - 1) / n of the whole array, all-reduce twice that; n is the group's size.
    libtpu's all-reduce-scatter is a reduce-scatter, though its text is that of an all-reduce and a slice.
    """
    counts, total, pairs, within = Counter[str](), 0.0, 0.0, ""
    for line in text.splitlines():
        if header := _COMPUTATION.search(line):
            within = header["name"]
        if match := _COLLECTIVE.search(line):
            kind, n = match["kind"], _group(line, chips)
            size = _size(match["result"]) * (_share_of_results(kind, n) if match["start"] else 1)
            if kind == "all-reduce" and within.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size / n
            counts[kind] += 1
            ring = (n - 1) / n
            sent = {
                "all-gather": ring * size,
                "reduce-scatter": ring * size * n,
                "all-reduce": 2 * ring * size,
                "all-to-all": ring * size,
                "collective-permute": size,
            }[kind]
            total, pairs = total + sent, pairs + (sent if n == 2 else 0)
    return Traffic(total, pairs, dict(counts))


def _share_of_results(kind: str, n: int) -> float:
    """What starts a collective names its operands and its results; an all-reduce has these alone."""
    return {"all-gather": n / (n + 1), "reduce-scatter": 1 / (n + 1), "all-reduce": 1.0}.get(kind, 0.5)


def _size(result: str) -> int:
    """Bytes of all arrays of an instruction's result."""
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result)
    return sum(_BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)


def _group(line: str, chips: int) -> int:
    """How many chips take part: replica_groups is a list, [groups, size] of an iota, or names axes of a mesh."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return chips


def measure(
    name: str, kind: str, layout: str, size: str, rows: float, resolution: int, remat: str | None
) -> dict[str, Any]:
    """One row of the table; `rows` images, or prompts, a chip; `remat` None for sampling.

    Of a program that the compiler says does not fit, `too_large` is what it says.
    """
    import jax

    target = TARGETS[name]
    mesh = make_mesh(target.platform, target.topology, target.chips, layout)
    images = max(1, round(rows * target.chips))
    asked = dict(zip(_ASKED, (name, kind, layout, size, rows, resolution, remat), strict=True))
    asked |= {"chips": target.chips, "images": images}
    try:
        if kind == "train":
            assert remat is not None
            compiled = compile_training(target.platform, mesh, size, images, resolution, remat)
        else:
            compiled = compile_sampling(target.platform, mesh, size, images, resolution)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return asked | {"too_large": str(error).partition("\n")[0]}
    sizes, sent = compiled.program.memory_analysis(), traffic(compiled.program.as_text(), target.chips)
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    held += sizes.generated_code_size_in_bytes
    used = held + sizes.temp_size_in_bytes
    computing = compiled.flops / (1e12 * target.peak_tflops * EFFICIENCY)
    moving = (sent.bytes_sent - sent.between_pairs) / (1e9 * target.link_gb_s)
    moving += sent.between_pairs / (1e9 * target.pair_gb_s)
    overlapped, in_turn = max(computing, moving), computing + moving
    return asked | {
        "steps": 1 if kind == "train" else SAMPLING_STEPS,
        "memory_bytes": used,
        "held_bytes": held,
        "memory_free_share": 1 - used / target.memory_bytes,
        "tflop_per_chip": compiled.flops / 1e12,
        "bytes_sent_per_chip": sent.bytes_sent,
        "collectives": sent.counts,
        "computing_s": computing,
        "moving_s": moving,
        "step_s_overlapped": overlapped,
        "step_s_in_turn": in_turn,
        "compile_s": compiled.seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = ("GiB/chip", "free", "TFLOP/chip", "GB sent", "step s", "images/s")
    widths = (9, 6, 12, 9, 15, 10)
    heads = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'':10}{'':8}{'layout':8}{'remat':8}{heads}  collectives"]
    for row in rows:
        if "too_large" in row:
            lines.append(
                f"{row['name']:10}{row['program']:8}{row['layout']:8}{row['remat'] or '-':8}{row['too_large']}"
            )
            continue
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items()))
        step = f"{row['step_s_overlapped']:.2f} to {row['step_s_in_turn']:.2f}"
        lines.append(
            f"{row['name']:10}{row['program']:8}{row['layout']:8}{row['remat'] or '-':8}"
            f"{row['memory_bytes'] / 2**30:9.2f}{row['memory_free_share']:6.0%}"
            f"{row['tflop_per_chip']:12.1f}{row['bytes_sent_per_chip'] / 1e9:9.2f}{step:>15}"
            f"{images_per_second(row, 'in_turn'):10.1f}  {counts}"
        )
    return "\n".join(lines)


def images_per_second(row: dict[str, Any], kind: str) -> float:
    """Of "overlapped" or "in_turn"."""
    return row["images"] / row["steps"] / row[f"step_s_{kind}"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Images a second over chips, from bytes after products to bytes beside them, and what of a chip's memory is taken.

    Raises MissingExtraError without matplotlib, InputError where no program fits its chips.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("--plot", "evaluate") from None
    rows = [row for row in rows if "too_large" not in row]
    if not rows:
        raise InputError("There is nothing to plot: no program fits its chips.")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["chips"]):
        family = row["name"].split("-")[0]
        lines.setdefault(f"{family} {row['program']} {row['layout']}", []).append(row)
    for label, line in lines.items():
        chips = [row["chips"] for row in line]
        slow, fast = ([images_per_second(row, kind) for row in line] for kind in ("in_turn", "overlapped"))
        middle = [(a + b) / 2 for a, b in zip(slow, fast, strict=True)]
        ranges = [
            [m - a for m, a in zip(middle, slow, strict=True)],
            [b - m for m, b in zip(middle, fast, strict=True)],
        ]
        speed.errorbar(chips, middle, yerr=ranges, marker="o", capsize=4, label=label)
    speed.set(xscale="log", yscale="log", xlabel="chips", ylabel="images/s, predicted")
    names = [f"{row['name']} {row['program']} {row['layout']}" for row in rows]
    for key, shade, label in (("memory_bytes", "tab:orange", "between"), ("held_bytes", "tab:blue", "held")):
        sizes = [row[key] / 2**30 for row in rows]
        memory.barh(names, sizes, color=shade, label=label)
    limits = [TARGETS[row["name"]].memory_gb for row in rows]
    memory.scatter(limits, names, marker="|", s=120, color="black", label="a chip's")
    memory.set(xscale="log", xlabel="GiB a chip")
    memory.invert_yaxis()
    speed.legend(fontsize=8)
    memory.legend(fontsize=8)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pods", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--target", choices=TARGETS, nargs="+", default=list(TARGETS), metavar="NAME", help=", ".join(TARGETS)
    )
    parser.add_argument("--program", choices=PROGRAMS, nargs="+", default=["train"], help="default: train")
    parser.add_argument(
        "--layout", choices=LAYOUTS, nargs="+", default=["data", "fsdp"], help="how chips share the work (data fsdp)"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="full: SDXL; small and tiny: narrower")
    parser.add_argument("--rows", type=float, default=4, metavar="N", help="images or prompts a chip (default 4)")
    parser.add_argument("--resolution", type=int, default=1024, metavar="PIXELS", help="default 1024")
    parser.add_argument(
        "--remat", nargs="+", default=["blocks"], metavar="POLICY", help="as method.remat (default blocks)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here; rows that are there stay")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="and a picture of all of them here (PNG)")
    given = parser.parse_args(arguments)
    try:
        rows = json.loads(given.json.read_text())["rows"] if given.json and given.json.exists() else []
        known = {tuple(row[key] for key in _ASKED) for row in rows}
        asked = [
            (name, program, layout, given.size, given.rows, given.resolution, remat)
            for name, program, layout in itertools.product(given.target, given.program, given.layout)
            for remat in (given.remat if program == "train" else [None])
        ]
        todo = [each for each in asked if each not in known]
        for platform in sorted({TARGETS[each[0]].platform for each in todo}):
            find_compiler(platform)
        for each in todo:
            start = time.perf_counter()
            rows.append(measure(*each))
            print(f"{', '.join(each[:3])}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
            if given.json:
                save_json({"efficiency": EFFICIENCY, "rows": rows}, given.json)
        print(table(rows))
        if given.plot:
            plot(rows, given.plot)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
