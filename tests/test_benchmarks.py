"""The benchmark scripts run, and measure what they say they measure."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.full_size_unet import main, relative_error
from benchmarks.meter import Meter, Phase

ROOT = Path(__file__).parents[1]
MEGABYTE = 2**20


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("full_size_unet")
    done = run(
        "benchmarks.full_size_unet",
        *("--size", "tiny", "--repeats", "3"),
        *("--json", str(folder / "report.json"), "--keep-weights", str(folder)),
    )
    assert done.returncode == 0, done.stderr
    assert "first forward" in done.stdout
    assert (folder / "tiny" / "config.json").exists()
    return json.loads((folder / "report.json").read_text())


def test_unet_agrees_with_diffusers(report: dict):
    error = report["rows"][-1]["error"]
    assert 0 < error <= 2e-5  # measured 1.8e-6; 0 would mean that something was compared with itself
    assert 0.1 < report["output_scale"] < 100


def test_unet_report_has_every_phase_of_both_sides(report: dict):
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["load", "compile", "first forward", "forward"]
    for name, row in rows.items():
        assert row["ours_s"] > 0
        assert row["peak_bytes"] >= row["anonymous_peak_bytes"] > MEGABYTE
        if name == "compile":
            assert row["peer_s"] is row["ratio"] is row["peer_peak_bytes"] is None
        else:
            assert row["ratio"] == pytest.approx(row["ours_s"] / row["peer_s"])
            assert row["peer_peak_bytes"] >= row["peer_anonymous_peak_bytes"] > MEGABYTE
    assert len(rows["forward"]["ours_runs_s"]) == len(rows["forward"]["peer_runs_s"]) == 3
    assert rows["load"]["anonymous_growth_over_weights"] > 0
    assert report["first_output_s"] > rows["compile"]["ours_s"]


def test_meter_sees_a_copy_that_is_gone_at_the_end():
    meter = Meter()
    with meter.phase("copy"):
        np.ones(64 * MEGABYTE, np.uint8).sum()
    phase = meter.phases["copy"]
    assert phase.anonymous - phase.anonymous_before > 60 * MEGABYTE
    assert len(phase.seconds) == 1


def test_meter_does_not_take_a_mapped_file_for_a_copy(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(64 * MEGABYTE))
    meter = Meter()
    with meter.phase("map"):
        np.memmap(tmp_path / "file", np.uint8, "r").sum()
    phase = meter.phases["map"]
    assert phase.resident - phase.anonymous > 60 * MEGABYTE
    assert phase.anonymous - phase.anonymous_before < 30 * MEGABYTE


def test_phase_gives_the_median():
    assert Phase(seconds=[1.0, 9.0, 2.0]).median == 2.0


def test_relative_error_is_nan_where_an_output_is():
    assert math.isnan(relative_error(np.array([1.0, np.nan]), np.ones(2)))
    assert relative_error(np.array([1.0, 3.0]), np.array([1.0, 4.0])) == 0.25


def test_repeats_below_one_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--repeats", "0"])
    assert stop.value.code == 2
    assert "give 1 or more" in capsys.readouterr().err
