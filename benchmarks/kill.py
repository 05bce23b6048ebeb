"""Programs that are killed again and again must end with the same files, bit for bit, as ones that were left alone.

python -m benchmarks.kill training --kills 20 really sends SIGKILL, at random moments of start, step and checkpoint;
python -m benchmarks.kill offline the same to the offline stage, which begins anew whenever it was not killed in time.
"""

import argparse
import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_SHARE = 0.2  # of the kills while the process still starts


def training_command(folder: Path, steps: int, *more: str) -> list[str]:
    """The debug configuration: a checkpoint at every step."""
    command = [sys.executable, "train.py", "--config", "configs/debug.py", "--output-dir", str(folder)]
    return [*command, "--max-steps", str(steps), *more]


def steps_taken(folder: Path) -> int:
    """By the last whole row of metrics.csv."""
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    steps = [line.split(",", 1)[0] for line in lines]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def learned(folder: Path) -> tuple[bytes, list[tuple[str, str]]]:
    """The final adapter, and the loss of each step."""
    with (folder / "metrics.csv").open(newline="") as file:
        losses = [(row["step"], row["loss"]) for row in csv.DictReader(file)]
    return (folder / "adapter" / "adapter.safetensors").read_bytes(), losses


def run_to_end(command: Sequence[str]) -> None:
    """Raises RuntimeError with what it printed if the program fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def run_and_kill(command: Sequence[str], ready: Callable[[], bool], delay: float) -> bool:
    """Start, wait until `ready`, wait `delay` seconds more, SIGKILL; False if the program had ended by itself."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ready() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def kill_training(folder: Path, kills: int, steps: int, seed: int, *more: str) -> int:
    """Train with kills spread over the steps, then to the end; returns how many kills hit a running process."""
    rng = random.Random(seed)
    thresholds = sorted(rng.randrange(0, steps - 1) for _ in range(kills))
    hit = 0
    for threshold in thresholds:
        starting = rng.random() < START_SHARE
        delay = rng.uniform(0, 6) if starting else rng.uniform(0, 0.6)
        ready = (lambda: True) if starting else (lambda least=threshold: steps_taken(folder) >= least)
        hit += run_and_kill(training_command(folder, steps, *more), ready, delay)
        print(f"killed at step {steps_taken(folder)}", file=sys.stderr, flush=True)
    run_to_end(training_command(folder, steps, *more))
    return hit


def offline_command(photos: Path, folder: Path, model: Path) -> list[str]:
    """Many small shards, for many moments between two of them."""
    names = {"--input": photos, "--output": folder, "--model": model, "--face-backend": "mtcnn_dlib"}
    options = [part for name, value in names.items() for part in (name, str(value))]
    small = ["--resolutions", "64", "--photos-per-shard", "6", "--batch-size", "2", "--validation-share", "0.3"]
    return [sys.executable, "-m", "data_pipeline", *options, *small]


def made(folder: Path) -> dict[str, bytes]:
    """Every file of a finished dataset."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_offline(photos: Path, model: Path, folder: Path, kills: int, seed: int) -> tuple[int, list[str]]:
    """Returns the kills that hit a running process, and the files that differ from an uninterrupted run's."""
    rng = random.Random(seed)
    start = time.perf_counter()
    run_to_end(offline_command(photos, folder / "whole", model))
    seconds, whole = time.perf_counter() - start, made(folder / "whole")
    differing: list[str] = []
    hit, rounds = 0, 0
    while hit < kills:
        killed = folder / f"killed{rounds}"
        while hit < kills and run_and_kill(
            offline_command(photos, killed, model), lambda: True, rng.uniform(0, seconds)
        ):
            hit += 1
            marks = len(list((killed / "marks").glob("*.json")))
            print(f"kill {hit}: {marks} shards were finished", file=sys.stderr, flush=True)
        run_to_end(offline_command(photos, killed, model))
        found = made(killed)
        differing += [
            f"{killed.name}/{name}" for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)
        ]
        rounds += 1
    return hit, sorted(differing)


def measure_training(folder: Path, kills: int, steps: int, seed: int) -> tuple[int, list[str]]:
    whole, killed = folder / "whole", folder / "killed"
    run_to_end(training_command(whole, steps))
    inputs = [f"--set=model.path={whole}/inputs/model", f"--set=data.path={whole}/inputs/data"]
    hit = kill_training(killed, kills, steps, seed, *inputs)
    names = ("adapter.safetensors", "losses")
    return hit, [name for name, a, b in zip(names, learned(whole), learned(killed), strict=True) if a != b]


def measure_offline(folder: Path, kills: int, photos: int, seed: int) -> tuple[int, list[str]]:
    from benchmarks.offline import write_photos
    from examples.tiny_sdxl import write_model

    write_photos(folder / "photos", photos, 256)
    write_model(folder / "model")
    return kill_offline(folder / "photos", folder / "model", folder, kills, seed)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the killed runs ended as the others did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("training", "offline"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--photos", type=int, default=24, help="of the offline stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there and keep everything")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        if args.what == "training":
            hit, differing = measure_training(folder, args.kills, args.steps, args.seed)
        else:
            hit, differing = measure_offline(folder, args.kills, args.photos, args.seed)
    print(f"{hit} of {args.kills} kills hit; {', '.join(differing) or 'nothing'} differs from the uninterrupted run.")
    if args.json:
        args.json.write_text(json.dumps({"what": args.what, "kills": hit, "differing": differing}) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
