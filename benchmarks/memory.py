"""Peak memory of sampling and of a training step, each side alone in a new process.

    python -m benchmarks.memory [--device cpu|gpu] [--size tiny|small|full] [--json FILE]

On a GPU it is what each side's allocator had handed out at most, while loading and compiling too; on a CPU what the
process had in memory at most, with the code of both sides' libraries. The peer is not compiled. Rows are {"name",
"ours_bytes", "peer_bytes", "ratio"}.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks import models, sampling, training_step
from benchmarks.compare import SIZES, Run, accelerators, describe_device, machine, take_device, wait
from benchmarks.meter import PROCESS_STATUS, in_fresh_process
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json

TRAINING = "training step"


def peak_of_ours(run: Run, name: str) -> int:
    """Bytes, in a process that has done nothing else."""
    take_device(run.device)
    if name == TRAINING:
        wait(training_step.our_step(run, training_step.make_batch(run, models.SIZES[run.size].resolution))[0]())
    else:
        wait(sampling.our_calls(run)[1][name]().latents)
    if run.device == "cpu":
        return _peak_of_process()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def peak_of_peer(run: Run, name: str) -> int:
    """Bytes, in a process that has done nothing else."""
    take_device(run.device)
    if name == TRAINING:
        wait(training_step.peer_step(run, training_step.make_batch(run, models.SIZES[run.size].resolution))())
    else:
        wait(sampling.peer_calls(run)[name]())
    if run.device == "cpu":
        return _peak_of_process()
    import torch

    return torch.cuda.max_memory_allocated()


def _peak_of_process() -> int:
    fields = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def measure(run: Run, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All rows; `save` gets what there is after each."""
    device, surroundings = in_fresh_process(_surroundings, run)
    in_fresh_process(models.write, run)
    report = {"device": device, "size": run.size, "dtype": run.dtype, "machine": surroundings, "rows": []}
    steps = models.SIZES[run.size].steps
    for name in (f"text-to-image, {steps} steps", *map(sampling.two_streams, sampling.PEOPLE), TRAINING):
        ours, peer = (in_fresh_process(side, run, name) for side in (peak_of_ours, peak_of_peer))
        report["rows"].append({"name": name, "ours_bytes": ours, "peer_bytes": peer, "ratio": ours / peer})
        print(f"{name}: {ours / 1e9:.3g} GB, peer {peer / 1e9:.3g} GB", file=sys.stderr)
        save(report)
    return report


def _surroundings(run: Run) -> tuple[str, dict[str, Any]]:
    take_device(run.device)
    return describe_device(run.device), machine() | accelerators()


def main(arguments: list[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=summary)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="cpu: fp32; gpu: bfloat16")
    parser.add_argument("--size", choices=SIZES, default="small", help="full: SDXL; small: narrower; tiny: seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--keep-weights", type=Path, metavar="FOLDER", help="keep the weights here, to be used again")
    given = parser.parse_args(arguments)
    keep = given.keep_weights
    try:
        with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            run = Run(given.device, given.size, Path(folder), compile_peer=False)
            report = measure(run, lambda found: save_json(found, given.json) if given.json else None)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{summary}\n{report['device']}, size {run.size}, {run.dtype}")
    print(f"{'':40}{'ours GB':>10}{'peer GB':>10}{'ratio':>8}")
    for row in report["rows"]:
        print(f"{row['name']:40}{row['ours_bytes'] / 1e9:10.3g}{row['peer_bytes'] / 1e9:10.3g}{row['ratio']:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
