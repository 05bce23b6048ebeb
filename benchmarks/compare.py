"""The frame of the benchmarks that have a peer: both sides in one process, turn by turn, on the same weights.

Each prints a table and writes JSON after every row: {"name", "ours_s", "peer_s", "ratio", "tflops", "peak_bytes", ...}
with ratio = ours / peer, medians over repeats that take turns. A row that fails says so, and the next is measured; one
that cannot even be made is the last.
"""

import argparse
import gc
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infinite_id_jax.command_line import keep_compiled
from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.files import save_json

# jax and torch are imported where they are used: --device decides first what JAX may see.

SIZES = ("tiny", "small", "full")
_LEAST = {"cpu": 0.02, "gpu": 0.4}  # seconds for which a side is timed: shorter calls are repeated
_PAUSE = 0.02  # seconds between two sides: PyTorch's threads wait for work in a loop, and would take a core of the next


class Run(NamedTuple):
    """What the user asked for."""

    device: str  # cpu or gpu
    size: str  # one of SIZES
    folder: Path  # for weights; those that lie there already are taken
    compile_peer: bool
    peer_mode: str = "default"  # of torch.compile

    @property
    def dtype(self) -> str:
        """That of both sides."""
        return "bfloat16" if self.device == "gpu" else "float32"


class Case(NamedTuple):
    """One row: two functions that do the same.

    Each gives arrays or tensors on their device, which need not be computed yet. The first of ours and the first of
    the peer's have the same axes and are compared.
    """

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    flops: float | None = None  # of one call of ours
    peak_bytes: int | None = None  # of the compiled program: arguments, results and what it holds between
    comparable: bool = True  # False where each side draws its own noise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="cpu: fp32; gpu: bfloat16")
    parser.add_argument("--size", choices=SIZES, default="small", help="full: SDXL; small: narrower; tiny: seconds")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each side (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--keep-weights", type=Path, metavar="FOLDER", help="keep the weights here, to be used again")
    parser.add_argument(
        "--compile-peer",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the peer's U-Net and decoder (default: on a GPU)",
    )
    parser.add_argument("--peer-mode", metavar="MODE", help="of torch.compile (default: max-autotune on a GPU)")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="then trace a call of ours of each row into it")


def main(
    module: str, description: str | None, cases: Callable[[Run], Iterator[Case]], arguments: list[str] | None
) -> int:
    """The command line of a benchmark; its exit code."""
    summary = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: give 1 or more.")
    keep = given.keep_weights
    try:
        with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            on_gpu = given.device == "gpu"
            compiled = on_gpu if given.compile_peer is None else given.compile_peer
            mode = given.peer_mode or ("max-autotune" if on_gpu else "default")
            run = Run(given.device, given.size, Path(folder), compiled, mode)
            save = (lambda report: save_json(report, given.json)) if given.json else None
            report = measure(run, cases, given.repeats, save, given.trace)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{summary}\n{table(report)}")
    return 0 if report["complete"] else 1


def measure(
    run: Run,
    cases: Callable[[Run], Iterator[Case]],
    repeats: int,
    save: Callable[[dict[str, Any]], None] | None = None,
    trace: Path | None = None,
) -> dict[str, Any]:
    """All rows, the measured ceiling, and what it ran on; `save` gets what there is after each row.

    Raises InputError where the device is missing.
    """
    surroundings = {"load_average": os.getloadavg()[0]}  # before ours
    take_device(run.device)
    keep_compiled(run.folder / "compiled")
    if run.device == "gpu":
        import torch

        torch.backends.cudnn.benchmark = True  # XLA tries several forms of a convolution too
    ceiling = matmul_ceiling(run)
    rows: list[dict[str, Any]] = []
    report = {
        "device": describe_device(run.device),
        "size": run.size,
        "dtype": run.dtype,
        "peer_compiled": run.peer_mode if run.compile_peer else None,
        "ceiling_tflops": ceiling / 1e12,
        "machine": surroundings | machine() | accelerators(),
        "complete": False,
        "rows": rows,
    }
    found = cases(run)
    while (row := _next_row(run, found, repeats, ceiling, trace)) is not None:
        rows.append(row)
        print(f"{row['name']}: {row.get('failed') or format(row['ours_s'], '.4g') + ' s'}", file=sys.stderr)
        if save:
            save(report)
    report["complete"] = not any("failed" in row for row in rows)
    if save:
        save(report)
    return report


