"""The whole of training in a minute on a CPU: a tiny random SDXL, drawn people, a checkpoint at every step.

    python train.py --config configs/debug.py --output-dir runs/debug

Random weights: for a look at the machinery only. Model and dataset are written to DIR/inputs unless --set names others.
"""

import dataclasses
from functools import partial
from pathlib import Path

from configs.base import DataConfig, ModelConfig, RunConfig, TrainConfig
from examples import tiny_sdxl
from infinite_id_jax.files import write_folder
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.training.state import OptimizerConfig

PEOPLE, PHOTOS, SIZE = 16, 4, 64
# A block with attention and one without, down and up: whatever is there more than once is only compiled for longer.
UNET = dataclasses.replace(
    tiny_sdxl.UNET,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(2, 4),
)


def prepare(folder: Path, config: TrainConfig) -> TrainConfig:
    """Write the model and the dataset that the configuration leaves open; a killed writing goes on or begins anew."""
    from data_pipeline.generated import write_generated

    model = Path(config.model.path) if config.model.path else folder / "model"
    if not config.model.path:
        write_folder(model, partial(tiny_sdxl.write_model, unet=UNET))
    data = Path(config.data.path) if config.data.path else folder / "data"
    if not config.data.path:
        write_generated(data, model, people=PEOPLE, photos=PHOTOS, size=SIZE, seed=0)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(model)),
        data=dataclasses.replace(config.data, path=str(data)),
    )


config = TrainConfig(
    model=ModelConfig(path="", dtype="float32", architecture=UNET),
    data=DataConfig(path="", batch_size=8, resolution=SIZE),
    adapter=AdapterConfig(
        clip_dim=tiny_sdxl.VISION.hidden_size, face_dim=32, cross_attention_dim=UNET.cross_attention_dim
    ),  # 32 numbers stand for a face in data_pipeline.generated
    optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.9),
    run=RunConfig(steps=20, mesh="data=1", log_every=1, checkpoint_every=1, validate_every=10, validation_batches=1),
    prepare=prepare,
)
