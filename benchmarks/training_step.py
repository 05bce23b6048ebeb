"""One step of identity-enhanced training: this package against a PyTorch step of the same adapter.

    python -m benchmarks.training_step [--device cpu|gpu] [--size tiny|small|full] [--json FILE]

Both noise the same kind of latents, run the frozen U-Net with the identity alone, and move the adapter by AdamW; the
peer checkpoints its transformer blocks where ours forgets them. FLOPs count as two forwards of the base, whatever is
computed twice.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.compare import Case, Run, main, of_leaves, program_bytes

ROWS = {"tiny": 2, "small": 2, "full": 4}
REMAT = {"tiny": "none", "small": "none", "full": "blocks"}
RATE = 1e-4


def cases(run: Run) -> Iterator[Case]:
    """SDXL's size, and on a GPU half of it too."""
    resolution = models.SIZES[run.size].resolution
    for pixels in (resolution // 2, resolution) if run.size == "full" else (resolution,):
        yield _case(run, pixels)


def _case(run: Run, pixels: int) -> Case:
    batch = make_batch(run, pixels)
    step, flops, bytes_ = our_step(run, batch)
    name = f"step, {ROWS[run.size]} x {pixels} px, remat {REMAT[run.size]}"
    return Case(name, step, peer_step(run, batch), flops, bytes_, comparable=False)


def make_batch(run: Run, pixels: int) -> dict[str, np.ndarray]:
    """Records of random pairs, as the loader brings them."""
    rows, side, rng = ROWS[run.size], pixels // 8, np.random.default_rng(4)
    faces = models.features(run, rows)
    latents = rng.normal(size=(2, rows, side, side, 4)).astype(np.float32)
    return {
        "latent_mean": 4 * latents[0],
        "latent_std": np.abs(latents[1]),
        "time_ids": np.full((rows, 6), [pixels, pixels, 0, 0, pixels, pixels], np.float32),
        **{name: np.stack([face[name] for face in faces]) for name in faces[0]},
    }


def our_step(run: Run, batch: dict[str, np.ndarray]) -> tuple[Callable[[], Any], float, int]:
    """A step that goes on from the last one, its loss and the new state; its work and its memory."""
    import jax
    from flax import nnx

    from infinite_id_jax.diffusion.schedule import ScheduleConfig
    from infinite_id_jax.training.flops import unet_flops
    from infinite_id_jax.training.objective import MethodConfig
    from infinite_id_jax.training.setup import make_objective
    from infinite_id_jax.training.state import OptimizerConfig, adapter_arrays, initial_state
    from infinite_id_jax.training.step import train_step
    from infinite_id_jax.weights.adapter import load_adapter
    from infinite_id_jax.weights.folder import load_unet, read_settings

    folder = models.write(run)
    settings = read_settings(folder / "model")
    unet = load_unet(folder / "model", settings, dtype=run.dtype)
    adapter = load_adapter(folder / "adapter", unet)
    rows, height, width, _ = batch["latent_mean"].shape
    graph, state = nnx.split(unet)
    work = 2 * unet_flops(graph, state, rows, height, width)
    method = MethodConfig(remat=REMAT[run.size], identity_drop=0.0)
    config: Any = adapter.config
    objective, frozen = make_objective(method, config, ScheduleConfig(), settings.vae.scaling_factor, unet)
    optimizer = OptimizerConfig(learning_rate=RATE, warmup_steps=0)
    first = initial_state(optimizer, adapter_arrays(adapter))
    inputs = {name: jax.numpy.asarray(x) for name, x in batch.items()}, jax.random.key(0)
    flat, leaves = of_leaves(partial(train_step, objective, optimizer, None), frozen)
    compiled = jax.jit(flat, donate_argnums=1).lower(leaves, first, *inputs).compile()
    state = [first]

    def step() -> Any:
        state[0], metrics = compiled(leaves, state[0], *inputs)
        return metrics.loss, state[0]

    return step, work, program_bytes(compiled)


class IdentityOnly:
    """diffusers' attention processor with the text off: Attn(Q, K'_id, V'_id)."""

    def __init__(self, c_id: list[Any], to_k: Any, to_v: Any):
        self.c_id, self.to_k, self.to_v = c_id, to_k, to_v

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        import torch.nn.functional as F

        from infinite_id_jax.weights.infinite_id_diffusers import split_heads

        keys = (F.linear(self.c_id[0], weight.to(hidden_states.dtype)) for weight in (self.to_k, self.to_v))
        q, k, v = (split_heads(x, attn.heads) for x in (attn.to_q(hidden_states), *keys))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def peer_step(run: Run, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """The same in PyTorch, with autograd, AdamW and its fused kernels."""
    import torch
    import torch.nn.functional as F
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from torch.utils.checkpoint import checkpoint

    from infinite_id_jax.weights.infinite_id_diffusers import SCHEDULE

    pipe = models.peer(run, training=True)
    unet, adapter = pipe.unet.requires_grad_(False), pipe.adapter
    place = unet.device
    for key in adapter:
        dict.__setitem__(adapter, key, dict.__getitem__(adapter, key).to(place, torch.float32).requires_grad_())
    c_id: list[Any] = [None]
    cross = {name: n for n, name in enumerate(unet.attn_processors) if ".attn2." in name}
    processors = dict(unet.attn_processors)
    for name, n in cross.items():
        weights = (adapter[f"ip_adapter.{n}.{key}.weight"] for key in ("to_k_ip", "to_v_ip"))
        processors[name] = IdentityOnly(c_id, *weights)
    unet.set_attn_processor(processors)
    if REMAT[run.size] != "none":
        unet.train()
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        for module in unet.modules():
            if hasattr(module, "gradient_checkpointing") and not isinstance(module, Transformer2DModel):
                module.gradient_checkpointing = False  # of resnets, which ours does not forget
    adamw = torch.optim.AdamW([*adapter.values()], RATE, fused=True)
    options = {key: value for key, value in SCHEDULE.items() if key.startswith("beta")}
    scheduler: Any = DDPMScheduler(**options, num_train_timesteps=1000)
    on_device = {name: torch.from_numpy(x).to(place) for name, x in batch.items()}
    mean, std = (models.to_torch(run, batch[name]) for name in ("latent_mean", "latent_std"))
    rows, dtype = len(mean), unet.dtype
    pooled = torch.zeros(rows, models.SIZES[run.size].settings.unet.pooled_dim, device=place, dtype=dtype)
    unread = torch.zeros(rows, 1, models.SIZES[run.size].settings.unet.cross_attention_dim, device=place, dtype=dtype)
    people = {name: on_device[name] for name in ("clip_hidden_states", "face_embedding")}

    def step() -> Any:
        x_0 = 0.13025 * (mean + std * torch.randn_like(mean))
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (rows,), device=place)
        c_id[0] = torch.vmap(adapter.tokens)(people).to(dtype)
        added = {"text_embeds": pooled, "time_ids": on_device["time_ids"].to(dtype)}
        prediction = unet(scheduler.add_noise(x_0, eps, t), t, unread, added_cond_kwargs=added).sample
        loss = F.mse_loss(prediction.float(), eps.float())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    # CUDA graphs would hold the activations of a forward that is computed again.
    sys.exit(
        main("benchmarks.training_step", __doc__, cases, ["--peer-mode", "max-autotune-no-cudagraphs", *sys.argv[1:]])
    )
