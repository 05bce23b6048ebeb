"""Infinite-ID on SDXL as published (Sec. 4.1): 16 accelerators x 4 images, 1M steps.

    python -m data_pipeline --input PHOTOS --output data/people --model MODEL --face-backend insightface
    python train.py --config configs/infinite_id_sdxl.py --output-dir runs/infinite_id

Cost: 13.5 TFLOP an image (two forwards of the U-Net at 1024 px), 865 TFLOP a step of 64 images.
`--dry-run` prints it with the memory. Not run at this size so far.
"""

from configs.base import DataConfig, ModelConfig, RunConfig, TrainConfig
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.training.objective import MethodConfig
from infinite_id_jax.training.state import OptimizerConfig

config = TrainConfig(
    model=ModelConfig(path="stabilityai/stable-diffusion-xl-base-1.0"),
    data=DataConfig(path="data/people", batch_size=64),
    adapter=AdapterConfig(clip_dim=1664, face_dim=512, face_tokens=1),  # ViT-bigG/14 and ArcFace (decisions 1, 4)
    method=MethodConfig(identity_drop=0.1, remat="blocks"),
    optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.01),
    run=RunConfig(
        steps=1_000_000,
        checkpoint_every=2000,  # at two seconds a step about an hour lies between them
        validate_every=5000,
        sample_every=20_000,
        tensorboard=True,
    ),
)
