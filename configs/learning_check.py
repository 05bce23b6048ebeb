"""Identity-enhanced training that really learns, in minutes on a CPU: drawn people over a small base trained first.

    python train.py --config configs/learning_check.py --output-dir runs/learning_check

Cost on two CPU cores: 5 minutes for the model and the dataset, then 3. `python -m examples.learning_check` runs this
and judges it. Model and dataset are written to
DIR/inputs unless --set names others.
"""

import dataclasses
from pathlib import Path

from configs.base import DataConfig, ModelConfig, RunConfig, TrainConfig
from examples.drawn_world import SIZE, UNET, VISION
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.training.objective import MethodConfig
from infinite_id_jax.training.state import OptimizerConfig

PEOPLE, PHOTOS = 512, 6


def prepare(folder: Path, config: TrainConfig) -> TrainConfig:
    """Write the model and the dataset where the configuration leaves them open."""
    from examples.drawn_world import BaseTraining, write_world

    if not (config.model.path and config.data.path):
        write_world(folder, people=PEOPLE, photos=PHOTOS, training=BaseTraining())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=config.model.path or str(folder / "model")),
        data=dataclasses.replace(config.data, path=config.data.path or str(folder / "data")),
    )


config = TrainConfig(
    model=ModelConfig(path="", dtype="float32", architecture=UNET),
    data=DataConfig(path="", batch_size=32, resolution=SIZE),
    adapter=AdapterConfig(
        clip_dim=VISION.hidden_size, face_dim=32, cross_attention_dim=UNET.cross_attention_dim
    ),  # 32 numbers stand for a face in data_pipeline.generated
    # Of the plain loss most is what little noise leaves unknown, whoever the person is: weighted, a step says more.
    method=MethodConfig(min_snr_gamma=1.0, remat="none"),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),  # for a thousand steps instead of a million
    run=RunConfig(steps=1200, mesh="data=1", log_every=50, checkpoint_every=500, validate_every=50),
    prepare=prepare,
)
