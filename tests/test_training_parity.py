"""Losses, gradients and updates of training against diffusers' schedulers and PyTorch's autograd and AdamW."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from infinite_id_jax.diffusion.loss import add_noise, min_snr_weight, squared_error
from infinite_id_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from infinite_id_jax.training.objective import MethodConfig, draw
from infinite_id_jax.training.setup import make_objective
from infinite_id_jax.training.state import OptimizerConfig, adapter_arrays, initial_state, make_optimizer
from infinite_id_jax.training.step import train_step
from infinite_id_jax.weights.adapter import load_adapter
from infinite_id_jax.weights.folder import load_text_encoders, load_unet, read_settings
from tests import reference_torch as reference

KEY = jax.random.key(4)  # drops rows 0 and 2 of the first step, and others of the next
STEPS = 3
GAMMA = 5.0
# Gradients decide Adam's first updates by their sign alone; an epsilon of their size lets their size count.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, eps=1e-4)


# The parts of the loss


@pytest.fixture(scope="module")
def latents():
    """x_0, eps and two timesteps each from the ends and the middle."""
    x_0, eps = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 4)).astype(np.float32)
    return x_0, eps, np.array([0, 1, 500, 999])


def test_noise_is_added_as_diffusers_does(latents):
    x_0, eps, t = latents
    x_t, v = add_noise(jnp.asarray(x_0), jnp.asarray(eps), jnp.asarray(t), alphas_cumprod(ScheduleConfig()))
    scheduler, inputs = DDPMScheduler(**reference.SDXL_SCHEDULER), [torch.from_numpy(x) for x in latents]
    # Measured: 2.4e-7 and 4.8e-7, values up to 4.5.
    np.testing.assert_allclose(x_t, scheduler.add_noise(*inputs), atol=2e-6)
    np.testing.assert_allclose(v, scheduler.get_velocity(*inputs), atol=2e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight(prediction_type):
    """Hang et al. 2023: the weight of x_0's error is min(SNR, gamma); eps's error is SNR, v's is SNR + 1 times that."""
    t = np.arange(1000)
    weight = min_snr_weight(jnp.asarray(t), alphas_cumprod(ScheduleConfig()), GAMMA, prediction_type)
    snr = compute_snr(DDPMScheduler(**reference.SDXL_SCHEDULER), torch.from_numpy(t)).double().numpy()
    assert snr.min() < GAMMA < snr.max()
    per_error = snr if prediction_type == "epsilon" else snr + 1
    np.testing.assert_allclose(weight * per_error, np.minimum(snr, GAMMA), rtol=1e-4)  # measured: 2e-5


def test_squared_error_is_a_mean_per_row_in_fp32():
    prediction, target = np.random.default_rng(1).normal(size=(2, 3, 4, 5, 6))
    error = squared_error(jnp.asarray(prediction, jnp.bfloat16), jnp.asarray(target, jnp.float32))
    assert error.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(prediction, jnp.bfloat16), np.float64)
    expected = [np.mean((a - b) ** 2) for a, b in zip(rounded, target, strict=True)]
    np.testing.assert_allclose(error, expected, rtol=1e-6)


def test_adamw_is_pytorchs():
    """Decay, warm-up and clipping over five updates, on gradients below and above the norm that clips."""
    config = OptimizerConfig(
        learning_rate=0.01, warmup_steps=3, weight_decay=0.1, beta1=0.8, beta2=0.95, max_grad_norm=4.0
    )
    rng = np.random.default_rng(2)
    start = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    gradients = [{name: scale * rng.normal(size=x.shape) for name, x in start.items()} for scale in (1, 3, 0.1, 9, 1)]
    ours = {name: jnp.asarray(x, jnp.float32) for name, x in start.items()}
    optimizer = make_optimizer(config)
    moments = optimizer.init(ours)
    theirs = {name: torch.tensor(x, requires_grad=True) for name, x in start.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: min(1, (step + 1) / 4))
    for gradient in gradients:
        updates, moments = optimizer.update(
            {k: jnp.asarray(g, jnp.float32) for k, g in gradient.items()}, moments, ours
        )
        ours = optax.apply_updates(ours, updates)
        for name, x in theirs.items():
            x.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 4.0)
        adamw.step()
        warm_up.step()
        for name, x in theirs.items():  # measured: 2e-7
            np.testing.assert_allclose(ours[name], x.detach(), atol=1e-6)


