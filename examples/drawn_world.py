"""A small SDXL that can really denoise, and drawn people for it to learn: for learning checks in minutes on a CPU.

The autoencoder's last layer is fitted in closed form and the U-Net is trained from captions, as SDXL was, so that a
frozen base without text is one that has seen missing text. The text and image encoders keep random weights.
"""

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx

from data_pipeline.drawing import Identity, Scene, picture
from data_pipeline.generated import write_generated
from data_pipeline.records import PhotoDataset
from examples import tiny_sdxl
from infinite_id_jax.conditioning import encode_text
from infinite_id_jax.diffusion.loss import add_noise, squared_error
from infinite_id_jax.diffusion.schedule import alphas_cumprod
from infinite_id_jax.files import save_json, write_folder
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel
from infinite_id_jax.stable_diffusion.config import CLIPVisionConfig, UNetConfig, VAEConfig
from infinite_id_jax.stable_diffusion.unet import AddedConditions, UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL, Encoder
from infinite_id_jax.typing import Array, Float
from infinite_id_jax.weights.export import save_weights
from infinite_id_jax.weights.folder import load_text_encoders, load_tokenizers, read_settings

SIZE = 64  # pixels of a photo, 8 x 8 latents
HEADS = (0.30, 0.36)  # radius in parts of the picture: people near the camera, so that who it is matters in latents
UNET = UNetConfig(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(1, 2),
    cross_attention_dim=64,
    norm_num_groups=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 32,
)
VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0)
VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=56,
    projection_dim=32,
)
_LOG_VARIANCE = -7.0  # of the autoencoder's posterior: std 0.03 beside latents of std 1


class BaseTraining(NamedTuple):
    """How the base is trained."""

    steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 1e-3  # the peak, after a warm-up and before a cosine to 0
    text_drop: float = 0.5  # share of rows without text, which is all that the adapter's training will see


def write_world(folder: Path, *, people: int, photos: int, training: BaseTraining, seed: int = 0) -> None:
    """Write folder/data (drawn people and their features) and folder/model (the trained base), where missing."""
    untrained, data = folder / "untrained", folder / "data"

    def write_trained(beside: Path) -> None:
        shutil.copytree(untrained, beside)
        save_weights(train_base(untrained, data, training, seed), beside / "unet" / "model.safetensors")

    write_folder(untrained, lambda beside: _write_untrained(beside, seed))
    write_generated(data, untrained, people=people, photos=photos, size=SIZE, seed=seed, radius=HEADS)
    write_folder(folder / "model", write_trained)


def _write_untrained(folder: Path, seed: int) -> None:
    """The tiny random SDXL, three of its parts replaced."""
    tiny_sdxl.write_model(folder, seed)
    rngs = nnx.Rngs(seed)
    for name, module in (
        ("unet", UNet2DConditionModel(UNET, rngs=rngs)),
        ("vae", fit_encoder(AutoencoderKL(VAE, rngs=rngs))),
        ("image_encoder", CLIPVisionModel(VISION, rngs=rngs)),
    ):
        save_weights(module, folder / name / "model.safetensors")
        save_json(module.config.to_dict(), folder / name / "config.json")


def fit_encoder(vae: AutoencoderKL, pictures: int = 500) -> AutoencoderKL:
    """Fit the encoder's last layer, in place, to the four principal components of 8 x 8 pixels (mostly colour).

    Random convolutions below it are features enough for least squares; each channel then has variance 1.
    """
    drawn = [np.asarray(picture(Identity.from_seed(i), Scene.from_seed(i, HEADS), SIZE)) for i in range(pictures)]
    drawn = np.stack(drawn) / np.float32(127.5) - 1
    patches = rearrange(drawn, "B (h p) (w q) C -> (B h w) (p q C)", p=VAE.downscale, q=VAE.downscale)
    patches = patches - patches.mean(axis=0)
    variance, axes = np.linalg.eigh(np.cov(patches.T))
    channels = VAE.latent_channels
    target = patches @ (axes / np.sqrt(np.maximum(variance, 1e-12)))[:, ::-1][:, :channels]

    features = np.concatenate([_features(vae.encoder, jnp.asarray(part)) for part in np.array_split(drawn, 10)])
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    windows = rearrange(windows, "B h w C i j -> (B h w) (i j C)")
    windows = np.concatenate([windows, np.ones_like(windows[:, :1])], axis=1).astype(np.float64)
    gram = windows.T @ windows
    ridge = 1e-6 * np.trace(gram) / len(gram)
    solution = np.linalg.solve(gram + ridge * np.eye(len(gram)), windows.T @ target)
    solution = solution / (windows @ solution).std(axis=0)

    kernel, bias = vae.encoder.conv_out.kernel, vae.encoder.conv_out.bias
    assert bias is not None, "the encoder's convolutions have one"
    weights = rearrange(solution[:-1], "(i j C) c -> i j C c", i=3, j=3)
    kernel[...] = jnp.zeros_like(kernel[...]).at[..., :channels].set(weights)
    bias[...] = jnp.full_like(bias[...], _LOG_VARIANCE).at[:channels].set(solution[-1])
    vae.quant_conv.kernel[...] = jnp.eye(2 * channels).reshape(1, 1, 2 * channels, 2 * channels)
    return vae


