"""The mechanics of the learning check in a few steps; whether training learns, the check itself says."""

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.drawing import Identity, Scene, picture
from data_pipeline.records import PhotoDataset
from examples import learning_check
from examples.drawn_world import HEADS, SIZE, BaseTraining
from examples.learning_check import HeldOut, Sizes, Verdict
from infinite_id_jax.weights.folder import load_vae, read_settings

SMALL = Sizes(
    people=16, photos=2, base=BaseTraining(steps=2, batch_size=2), steps=4, validate_every=2, overfit_steps=3,
    overfit_rows=32, batches=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole check of a few steps."""
    folder = tmp_path_factory.mktemp("check")
    return folder, learning_check.check(folder, SMALL)


def test_all_steps_are_taken_and_judged(folder):
    folder, verdict = folder
    metrics = learning_check.read_metrics(folder / "people" / "metrics.csv")
    assert np.isfinite(metrics["validation_loss"]).sum() == 2
    assert len(learning_check.read_metrics(folder / "overfit" / "metrics.csv")["loss"]) == 3
    assert np.isfinite(verdict.held_out).all()
    assert len(set(verdict.held_out.right)) == 2  # batches of their own


def test_a_second_call_makes_nothing_anew(folder):
    folder, verdict = folder
    names = ("model/unet/model.safetensors", "data/dataset.json", "people/checkpoints/4")
    before = [(folder / name).stat().st_mtime_ns for name in names]
    curves = (folder / "learning_check.svg").read_bytes()
    again = learning_check.check(folder, SMALL)
    assert [(folder / name).stat().st_mtime_ns for name in names] == before
    assert again.overfit == verdict.overfit
    np.testing.assert_array_equal(again.held_out, verdict.held_out)
    assert (folder / "learning_check.svg").read_bytes() == curves
    assert len(curves) < 150_000


def test_the_base_was_trained_and_its_autoencoder_kept(folder):
    folder, _ = folder
    changed = {
        part: len({(folder / model / part / "model.safetensors").read_bytes() for model in ("untrained", "model")}) == 2
        for part in ("unet", "vae", "image_encoder", "text_encoder")
    }
    assert changed == {"unet": True, "vae": False, "image_encoder": False, "text_encoder": False}


def test_latents_keep_colour_and_have_unit_scale(folder):
    folder, _ = folder
    vae = load_vae(folder / "model", read_settings(folder / "model"))
    seeds = range(1000, 1050)  # others than the layer was fitted to
    pictures = np.stack([picture(Identity.from_seed(i), Scene.from_seed(i, HEADS), SIZE) for i in seeds])
    pixels = pictures.astype(np.float32) / 127.5 - 1
    mean, std = vae.encode(jnp.asarray(pixels))
    latents = np.asarray(mean).reshape(-1, 4)
    np.testing.assert_allclose(latents.std(axis=0), 1, atol=0.15)
    np.testing.assert_allclose(std, 0.03, atol=0.001)
    colour = pixels.reshape(-1, 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(-1, 3)
    known = np.c_[latents, np.ones(len(latents))]
    unexplained = colour - known @ np.linalg.lstsq(known, colour, rcond=None)[0]
    assert (unexplained.var(axis=0) < 0.3 * colour.var(axis=0)).all()
    records = PhotoDataset(folder / "data", "validation")
    assert records[0].latent_mean.shape == (8, 8, 4)


def test_the_verdict_weighs_each_figure():
    right = np.asarray([0.2, 0.3, 0.25])
    better = HeldOut(right, right + np.asarray([0.04, 0.05, 0.06]), right + 0.05)
    mean, error = better.gain("other")
    assert mean == pytest.approx(0.05)
    assert error == pytest.approx(0.01 / np.sqrt(3))
    assert Verdict((0.3, 0.1), better).passed
    assert not Verdict((0.3, 0.29), better).passed
    assert not Verdict((0.3, 0.1), better._replace(other=right + np.asarray([0.0, 0.05, -0.05]))).passed
    assert not Verdict((0.3, 0.1), better._replace(none=right - 0.05)).passed
