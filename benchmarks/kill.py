"""Programs that are killed again and again must end with the same files, bit for bit, as ones that were left alone.

python -m benchmarks.kill training --kills 20 really sends SIGKILL, at random moments of start, step and checkpoint.
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


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the killed run ended as the other one did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("training",))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        run_to_end(training_command(whole, args.steps))
        inputs = [f"--set=model.path={whole}/inputs/model", f"--set=data.path={whole}/inputs/data"]
        hit = kill_training(killed, args.kills, args.steps, args.seed, *inputs)
        equal = learned(whole) == learned(killed)
    print(f"{hit} of {args.kills} kills hit; adapter and losses {'are' if equal else 'ARE NOT'} bit-equal.")
    if args.json:
        args.json.write_text(json.dumps({"what": args.what, "kills": hit, "bit_equal": equal}) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
