"""All comparisons with a peer, one after the other; what lies in the folder already is not measured again.

    python -m benchmarks --output-dir FOLDER [--device cpu|gpu] [--size tiny|small|full] [NAME ...]

Each runs in a process of its own, whose memory goes back when it ends. FOLDER/DEVICE-SIZE then holds NAME.json of each
and tables.md with all of them; weights, until all are measured.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import SIZES, number
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import replacing

NAMES = ("kernels", "unet_forward", "training_step", "vae_decode", "sampling", "shortcuts", "cold_start")


def main(arguments: list[str] | None = None) -> int:
    """Exits with 1 where one of them failed; the others are measured all the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help="for figures and tables")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="as of each (default cpu)")
    parser.add_argument("--size", choices=SIZES, default="small", help="as of each (default small)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="as of each (default 5)")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    folder = given.output_dir / f"{given.device}-{given.size}"
    failed = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.names or NAMES:
            if not (read(folder / f"{name}.json") or {}).get("complete"):
                print(f"== {name}", file=sys.stderr)
                options = ("--device", given.device, "--size", given.size, "--repeats", str(given.repeats))
                files = ("--json", str(folder / f"{name}.json"), "--keep-weights", str(folder / "weights"))
                command = [sys.executable, "-m", f"benchmarks.{name}", *options, *files]
                if subprocess.run(command, check=False).returncode:
                    failed.append(name)
            reports = {name: report for name in NAMES if (report := read(folder / f"{name}.json"))}
            with replacing(folder / "tables.md") as beside:
                beside.write_text("\n".join(markdown(*each) for each in reports.items()), encoding="utf-8")
        if not failed:
            shutil.rmtree(folder / "weights", ignore_errors=True)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{folder} cannot be used ({error.strerror}): name another --output-dir.", file=sys.stderr)
        return InputError.exit_code
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"The tables are in {folder / 'tables.md'}.")
    if failed:
        print(f"Failed, as said above: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def read(file: Path) -> dict[str, Any] | None:
    """A benchmark's report, None where there is none that can be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def markdown(name: str, report: dict[str, Any]) -> str:
    """The table of one benchmark's report."""
    versions = ", ".join(f"{package} {report['machine'][package]}" for package in ("jax", "torch", "diffusers"))
    lines = [
        f"`python -m benchmarks.{name} --size {report['size']}`: {report['device']}, {report['dtype']}, {versions}, a "
        f"plain product of matrices {report['ceiling_tflops']:.3g} TFLOP/s",
        "",
        "| | ours | peer | ratio | TFLOP/s | of peak | GB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} |")
            continue
        cells = (
            row["name"],
            f"{row['ours_s']:.4g} s",
            f"{row['peer_s']:.4g} s",
            f"{row['ratio']:.2f}",
            number(row["tflops"], ".3g"),
            number(row["ceiling_share"], ".0%"),
            number(row["peak_bytes"], ".2f", 1e9),
            number(row["error"], ".1e"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
