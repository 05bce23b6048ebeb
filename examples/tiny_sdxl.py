"""A tiny SDXL with random weights, and a random adapter for it: to see the machinery run without any download.

python -m examples.tiny_sdxl FOLDER writes FOLDER/model and FOLDER/adapter. What they draw is noise.
"""

import argparse
from pathlib import Path

from flax import nnx

from examples.tiny_vocabulary import write_tokenizer
from infinite_id_jax.files import save_json
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.inject import IdentityAdapter, initialise_from_base
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig, read_json
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL
from infinite_id_jax.weights.adapter import save_adapter
from infinite_id_jax.weights.export import save_weights

# SDXL's block structure with a tenth to a twentieth of its widths.
UNET = UNetConfig(
    sample_size=16,
    block_out_channels=(32, 64, 64),
    transformer_layers_per_block=(1, 1, 2),
    attention_head_dim=(2, 4, 4),
    cross_attention_dim=64,
    norm_num_groups=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 32,
)
VAE = VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8)
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32
)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def write_model(folder: Path, seed: int = 0, unet: UNetConfig = UNET) -> None:
    """Write a whole model folder in diffusers' layout."""
    rngs = nnx.Rngs(seed)
    for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(folder / name, pad_token=pad_token)
    vocabulary = read_json(folder / "tokenizer" / "vocab.json")
    text = {
        "vocab_size": len(vocabulary),
        "eos_token_id": vocabulary["<|endoftext|>"],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    first = CLIPTextConfig(**text, hidden_size=24, projection_dim=24)
    second = CLIPTextConfig(
        **text,
        hidden_size=40,
        projection_dim=32,
        hidden_act="gelu",
        architectures=("CLIPTextModelWithProjection",),
    )
    for name, module in (
        ("unet", UNet2DConditionModel(unet, rngs=rngs)),
        ("vae", AutoencoderKL(VAE, rngs=rngs)),
        ("text_encoder", CLIPTextModel(first, rngs=rngs)),
        ("text_encoder_2", CLIPTextModel(second, rngs=rngs)),
        ("image_encoder", CLIPVisionModel(VISION, rngs=rngs)),
    ):
        save_weights(module, folder / name / "model.safetensors")
        save_json(module.config.to_dict(), folder / name / "config.json")
    save_json(SCHEDULER, folder / "scheduler" / "scheduler_config.json")
    save_json({"_class_name": "StableDiffusionXLPipeline"}, folder / "model_index.json")


def write_adapter(folder: Path, face_dim: int, seed: int = 1) -> None:
    """A random adapter for `write_model`'s U-Net, its projections started from the base's."""
    unet = UNet2DConditionModel(UNET, rngs=nnx.Rngs(0))
    config = AdapterConfig(clip_dim=VISION.hidden_size, face_dim=face_dim, cross_attention_dim=UNET.cross_attention_dim)
    adapter = IdentityAdapter(config, unet, rngs=nnx.Rngs(seed))
    initialise_from_base(adapter, unet)
    save_adapter(adapter, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--face-dim", type=int, default=128, help="128 for the offline face backend, 512 for insightface"
    )
    args = parser.parse_args()
    write_model(args.folder / "model")
    write_adapter(args.folder / "adapter", args.face_dim)
    print(f"Random weights, for a look at the machinery only: {args.folder}/model and {args.folder}/adapter")
