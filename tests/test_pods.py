"""The two smallest pods, compiled by the compiler of TPUs: make pods."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.models import SIZES
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.weights.keys import key_map
from infinite_id_jax.weights.load import abstract

ROOT = Path(__file__).parents[1]
TARGETS = ("v5e-16", "v6e-16")


@pytest.mark.pods
def test_training_fits_and_sends_weights_alone(tmp_path: Path):
    """SDXL's blocks in a few channels, at 1024 px, 4 images a chip."""
    if not os.environ.get("TPU_COMPILER"):
        pytest.skip("TPU_COMPILER names no folder with libtpu: make pods installs it")
    file = tmp_path / "pods.json"
    command = [sys.executable, "-m", "benchmarks.pods", "--target", *TARGETS, "--layout", "fsdp", "--size", "tiny"]
    environment = os.environ | {"PYTHONPATH": os.environ["TPU_COMPILER"]}
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == list(TARGETS)
    unet = abstract(lambda rngs: UNet2DConditionModel(SIZES["tiny"].settings.unet, rngs=rngs))
    base = 2 * sum(math.prod(entry.shape) for entry in key_map(unet).values())
    for row in rows:
        assert row["memory_free_share"] > 0.4
        # Forward and backward gather the base once each; the adapter's weights and gradient are the rest. A feature map
        # of all rows would be as much again.
        assert 2 * base < row["bytes_sent_per_chip"] < 4 * base
