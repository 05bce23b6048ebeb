"""Schedules, samplers and guidance: whole trajectories against diffusers, and the laws they obey."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from infinite_id_jax.diffusion import guidance
from infinite_id_jax.diffusion.samplers import SCHEDULERS, sample, trajectory
from infinite_id_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from infinite_id_jax.errors import InputError

SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
REFERENCES = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
STEPS = (1, 2, 5, 10, 14, 15, 30, 50)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction")
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 4)), jnp.float32)
MIX = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0].astype(np.float32)

SCHEDULE_TOLERANCE = 1e-6  # relative; measured 7.8e-7 (Karras's seventh powers), 4.7e-7 without
LATENT_TOLERANCE = 1e-5  # of the largest latent; measured 3.9e-6 (Euler in one step), 5.7e-7 at SDXL's 30 of DDIM


def toy_denoiser(x_t, t, i, kept=None):
    return jnp.tanh((0.7 * x_t + 0.5 * jnp.sin(t / 100)) @ MIX), kept


def reference_scheduler(name, values, steps):
    scheduler = REFERENCES[name].from_config(values)
    scheduler.set_timesteps(steps)
    return scheduler


def reference_sample(scheduler):
    """The loop of a diffusers pipeline around the same denoiser (they act per element: NHWC is fine)."""
    mix = torch.from_numpy(MIX)
    x_t = torch.tensor(np.array(NOISE)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.tanh((0.7 * scheduler.scale_model_input(x_t, t) + 0.5 * torch.sin(t / 100)) @ mix)
        x_t = scheduler.step(output, t, x_t).prev_sample
    return x_t.numpy()


@jax.jit
def all_samples(tables, noise):
    """{sampler: {prediction type: latents}}, compiled once for each number of steps."""
    return {
        name: {kind: sample(name, table, toy_denoiser, noise, prediction_type=kind) for kind in PREDICTIONS}
        for name, table in tables.items()
    }


def assert_same_schedule(name, values, steps):
    """Timesteps, sigmas (alpha_bar for DDIM) and the initial scale against diffusers' own tables."""
    table, theirs = (
        trajectory(name, ScheduleConfig.from_dict(values), steps),
        reference_scheduler(name, values, steps),
    )
    np.testing.assert_allclose(table.timesteps, theirs.timesteps.numpy(), rtol=SCHEDULE_TOLERANCE)
    np.testing.assert_allclose(table.initial_sigma, theirs.init_noise_sigma, rtol=SCHEDULE_TOLERANCE)
    now = table.steps
    if name == "ddim":
        ours, expected = now.alpha**2, theirs.alphas_cumprod[theirs.timesteps].numpy()
    else:
        ours = np.append(now.sigma / now.alpha, now.sigma_next[-1] / now.alpha_next[-1])
        expected = theirs.sigmas.numpy()
        np.testing.assert_array_equal(now.sigma_next[:-1], now.sigma[1:])
    np.testing.assert_allclose(ours, expected, rtol=SCHEDULE_TOLERANCE)


def assert_same_latents(values, steps):
    """All samplers and both readings of the denoiser's output."""
    config = ScheduleConfig.from_dict(values)
    latents = all_samples({name: trajectory(name, config, steps) for name in SCHEDULERS}, NOISE)
    for name in SCHEDULERS:
        for kind in PREDICTIONS:
            expected = reference_sample(reference_scheduler(name, values | {"prediction_type": kind}, steps))
            error = np.abs(latents[name][kind] - expected).max() / np.abs(expected).max()
            assert error <= LATENT_TOLERANCE, (name, kind)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_trajectories_match_diffusers(spacing, steps):
    values = SDXL | {"timestep_spacing": spacing}
    for name in SCHEDULERS:
        assert_same_schedule(name, values, steps)
    assert_same_latents(values, steps)


