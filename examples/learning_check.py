"""Does identity-enhanced training learn who people are? The proof in miniature, in minutes on a CPU.

    python -m examples.learning_check [FOLDER]

A small base is trained on drawn people and frozen. Then train.py (configs/learning_check.py) must, with one batch,
overfit it, and with all of the data, predict photos of people it has never seen better from another photo of them
than from somebody else's, or from none. Prints the figures, draws FOLDER/learning_check.svg (matplotlib is in the
extra `evaluate`), and exits with 1 if one of them fails. A second call goes on where the first was stopped.

Ten minutes on two CPU cores: five for the base, one for the one batch, three to four for the people and the verdict.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import train
from configs.base import load_config
from examples.drawn_world import BaseTraining, write_world
from infinite_id_jax.command_line import exit_code, keep_compiled
from infinite_id_jax.evaluation import figures
from infinite_id_jax.files import replacing
from infinite_id_jax.sharding import make_mesh
from infinite_id_jax.training.state import adapter_arrays
from infinite_id_jax.training.step import validation_step
from infinite_id_jax.typing import Float
from infinite_id_jax.weights.adapter import load_adapter
from infinite_id_jax.weights.folder import load_unet, read_settings

CONFIG = Path(__file__).parent.parent / "configs" / "learning_check.py"
CASES = {"right": "their own photo", "other": "another person's photo", "none": "no photo"}
COLUMNS = {"right": "validation_loss", "other": "validation_other_person", "none": "validation_no_identity"}
MARGIN = 4.0  # standard errors by which the right identity must win
FALL = 0.75  # the last tenth's loss on one batch, as a share of the first tenth's, at most
_SEED = 1  # of the noise of `held_out`, another than train.py's validation has


class Sizes(NamedTuple):
    """How much of everything; the defaults are the check, smaller ones try its mechanics."""

    people: int = 512
    photos: int = 6
    base: BaseTraining = BaseTraining()
    steps: int = 1200
    validate_every: int = 50
    overfit_steps: int = 800
    overfit_rows: int = 4
    batches: int = 24  # of held-out people, for the verdict


class HeldOut(NamedTuple):
    """Mean errors of batches of people never seen, each with the three identities on the same noise."""

    right: Float[np.ndarray, " batches"]
    other: Float[np.ndarray, " batches"]
    none: Float[np.ndarray, " batches"]

    def gain(self, case: str) -> tuple[float, float]:
        """By how much the right identity is better than `case`: mean over batches and its standard error."""
        difference = getattr(self, case) - self.right
        return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


class Verdict(NamedTuple):
    """The first and the last tenth's loss on one batch, and the errors on people never seen."""

    overfit: tuple[float, float]
    held_out: HeldOut

    @property
    def passed(self) -> bool:
        gains = [self.held_out.gain(case) for case in ("other", "none")]
        return self.overfit[1] < FALL * self.overfit[0] and all(mean > MARGIN * se for mean, se in gains)

    def __str__(self) -> str:
        first, last = self.overfit
        lines = [f"One batch: loss {first:.4f} in the first tenth of the steps, {last:.4f} in the last."]
        lines += [f"Held-out people, {text}: {getattr(self.held_out, case).mean():.4f}" for case, text in CASES.items()]
        for case in ("other", "none"):
            mean, error = self.held_out.gain(case)
            lines.append(f"Gain of their own photo over {CASES[case]}: {mean:.4f}, standard error {error:.4f}")
        return "\n".join(lines)


def check(folder: Path, sizes: Sizes) -> Verdict:
    """Make what is missing in `folder`, run train.py twice, judge and draw."""
    figures.check()
    keep_compiled(folder / "compiled")
    write_world(folder, people=sizes.people, photos=sizes.photos, training=sizes.base)
    settings = [f"model.path={folder / 'model'}", f"data.path={folder / 'data'}"]
    one_batch = [*settings, "run.validate_every=0", "run.log_every=1", f"data.batch_size={sizes.overfit_rows}"]
    _train(folder / "overfit", one_batch, sizes.overfit_steps, "--overfit-batch")
    _train(folder / "people", [*settings, f"run.validate_every={sizes.validate_every}"], sizes.steps)
    overfit, people = (read_metrics(folder / name / "metrics.csv") for name in ("overfit", "people"))
    draw_curves(overfit, people, folder / "learning_check.svg")
    tenth = max(sizes.overfit_steps // 10, 1)
    losses = overfit["loss"]
    ends = float(losses[:tenth].mean()), float(losses[-tenth:].mean())
    return Verdict(ends, held_out(folder / "people" / "adapter", settings, sizes.batches))


def _train(folder: Path, settings: Sequence[str], steps: int, *options: str) -> None:
    command = ["--config", str(CONFIG), "--output-dir", str(folder), "--max-steps", str(steps), *options]
    code = train.main([*command, *(f"--set={setting}" for setting in settings)])
    if code:
        raise SystemExit(code)


def read_metrics(path: Path) -> dict[str, Float[np.ndarray, " rows"]]:
    """The columns of a metrics.csv; NaN where a row has none."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.asarray([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def held_out(adapter: Path, settings: Sequence[str], batches: int) -> HeldOut:
    """The errors of a trained adapter on the validation split."""
    config = load_config(CONFIG, settings)
    mesh = make_mesh(config.run.mesh)
    feeds, folder = train.open_data(config, mesh), Path(config.model.path)
    model = train.load_model(config, mesh, on_device=False)
    arrays = adapter_arrays(load_adapter(adapter, load_unet(folder, read_settings(folder))))
    step, key = jax.jit(partial(validation_step, model.objective)), jax.random.key(_SEED)
    assert feeds.validation is not None, "the configuration validates"
    errors = [step(arrays, model.frozen, feeds.validation.batch(i), jax.random.fold_in(key, i)) for i in range(batches)]
    return HeldOut(*np.asarray(jax.device_get(errors), np.float64).T)


def draw_curves(
    overfit: dict[str, Float[np.ndarray, " rows"]], people: dict[str, Float[np.ndarray, " rows"]], path: Path
) -> None:
    """Both runs side by side, as SVG: the same numbers draw the same file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = overfit["loss"]
    width = max(len(loss) // 20, 1)
    left.plot(overfit["step"], loss, color="0.75", linewidth=0.8, label="each step, on new noise")
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    left.plot(overfit["step"][width - 1 :], smooth, color="C0", label=f"mean of {width} steps")
    left.set(title="One batch, again and again", xlabel="step", ylabel="training loss")
    left.set_ylim(bottom=0)
    known = np.isfinite(people["validation_loss"])
    for (case, text), style in zip(CASES.items(), ("-", "--", ":"), strict=True):
        right.plot(people["step"][known], people[COLUMNS[case]][known], style, label=text)
    right.set(title="People never seen in training", xlabel="step", ylabel="error of the predicted noise")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    with replacing(path) as beside, matplotlib.rc_context({"svg.hashsalt": "learning_check"}):
        FigureCanvasSVG(figure).print_svg(beside, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/learning_check"))
    folder = parser.parse_args(argv).folder
    interrupted, smaller = "the same command goes on from there.", "close other programs."
    return exit_code(lambda: judge(folder), debug=False, interrupted=interrupted, smaller=smaller)


def judge(folder: Path) -> int:
    """Run the check and say how it went."""
    verdict = check(folder, Sizes())
    print(verdict, f"The curves: {folder / 'learning_check.svg'}", sep="\n")
    if not verdict.passed:
        print("error: This training has not learned what it must.", file=sys.stderr)
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
