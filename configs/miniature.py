"""The miniature: adapters of a small SDXL that was trained from nothing on drawn people, and the paper's claims in it.

`python -m miniature` trains and installs the model and both adapters. The adapters again, and the claims:

    python train.py --config configs/miniature.py --output-dir runs/full
    python train.py --config configs/miniature.py --set method.entangled=True --output-dir runs/entangled
    python evaluate.py --config configs/miniature.py --output-dir runs/study \\
        --adapter full=runs/full/adapter --adapter entangled=runs/entangled/adapter

The photographs that the adapters are trained on are drawn into DIR/inputs first unless --set data.path names them.
"""

import dataclasses
from pathlib import Path

from configs.base import DataConfig, ModelConfig, RunConfig, TrainConfig
from infinite_id_jax.evaluation.study import Claim, Method, StudyConfig
from infinite_id_jax.evaluation.world import World
from infinite_id_jax.files import MINIATURE, miniature
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.stable_diffusion.config import UNetConfig
from infinite_id_jax.training.objective import MethodConfig
from infinite_id_jax.training.state import OptimizerConfig

UNET = UNetConfig(
    sample_size=16,
    in_channels=8,
    out_channels=8,
    block_out_channels=(128, 128, 128),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(4, 4, 4),  # heads of 32
    cross_attention_dim=96 + 128,  # both text encoders side by side
    norm_num_groups=16,
    addition_embed_type="text_time",
    addition_time_embed_dim=16,
    projection_class_embeddings_input_dim=6 * 16 + 128,
)


def prepare(folder: Path, config: TrainConfig) -> TrainConfig:
    """Draw the photographs where the configuration leaves them open."""
    from miniature import identities, pictures

    if config.model.path == str(MINIATURE):
        miniature()  # or its absence would be known only when all pictures are drawn
    data = Path(config.data.path) if config.data.path else folder / "data"
    if not config.data.path:
        pictures.draw(folder / "pictures", ("identity",))
        identities.write(data, Path(config.model.path), pictures.read(folder / "pictures", "identity"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data)))


config = TrainConfig(
    model=ModelConfig(path=str(MINIATURE), dtype="float32", architecture=UNET),
    data=DataConfig(path="", batch_size=32, resolution=128),
    adapter=AdapterConfig(clip_dim=128, face_dim=128, cross_attention_dim=UNET.cross_attention_dim),
    method=MethodConfig(remat="none"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, max_grad_norm=1.0, ema_decay=0.998),
    run=RunConfig(
        steps=4000,
        mesh="data=1",
        checkpoint_every=250,
        validate_every=500,
        validation_batches=8,
        sample_every=1000,
        sample_steps=20,
    ),
    prepare=prepare,
)


def world() -> World:
    """Test people, the prompts of the avatars, and the judges."""
    from miniature.world import MiniatureWorld

    return MiniatureWorld(MINIATURE)


_MEAN = {"style_merge": "adain_mean"}
study = StudyConfig(
    model="miniature",
    adapters={"full": str(MINIATURE / "adapter"), "entangled": str(MINIATURE / "adapter_entangled")},
    faces="miniature",
    world=world,
    sampling={"steps": 12, "guidance_scale": 5.0, "guidance_rescale": 0.7},
    methods=(
        Method("full", "Infinite-ID", "full", {}, _MEAN),
        Method("no_mixed", "w/o mixed attention", "full", {"attention": "off"}, {"attention": "off", **_MEAN}),
        Method("mutual", "mutual attention", "full", {"attention": "mutual"}, {"attention": "mutual", **_MEAN}),
        Method(
            "no_merge", "w/o cross-attention merge", "full", {"cross_merge": False}, {"cross_merge": False, **_MEAN}
        ),
        Method("adain", "AdaIN in place of AdaIN-mean", "full", None, {"style_merge": "adain"}),
        Method("no_adain", "w/o AdaIN-mean", "full", None, {}),
        Method("smaller_2", "photo of half the size", "full", {}, None, shrink=2),
        Method("smaller_4", "photo of a quarter of the size", "full", {}, None, shrink=4),
        Method("smaller_8", "photo of an eighth of the size", "full", {}, None, shrink=8),
        Method("entangled", "w/o identity-enhanced training", "entangled", {}, _MEAN),
    ),
    claims=(  # of photographs where the other side, which has no text beside it, would lose AdaIN-mean too
        Claim("Identity-enhanced training raises the fidelity of the identity", "m_face", "full", "entangled"),
        Claim("Identity-enhanced training raises CLIP-I of faces", "clip_i", "full", "entangled", prompts="photo"),
        Claim("Mixed attention raises the consistency with the text", "clip_t", "full", "no_mixed", prompts="photo"),
        Claim("Mixed attention raises prompted attributes", "prompted", "full", "no_mixed", prompts="photo"),
        Claim("Mixed attention costs little identity", "m_face", "full", "no_mixed", -0.05, "photo"),
        Claim("Mutual attention loses identity", "m_face", "full", "mutual", prompts="photo"),
        Claim("Mutual attention loses consistency with the text", "clip_t", "full", "mutual", prompts="photo"),
        Claim("Mutual attention loses prompted attributes", "prompted", "full", "mutual", prompts="photo"),
        Claim("The merge raises the consistency with the text", "clip_t", "full", "no_merge", prompts="photo"),
        Claim("The merge raises prompted attributes", "prompted", "full", "no_merge", prompts="photo"),
        Claim("AdaIN-mean gains style", "prompted_style", "full", "no_adain", prompts="style"),
        Claim("AdaIN-mean raises the consistency with style prompts", "clip_t", "full", "no_adain", prompts="style"),
        Claim("AdaIN-mean keeps more identity than AdaIN", "m_face", "full", "adain", prompts="style"),
        Claim("Without AdaIN-mean the identity is kept better", "m_face", "no_adain", "full", prompts="style"),
        Claim("AdaIN gains style", "prompted_style", "adain", "no_adain", prompts="style"),
        Claim("Half the resolution loses little identity", "m_face", "smaller_2", "full", -0.05, "photo"),
        Claim("A quarter of it loses little identity", "m_face", "smaller_4", "full", -0.05, "photo"),
        Claim("An eighth of it loses little identity", "m_face", "smaller_8", "full", -0.05, "photo"),
        Claim("Half the resolution loses little text", "clip_t", "smaller_2", "full", -0.01, "photo"),
        Claim("A quarter of it loses little text", "clip_t", "smaller_4", "full", -0.01, "photo"),
        Claim("An eighth of it loses little text", "clip_t", "smaller_8", "full", -0.01, "photo"),
        Claim("Prompted attributes lose at most 5 points", "prompted", "full", "text_only", -0.05),
    ),
    base_pictures=1000,
    half_way=("skin", "hair", "hair_colour", "facial_hair", "brows"),
)