@pytest.mark.parametrize(
    "change",
    [
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "timestep_spacing": "linspace"},
        {"use_karras_sigmas": True, "timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min"},
        {"set_alpha_to_one": True},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"steps_offset": 0},
        {"num_train_timesteps": 500, "beta_end": 0.02},
    ],
    ids=lambda change: "-".join(change),
)
@pytest.mark.parametrize("steps", [1, 14, 15, 30])
def test_other_configurations_match_diffusers(change, steps):
    for name in SCHEDULERS:
        assert_same_schedule(name, SDXL | change, steps)
    assert_same_latents(SDXL | change, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_of_many_lengths_match_diffusers(name, spacing):
    # diffusers' trailing timesteps are one too many at 61 (float stride), so that length is left out.
    for steps in (3, 7, 20, 25, 28, 48, 60, 99, 100, 250, 333, 500):
        assert_same_schedule(name, SDXL | {"timestep_spacing": spacing}, steps)


def test_sdxl_ddim_timesteps():
    timesteps = trajectory("ddim", ScheduleConfig.from_dict(SDXL), 30).timesteps
    np.testing.assert_array_equal(timesteps, np.arange(958, 0, -33))
    assert timesteps[[0, 1, -2, -1]].tolist() == [958, 925, 34, 1]


def test_trailing_has_as_many_steps_as_asked():
    for steps in range(1, 1001):
        timesteps = trajectory("ddim", ScheduleConfig(timestep_spacing="trailing"), steps).timesteps
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_alphas_cumprod(schedule):
    alpha_bar = alphas_cumprod(ScheduleConfig(beta_schedule=schedule))
    expected = DDIMScheduler.from_config(SDXL | {"beta_schedule": schedule}).alphas_cumprod
    np.testing.assert_allclose(alpha_bar, expected, rtol=SCHEDULE_TOLERANCE)  # measured 4e-7
    assert np.all(np.diff(alpha_bar) < 0)


@jax.jit(static_argnames=("name", "prediction_type"))
def omniscient_sample(name, table, x_0, prediction_type):
    """Sampling from NOISE with a model that knows x_0: it returns the eps, or the v, that its input implies."""
    scale = jnp.hypot(table.steps.alpha, table.steps.sigma)
    alpha, sigma = table.steps.alpha / scale, table.steps.sigma / scale

    def denoise(x_t, t, i, kept):
        eps = (x_t - alpha[i] * x_0) / sigma[i]
        return eps if prediction_type == "epsilon" else alpha[i] * eps - sigma[i] * x_0, kept

    return sample(name, table, denoise, NOISE, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_true_noise_leads_to_x_0(name, spacing, prediction_type):
    x_0 = jnp.roll(NOISE, 1)
    config = ScheduleConfig(timestep_spacing=spacing, set_alpha_to_one=True)
    for steps in (1, 20):
        found = omniscient_sample(name, trajectory(name, config, steps), x_0, prediction_type)
        # One step from sigma / alpha = 14.6 magnifies float32's rounding as much; measured 3.1e-6.
        np.testing.assert_allclose(found, x_0, atol=2e-5)


def test_sdxl_ddim_ends_at_the_first_trained_noise_level():
    """Without set_alpha_to_one the last step leads to t = 0, where sqrt(1 - alpha_bar_0) eps is left."""
    x_0, config = jnp.roll(NOISE, 1), ScheduleConfig()
    table, alpha_bar = trajectory("ddim", config, 30), alphas_cumprod(config)
    found = omniscient_sample("ddim", table, x_0, "epsilon")
    eps = (NOISE - table.steps.alpha[0] * x_0) / table.steps.sigma[0]
    expected = math.sqrt(alpha_bar[0]) * x_0 + math.sqrt(1 - alpha_bar[0]) * eps
    np.testing.assert_allclose(found, expected, atol=4e-6)  # measured 2.4e-7


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2)])
def test_order_of_convergence(name, order):
    """Gaussian data, whose probability flow is known: x_t keeps its ratio to the marginal's std at t."""
    std = 0.5
    # Ending at the smallest trained sigma, since the step to sigma = 0 is of first order in every sampler.
    config = ScheduleConfig(use_karras_sigmas=True, final_sigmas_type="sigma_min")

    def marginal(alpha, sigma):
        return np.hypot(alpha * std, sigma)

    def error(steps):
        table = trajectory(name, config, steps)
        now = table.steps
        # E[eps | x_t] at the model's input, which is x_t / hypot(alpha, sigma).
        slope = jnp.asarray(now.sigma * np.hypot(now.alpha, now.sigma) / marginal(now.alpha, now.sigma) ** 2)
        found = sample(name, table, lambda x_t, t, i, kept: (slope[i] * x_t, kept), NOISE, prediction_type="epsilon")
        start, end = marginal(now.alpha[0], now.sigma[0]), marginal(now.alpha_next[-1], now.sigma_next[-1])
        return np.abs(found - NOISE * table.initial_sigma * end / start).max()

    # Measured orders 1.05 and 2.08.
    assert abs(math.log2(error(40) / error(80)) - order) < 0.2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_model_sees_the_table(name):
    """t (float32) and i (int32) arrive in order, with an input of unit variance."""
    seen = []

    def denoise(x_t, t, i, kept):
        assert (x_t.dtype, t.dtype, i.dtype) == (jnp.float32, jnp.float32, jnp.int32)
        assert t.shape == i.shape == ()
        jax.debug.callback(lambda *now: seen.append(now), t, i, jnp.std(x_t), ordered=True)
        return x_t.astype(jnp.bfloat16), kept

    table = trajectory(name, ScheduleConfig(timestep_spacing="linspace"), 5)
    noise = jax.random.normal(jax.random.key(0), (1, 16, 16, 4), jnp.bfloat16)
    assert sample(name, table, denoise, noise, prediction_type="epsilon").dtype == jnp.float32
    jax.effects_barrier()
    np.testing.assert_array_equal([t for t, _, _ in seen], table.timesteps)
    assert [int(i) for _, i, _ in seen] == list(range(5))
    assert abs(seen[0][2] - 1) < 0.05  # 1024 draws: measured 0.003