def _next_row(
    run: Run, found: Iterator[Case], repeats: int, ceiling: float, trace: Path | None
) -> dict[str, Any] | None:
    """None where there is no other; nothing of a case is held behind it."""
    case = None
    try:
        forget(run)
        case = next(found, None)
        if case is None:
            return None
        row = measure_case(case, repeats, ceiling, run.device)
    except InputError:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"name": case.name if case else "the next", "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    if trace:
        try:
            import jax

            with jax.profiler.trace(str(trace / case.name.replace(" ", "_"))):
                wait(case.ours())
        except Exception:  # the row is measured all the same
            traceback.print_exc()
    return row


def measure_case(case: Case, repeats: int, ceiling: float, device: str = "cpu") -> dict[str, Any]:
    """Both warmed up and compared, then timed in turns, each until its device is done.

    On a GPU short calls wait in its queue, so that it is the device that is timed, and the first calls, in which
    torch.compile records its graphs, are not.
    """
    sides, queued = (case.ours, case.peer), device == "gpu"
    results = [on_host(side()) for side in sides]
    error = relative_error(*results) if case.comparable else None
    first = [_timed(side, 1, queued) for side in sides]
    if queued:
        first = [_timed(side, 1, queued) for side in sides]
    calls = math.ceil(_LEAST[device] / min(first))
    seconds = tuple([taken] if calls == 1 and not queued else [] for taken in first)
    while len(seconds[0]) < repeats:
        for side, taken in zip(sides, seconds, strict=True):
            taken.append(_timed(side, calls, queued))
    ours, peer = (statistics.median(taken) for taken in seconds)
    speed = None if case.flops is None else case.flops / ours
    return {
        "name": case.name,
        "ours_s": ours,
        "peer_s": peer,
        "ratio": ours / peer,
        "tflops": None if speed is None else speed / 1e12,
        "ceiling_share": None if speed is None else speed / ceiling,
        "peak_bytes": case.peak_bytes,
        "error": error,
        "ours_runs_s": seconds[0],
        "peer_runs_s": seconds[1],
    }


def _timed(side: Callable[[], Any], calls: int, queued: bool) -> float:
    """Seconds of one call."""
    time.sleep(_PAUSE)
    start, result = time.perf_counter(), None
    for _ in range(calls):
        result = side()
        if not queued:
            wait(result)
    wait(result)
    return (time.perf_counter() - start) / calls


def wait(result: Any) -> None:
    """Until `result`, arrays of JAX, PyTorch or NumPy, is computed. On a GPU PyTorch waits for all that it began."""
    import jax
    import torch

    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in jax.tree.leaves(result)):
        torch.cuda.synchronize()
    jax.block_until_ready(result)


def on_host(result: Any) -> np.ndarray:
    """The first array of a result, in fp32."""
    import jax
    import torch

    wait(result)
    first = jax.tree.leaves(result)[0]
    return first.float().cpu().numpy() if isinstance(first, torch.Tensor) else np.asarray(first, np.float32)


def forget(run: Run) -> None:
    """What the last case left. A second shape would get a program of torch.compile for all shapes, which is slower."""
    import torch

    if run.compile_peer:
        import torch._dynamo

        torch._dynamo.reset()
    gc.collect()
    if run.device == "gpu":
        torch.cuda.empty_cache()


def relative_error(ours: np.ndarray, peer: np.ndarray) -> float:
    """Largest absolute error over the largest absolute value. NaN if either has one."""
    return float(np.abs(ours - peer).max() / np.abs(peer).max())


def take_jax(device: str) -> None:
    """Settle what JAX runs on."""
    import jax

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or PyTorch has no memory left
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")