@nnx.jit
def _features(encoder: Encoder, x: Array) -> Array:
    """What the encoder's last layer sees."""
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        x = block(x)
    return jax.nn.silu(encoder.conv_norm_out(encoder.mid_block(x)))


class _Photos(NamedTuple):
    """The train split in memory: latents, and of which caption each is."""

    latents: Float[Array, "n h w c"]
    time_ids: Float[Array, "n 6"]
    caption: Array
    tokens: Float[Array, "captions L C"]
    pooled: Float[Array, "captions D"]


def train_base(model: Path, data: Path, training: BaseTraining, seed: int) -> UNet2DConditionModel:
    """All parameters of a new U-Net, on the train split, from captions that are missing now and then."""
    unet = UNet2DConditionModel(UNET, rngs=nnx.Rngs(seed))
    graph, state = nnx.split(unet)
    rate = optax.warmup_cosine_decay_schedule(0.0, training.learning_rate, training.steps // 20, training.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    loss = partial(_base_loss, graph, alphas_cumprod(read_settings(model).schedule), training)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, photos: _Photos, key: Array) -> tuple[Any, Array]:
        arrays, moments = state
        value, gradient = jax.value_and_grad(loss)(arrays, photos, key)
        updates, moments = optimizer.update(gradient, moments, arrays)
        return (optax.apply_updates(arrays, updates), moments), value

    photos, key = _read_photos(model, data), jax.random.key(seed)
    taken, losses = (state, optimizer.init(state)), []
    for i in range(training.steps):
        taken, value = step(taken, photos, jax.random.fold_in(key, i))
        losses.append(value)
        if (i + 1) % 100 == 0:
            print(f"base step {i + 1}/{training.steps}: loss {np.mean(losses[-100:]):.4f}", file=sys.stderr)
    return nnx.merge(graph, taken[0])


def _base_loss(
    graph: Any, alpha_bar: np.ndarray, training: BaseTraining, arrays: Any, photos: _Photos, key: Array
) -> Array:
    keys, rows = jax.random.split(key, 4), training.batch_size
    chosen = jax.random.randint(keys[0], (rows,), 0, len(photos.latents))
    t = jax.random.randint(keys[1], (rows,), 0, len(alpha_bar))
    x_0 = photos.latents[chosen]
    eps = jax.random.normal(keys[2], x_0.shape)
    keep = jax.random.bernoulli(keys[3], 1 - training.text_drop, (rows,))
    x_t, _ = add_noise(x_0, eps, t, alpha_bar)
    caption = photos.caption[chosen]
    # Zeros are what the adapter's training has for missing text: without a bias, their values are zeros too.
    tokens = photos.tokens[caption] * keep[:, None, None]
    added = AddedConditions(photos.pooled[caption] * keep[:, None], photos.time_ids[chosen])
    return squared_error(nnx.merge(graph, arrays)(x_t, t.astype(jnp.float32), tokens, added), eps).mean()


def _read_photos(model: Path, data: Path) -> _Photos:
    dataset = PhotoDataset(data, "train")
    records = [dataset[i] for i in range(len(dataset))]
    captions, index = np.unique([record.caption for record in records], return_inverse=True)
    first, second = (nnx.split(encoder) for encoder in load_text_encoders(model, read_settings(model)))
    ids = [tokenize(captions.tolist()) for tokenize in load_tokenizers(model)]
    tokens, pooled = encode_text(first, second, *ids)
    return _Photos(
        latents=jnp.asarray(np.stack([record.latent_mean for record in records]), jnp.float32),
        time_ids=jnp.asarray(np.stack([record.time_ids for record in records]), jnp.float32),
        caption=jnp.asarray(index),
        tokens=tokens,
        pooled=pooled,
    )
