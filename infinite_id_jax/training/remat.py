"""Rematerialisation: which intermediate results of the U-Net are computed again in the backward pass."""

from typing import Any

import jax
from flax import nnx

from infinite_id_jax.stable_diffusion.attention import Transformer2DModel
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel

REMAT = ("none", "dots", "blocks", "all")
"""none: keep everything. dots: transformer blocks keep the results of their products with weights. blocks:
transformer blocks keep only their input. all: resnets too."""


class Checkpointed(nnx.Module):
    """Wraps a module whose results are forgotten after the forward pass, except what `policy` says."""

    def __init__(self, module: nnx.Module, policy: Any):
        self.module = module
        self.policy = policy

    def __call__(self, *inputs: Any) -> Any:
        graph, state = nnx.split(self.module)

        def run(state: Any, *inputs: Any) -> Any:
            return nnx.merge(graph, state)(*inputs)

        return jax.checkpoint(run, policy=self.policy)(state, *inputs)


def rematerialise(unet: UNet2DConditionModel, remat: str) -> None:
    """Wrap `unet`'s blocks in place, inside a trace: the tree that files and checkpoints name stays as it is."""
    if remat == "none":
        return
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    for _, module in list(nnx.iter_modules(unet)):
        if isinstance(module, Transformer2DModel):
            _wrap(module.transformer_blocks, policy)
        elif remat == "all" and "resnets" in vars(module):
            _wrap(vars(module)["resnets"], policy)


def _wrap(modules: nnx.List, policy: Any) -> None:
    for i, module in enumerate(list(modules)):
        modules[i] = Checkpointed(module, policy)