def take_device(device: str) -> None:
    """Settle what JAX and PyTorch run on. Raises InputError where there is no GPU, or no peer."""
    import jax

    take_jax(device)
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError:
        raise MissingExtraError("The peer, PyTorch diffusers,", "test") from None

    if device == "cpu":
        return
    for name, seen, extra in (
        ("JAX", jax.default_backend() == "gpu", "install the extra cuda"),
        ("PyTorch", torch.cuda.is_available(), "install its CUDA build"),
    ):
        if not seen:
            raise InputError(f"{name} sees no GPU: {extra}, or take --device cpu.")


def matmul_ceiling(run: Run) -> float:
    """FLOP/s of a plain square product in this dtype, by JAX or by PyTorch, whichever is faster."""
    import jax
    import torch

    side = {"cpu": 2048, "gpu": 8192}[run.device] if run.size != "tiny" else 256
    # Random: products of equal numbers take a GPU less power, and so less time.
    a, product = jax.random.normal(jax.random.key(0), (side, side), run.dtype), jax.jit(lambda a: a @ a)
    b = torch.randn(side, side, dtype=getattr(torch, run.dtype), device="cuda" if run.device == "gpu" else "cpu")

    def by_torch() -> None:
        torch.matmul(b, b)
        if run.device == "gpu":
            torch.cuda.synchronize()

    best = []
    for multiply in (lambda: jax.block_until_ready(product(a)), by_torch):
        multiply()
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - start)
        best.append(statistics.median(seconds))
    return 2 * side**3 / min(best)


def describe_device(device: str) -> str:
    import jax

    return jax.devices()[0].device_kind if device == "gpu" else f"CPU, {os.cpu_count()} cores"


def machine() -> dict[str, Any]:
    """The command, and versions; no device is touched."""
    packages = ("jax", "jaxlib", "flax", "torch", "diffusers")
    versions = {name: metadata.version(name) for name in packages}
    return {"command": sys.argv, "python": platform.python_version(), **versions}


def accelerators() -> dict[str, Any]:
    """What both sides' programs are made with, by the device that they run on."""
    import jax
    import torch

    xla, cudnn = jax.devices()[0].client.platform_version, torch.backends.cudnn.version()
    return {"xla": xla, "torch_cuda": torch.version.cuda, "torch_cudnn": cudnn}


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A figure of a row in a table, "-" where it has none."""
    return "-" if value is None else f"{value / unit:{form}}"


def table(report: dict[str, Any]) -> str:
    head = f"{'':52}{'ours s':>10}{'peer s':>10}{'ratio':>8}{'TFLOP/s':>10}{'of peak':>9}{'GB':>8}{'error':>10}"
    lines = [f"{report['device']}, size {report['size']}, {report['dtype']}", head]
    for row in report["rows"]:
        if "failed" in row:
            lines.append(f"{row['name']:52}{row['failed']}")
            continue
        lines.append(
            f"{row['name']:52}{row['ours_s']:10.4g}{row['peer_s']:10.4g}{row['ratio']:8.2f}"
            f"{number(row['tflops'], '.3g'):>10}{number(row['ceiling_share'], '.0%'):>9}"
            f"{number(row['peak_bytes'], '.2f', 1e9):>8}{number(row['error'], '.1e'):>10}"
            f"   {_spread(row['ours_runs_s'])} {_spread(row['peer_runs_s'])}"
        )
    peak = f"Peak: a plain product of matrices reaches {report['ceiling_tflops']:.3g} TFLOP/s."
    return "\n".join([*lines, peak, "At the end of a row: the fastest and the slowest of ours, and of the peer's."])


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.4g}-{max(seconds):.4g}"


def program_bytes(compiled: Any) -> int:
    """What a compiled program holds at most: arguments, results, and what it keeps between."""
    sizes = compiled.memory_analysis()
    shared = sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - shared


def of_leaves(function: Callable[..., Any], tree: Any) -> tuple[Callable[..., Any], list[Any]]:
    """`function(tree, *inputs)` as one of leaves, and the leaves: flattening a U-Net's state takes 5 ms a call."""
    import jax

    leaves, structure = jax.tree.flatten(tree)

    def flat(leaves: list[Any], *inputs: Any) -> Any:
        return function(jax.tree.unflatten(structure, leaves), *inputs)

    return flat, leaves
