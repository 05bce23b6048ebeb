"""SDXL with random weights in three sizes, read by both sides of a benchmark. What they draw is noise."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.compare import Run, take_device
from benchmarks.meter import in_fresh_process
from infinite_id_jax.stable_diffusion.config import UNetConfig, VAEConfig
from infinite_id_jax.weights.settings import SDXL, Settings

# jax and torch are imported where they are used: --device decides first what JAX may see.

CLIP_TOKENS, FACE_DIM = 257, 512
PROMPT = "a photo of a person in the snow"


class Size(NamedTuple):
    settings: Settings
    clip_dim: int
    resolution: int  # pixels
    steps: int


def _settings(unet: UNetConfig, vae: VAEConfig, text_widths: tuple[int, int]) -> Settings:
    """SDXL's, in other sizes; the text encoders of two layers side by side are the U-Net's context."""
    first, second = (
        dataclasses.replace(
            config, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4
        )
        for config, width in zip(SDXL.text, text_widths, strict=True)
    )
    unet = dataclasses.replace(
        unet,
        cross_attention_dim=sum(text_widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return SDXL._replace(unet=unet, vae=vae, text=(first, dataclasses.replace(second, projection_dim=32)))


SIZES = {
    "tiny": Size(
        _settings(
            UNetConfig(
                block_out_channels=(32, 64, 64),
                layers_per_block=1,
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(2, 4, 4),
                norm_num_groups=8,
            ),
            VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8),
            (24, 40),
        ),
        clip_dim=32,
        resolution=128,
        steps=2,
    ),
    # SDXL's layers and heads of 64, with two fifths of its channels and fewer transformers.
    "small": Size(
        _settings(
            UNetConfig(
                block_out_channels=(128, 256, 512), transformer_layers_per_block=(1, 2, 4), attention_head_dim=(2, 4, 8)
            ),
            VAEConfig(block_out_channels=(64, 128, 256, 256)),
            (192, 320),
        ),
        clip_dim=1280,
        resolution=256,
        steps=4,
    ),
    "full": Size(SDXL, clip_dim=1664, resolution=1024, steps=30),
}


def write(run: Run) -> Path:
    """A folder with `model` and `adapter`, made unless it is whole already."""
    folder = run.folder / f"{run.size}-{run.dtype}"
    if not (folder / "adapter" / "adapter.safetensors").exists():
        # JAX gives a GPU's memory back to nobody but the system.
        in_fresh_process(_make, run, folder) if run.device == "gpu" else _make(run, folder)
    return folder


def _make(run: Run, folder: Path) -> None:
    take_device("cpu")
    import jax
    from flax import nnx

    from infinite_id_jax.identity.config import AdapterConfig
    from infinite_id_jax.identity.inject import IdentityAdapter
    from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
    from infinite_id_jax.stable_diffusion.tokenizer import EOS, CLIPTokenizer
    from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
    from infinite_id_jax.stable_diffusion.vae import AutoencoderKL
    from infinite_id_jax.weights.adapter import save_adapter
    from infinite_id_jax.weights.folder import StableDiffusionXL
    from infinite_id_jax.weights.save_base import save_base

    size = SIZES[run.size]
    settings, rngs = size.settings, nnx.Rngs(0)

    def random(kind: Any, config: Any) -> Any:
        graph, state = nnx.split(kind(config, rngs=rngs))
        return nnx.merge(graph, jax.tree.map(lambda x: x.astype(run.dtype), state))

    unet = random(UNet2DConditionModel, settings.unet)
    vae = random(AutoencoderKL, settings.vae)
    texts = tuple(random(CLIPTextModel, config) for config in settings.text)
    tokenizers = CLIPTokenizer.of_clip(EOS), CLIPTokenizer.of_clip("!")
    if not (folder / "model").exists():  # whole, from a run that was stopped after it
        save_base(StableDiffusionXL(settings, unet, vae, (texts[0], texts[1]), tokenizers), folder / "model")
    width = settings.unet.cross_attention_dim
    adapter = AdapterConfig(clip_dim=size.clip_dim, face_dim=FACE_DIM, cross_attention_dim=width)
    save_adapter(IdentityAdapter(adapter, unet, rngs=nnx.Rngs(1)), folder / "adapter")


def ours(run: Run, **options: Any) -> Any:
    """The pipeline of this package."""
    from infinite_id_jax import InfiniteIDPipeline

    folder, options = write(run), {"dtype": run.dtype, "faces": "offline", **options}
    return InfiniteIDPipeline.from_pretrained(folder / "model", folder / "adapter", **options)


def peer(run: Run, *, training: bool = False) -> Any:
    """diffusers' pipeline with this package's PyTorch runtime: plain SDXL, and Infinite-ID by `sample`.

    Its U-Net and its decoder are compiled where the run says so, with channels last on a GPU, where that is faster;
    for training the U-Net alone.
    """
    import torch

    from infinite_id_jax.weights.infinite_id_diffusers import InfiniteIDPipeline

    folder = write(run)
    pipe = InfiniteIDPipeline.from_pretrained(
        folder / "model", torch_dtype=getattr(torch, run.dtype), image_encoder=None
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_infinite_id(folder / "adapter")
    pipe.to("cuda" if run.device == "gpu" else "cpu")
    if run.device == "gpu":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if run.compile_peer and training:
        pipe.unet.compile(mode=run.peer_mode)
    elif run.compile_peer:
        pipe.unet.compile(mode=run.peer_mode, fullgraph=True)
        pipe.vae.decoder.compile(mode=run.peer_mode, fullgraph=True)
    return pipe


def features(run: Run, people: int) -> list[dict[str, np.ndarray]]:
    """What is known of random faces, as FaceFeatures and the PyTorch runtime take it."""
    rng = np.random.default_rng(3)
    shapes = {"clip_hidden_states": (CLIP_TOKENS, SIZES[run.size].clip_dim), "face_embedding": (FACE_DIM,)}
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(people)]


def latents(run: Run, rows: int) -> np.ndarray:
    """Unit normal noise [rows, h, w, 4]."""
    side = SIZES[run.size].resolution // 8
    return np.random.default_rng(1).normal(size=(rows, side, side, 4)).astype(np.float32)


def to_torch(run: Run, nhwc: np.ndarray) -> Any:
    """[B, h, w, c] as PyTorch's [B, c, h, w] on the device."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(nhwc, -1, 1)))
    return x.to("cuda" if run.device == "gpu" else "cpu", getattr(torch, run.dtype))


def from_torch(x: Any) -> Any:
    """[B, c, h, w] as [B, h, w, c], not copied."""
    return x.movedim(1, -1)


@contextmanager
def inference() -> Iterator[None]:
    """PyTorch without gradients."""
    import torch

    with torch.inference_mode():
        yield