# Whole steps


def make_batch(clip_dim: int, face_dim: int, rows: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    sizes = rng.integers(32, 128, size=(rows, 6))
    arrays = {
        "latent_mean": 4 * rng.normal(size=(rows, 8, 8, 4)),
        "latent_std": rng.uniform(0.1, 1, size=(rows, 8, 8, 4)),
        "time_ids": sizes,
        "clip_hidden_states": rng.normal(size=(rows, 257, clip_dim)),
        "face_embedding": 3 * rng.normal(size=(rows, face_dim)),
    }
    ids = rng.integers(1, 500, size=(2, rows, 77))
    return {k: x.astype(np.float32) for k, x in arrays.items()} | {"input_ids": ids[0], "input_ids_2": ids[1]}


class Steps(NamedTuple):
    """What `STEPS` steps on one batch gave: losses, the first gradient, the adapter after the last, keyed as files."""

    losses: list[float]
    gradient: dict[str, np.ndarray]
    adapter: dict[str, np.ndarray]


def our_steps(tiny, batch, method: MethodConfig, prediction_type: str) -> tuple[Steps, list]:
    """With the randomness that each step drew."""
    settings = read_settings(tiny.model)
    unet = load_unet(tiny.model, settings)
    adapter = load_adapter(tiny.adapter, unet)
    objective, frozen = make_objective(
        method,
        adapter.config,
        ScheduleConfig(prediction_type=prediction_type),
        settings.vae.scaling_factor,
        unet,
        text=load_text_encoders(tiny.model, settings) if method.entangled else None,
    )
    state = initial_state(OPTIMIZER, adapter_arrays(adapter))
    step = jax.jit(
        partial(train_step, objective, OPTIMIZER, None), compiler_options={"xla_backend_optimization_level": 0}
    )
    losses, first, draws = [], None, []
    for i in range(STEPS):
        draws.append(jax.device_get(draw(objective, jax.random.fold_in(KEY, i), batch)))
        state, metrics = step(frozen, state, batch, KEY)
        losses.append(float(metrics.loss))
        if i == 0:
            moment = optax.tree.get(state.optimizer, "mu")  # (1 - beta1) times the gradient so far
            first = {k: np.asarray(x).T / (1 - OPTIMIZER.beta1) for k, x in moment.items()}
            norm = np.sqrt(sum(np.sum(np.square(g)) for g in first.values()))
            np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    return Steps(losses, first, {k: np.asarray(x).T for k, x in state.adapter.items()}), draws


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def reference_loss(unet, adapter, batch, drawn, scheduler, text: reference.Text | None, gamma) -> torch.Tensor:
    """Eq. 3 in PyTorch; text None is identity-enhanced training, else the entangled ablation."""
    t = torch.from_numpy(np.array(drawn.t)).long()
    x_0 = 0.13025 * (nchw(batch["latent_mean"]) + nchw(batch["latent_std"]) * nchw(drawn.posterior))
    eps, time_ids = nchw(drawn.eps), torch.from_numpy(batch["time_ids"])
    c_id = []
    for hidden, embedding, keep in zip(batch["clip_hidden_states"], batch["face_embedding"], drawn.keep, strict=True):
        person = reference.Identity(torch.from_numpy(hidden), torch.from_numpy(embedding))
        tokens = reference.identity_tokens if keep else reference.unconditional_tokens
        c_id.append(tokens(adapter, person))
    processors = {
        name: reference.IdentityCrossAttention(
            adapter[f"ip_adapter.{n}.to_k_ip.weight"],
            adapter[f"ip_adapter.{n}.to_v_ip.weight"],
            torch.stack(c_id), reference.STYLE_MERGES["none"], text is not None, 1.0, 1.0,
        )
        for name, n in reference.cross_attention_indices(unet).items()
    }  # fmt: skip
    unet.set_attn_processor(unet.attn_processors | processors)
    if text is None:  # what the U-Net is given and nobody reads
        unread = torch.full((len(t), 1, reference.CROSS_ATTENTION_DIM), torch.nan)
        text = reference.Text(unread, torch.zeros(len(t), reference.POOLED_DIM))
    else:
        keep = torch.from_numpy(np.array(drawn.keep_text)).float()[:, None]
        text = reference.Text(text.embeds * keep[..., None], text.pooled * keep)
    added = {"text_embeds": text.pooled, "time_ids": time_ids}
    prediction = unet(
        scheduler.add_noise(x_0, eps, t), t, encoder_hidden_states=text.embeds, added_cond_kwargs=added
    ).sample
    v = scheduler.config.prediction_type == "v_prediction"
    error = torch.square(prediction - (scheduler.get_velocity(x_0, eps, t) if v else eps)).mean((1, 2, 3))
    if gamma is None:
        return error.mean()
    snr = compute_snr(scheduler, t)
    return (snr.clamp(max=gamma) / (snr + 1 if v else snr) * error).mean()


@torch.no_grad()
def reference_text(tiny, batch) -> reference.Text:
    first = CLIPTextModel.from_pretrained(tiny.model / "text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(tiny.model / "text_encoder_2")
    out = first(torch.from_numpy(batch["input_ids"]), output_hidden_states=True)
    out_2 = second(torch.from_numpy(batch["input_ids_2"]), output_hidden_states=True)
    return reference.Text(torch.cat([out.hidden_states[-2], out_2.hidden_states[-2]], -1), out_2.text_embeds)


def reference_steps(tiny, batch, draws, method: MethodConfig, prediction_type: str) -> Steps:
    unet = UNet2DConditionModel.from_pretrained(tiny.model / "unet").requires_grad_(False)
    adapter = {k: x.requires_grad_() for k, x in load_file(tiny.adapter / "adapter.safetensors").items()}
    scheduler = DDPMScheduler(**reference.SDXL_SCHEDULER | {"prediction_type": prediction_type})
    text = reference_text(tiny, batch) if method.entangled else None
    o = OPTIMIZER
    adamw = torch.optim.AdamW(adapter.values(), o.learning_rate, (o.beta1, o.beta2), o.eps, o.weight_decay)
    warm_up = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: min(1, (step + 1) / (o.warmup_steps + 1)))
    losses, first = [], {}
    for drawn in draws:
        adamw.zero_grad()
        loss = reference_loss(unet, adapter, batch, drawn, scheduler, text, method.min_snr_gamma)
        loss.backward()
        losses.append(loss.item())
        first = first or {k: x.grad.numpy().copy() for k, x in adapter.items()}
        adamw.step()
        warm_up.step()
    return Steps(losses, first, {k: x.detach().numpy() for k, x in adapter.items()})


@pytest.mark.parametrize(
    ("method", "prediction_type"),
    [
        (MethodConfig(identity_drop=0.5, remat="none"), "epsilon"),
        (MethodConfig(identity_drop=0.5, entangled=True, min_snr_gamma=GAMMA, remat="none"), "v_prediction"),
    ],
    ids=["identity-enhanced", "entangled, min-SNR, v"],
)
def test_steps_match_pytorch(tiny, method, prediction_type):
    batch = make_batch(tiny.clip_dim, tiny.face_dim)
    ours, draws = our_steps(tiny, batch, method, prediction_type)
    assert set(draws[0].keep.tolist()) == {True, False}
    assert {kept for drawn in draws for kept in drawn.keep_text.tolist()} == {True, False}
    theirs = reference_steps(tiny, batch, draws, method, prediction_type)
    before = {k: x.numpy() for k, x in load_file(tiny.adapter / "adapter.safetensors").items()}
    assert ours.gradient.keys() == ours.adapter.keys() == theirs.gradient.keys()
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=6e-6)  # measured: 3e-7
    for key, expected in theirs.gradient.items():
        # Of the largest element of each array. Measured: 4.7e-6 and 1.4e-5.
        np.testing.assert_allclose(ours.gradient[key], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        # Of the largest step an element took. Measured: 1.7e-4 and 2.1e-4, where gradients are near Adam's epsilon.
        moved = np.abs(theirs.adapter[key] - before[key]).max()
        np.testing.assert_allclose(ours.adapter[key], theirs.adapter[key], rtol=0, atol=1e-3 * moved)