@pytest.mark.parametrize("name", SCHEDULERS)
def test_jit_is_eager_and_traces_once(name):
    traces = []

    @jax.jit
    def guided_sample(table, noise, scale, factor):
        def denoise(x_t, t, i, kept):
            traces.append(name)
            cond, _ = toy_denoiser(x_t, t, i)
            return guidance.rescale(guidance.classifier_free(0.5 * x_t, cond, scale), cond, factor), kept

        return sample(name, table, denoise, noise, prediction_type="epsilon")

    first = trajectory(name, ScheduleConfig(), 3)
    other = trajectory(name, ScheduleConfig(beta_end=0.02, timestep_spacing="trailing"), 3)
    found = guided_sample(first, NOISE, 5.0, 0.7)
    changed = [
        guided_sample(other, NOISE, 5.0, 0.7),
        guided_sample(first, -NOISE, 5.0, 0.7),
        guided_sample(first, NOISE, 2.0, 0.7),
        guided_sample(first, NOISE, 5.0, 0.0),
    ]
    assert len(traces) == 1
    assert all(np.abs(found - latents).max() > 1e-2 for latents in changed)
    with jax.disable_jit():
        eager = guided_sample(first, NOISE, 5.0, 0.7)
    assert np.abs(found - eager).max() <= 1e-5 * np.abs(eager).max()  # measured 5.9e-7


def test_guidance():
    uncond, cond = NOISE, jnp.roll(NOISE, 1) * 3 + 1
    np.testing.assert_allclose(guidance.classifier_free(uncond, cond, 1.0), cond, atol=1e-6)  # one rounding
    np.testing.assert_array_equal(guidance.classifier_free(uncond, cond, 0.0), uncond)
    guided = guidance.classifier_free(uncond, cond, 5.0)
    np.testing.assert_allclose(guided, 5 * cond - 4 * uncond, rtol=1e-5, atol=1e-5)

    np.testing.assert_array_equal(guidance.rescale(guided, cond, 0.0), guided)
    for factor in (0.7, 1.0):
        expected = rescale_noise_cfg(torch.tensor(np.array(guided)), torch.tensor(np.array(cond)), factor)
        np.testing.assert_allclose(guidance.rescale(guided, cond, factor), expected, rtol=2e-6)  # measured 1.2e-7
    one = guidance.rescale(guided[:1], cond[:1], 0.7)
    np.testing.assert_allclose(one, guidance.rescale(guided, cond, 0.7)[:1], rtol=1e-6)  # rows do not mix
    constant = jnp.ones_like(guided)
    np.testing.assert_array_equal(guidance.rescale(constant, cond, 0.7), constant)


def test_guidance_in_half_precision_is_computed_in_float32():
    uncond, cond = NOISE.astype(jnp.bfloat16), jnp.roll(NOISE, 1).astype(jnp.bfloat16)
    guided = guidance.classifier_free(uncond, cond, 7.5)
    expected = guidance.classifier_free(uncond.astype(jnp.float32), cond.astype(jnp.float32), 7.5)
    assert guided.dtype == guidance.rescale(guided, cond, 0.5).dtype == jnp.float32
    np.testing.assert_array_equal(guided, expected)


def test_scheduler_files():
    assert ScheduleConfig.from_dict(SDXL) == ScheduleConfig() == ScheduleConfig.from_dict({})
    # A pixel model's clipping counts only where the class in the file reads it.
    assert ScheduleConfig.from_dict(SDXL | {"clip_sample": True, "thresholding": True}) == ScheduleConfig()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample"),
        ({"_class_name": None, "clip_sample": True}, "clip_sample"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "thresholding"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"timestep_spacing": "sideways"}, "timestep_spacing"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"interpolation_type": "log_linear"}, "interpolation_type"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ({"sigma_max": 80.0}, "sigma_max"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"timestep_spacing": ["leading"]}, "timestep_spacing"),
        ({"beta_start": 0.02}, "beta_start"),
        ({"beta_end": float("nan")}, "beta_end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scheduler_files_refused(change, key):
    with pytest.raises(InputError, match=key):
        ScheduleConfig.from_dict(SDXL | change)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_refused(name):
    for steps in (0, -1, 1001):
        with pytest.raises(InputError, match="1 to 1000"):
            trajectory(name, ScheduleConfig(), steps)
    with pytest.raises(InputError, match="1000 steps are too many"):  # its offset would ask for timestep 1000
        trajectory(name, ScheduleConfig(), 1000)


def test_names_refused():
    table = trajectory("ddim", ScheduleConfig(), 1)
    with pytest.raises(InputError, match="'plms': choose one of ddim, euler, dpm\\+\\+"):
        trajectory("plms", ScheduleConfig(), 30)
    with pytest.raises(InputError, match="plms"):
        sample("plms", table, toy_denoiser, NOISE, prediction_type="epsilon")
    with pytest.raises(InputError, match="epsilon or v_prediction"):
        sample("ddim", table, toy_denoiser, NOISE, prediction_type="sample")
