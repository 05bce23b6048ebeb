"""The compiled functions of a run: its first state, its step, its look at held-out people."""

from collections.abc import Iterable, Mapping
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.sharding import compiler_options
from infinite_id_jax.training.flops import unet_flops
from infinite_id_jax.training.objective import Batch, Frozen, Objective
from infinite_id_jax.training.setup import abstract_state, state_maker
from infinite_id_jax.training.state import OptimizerConfig, TrainState
from infinite_id_jax.training.step import Metrics, train_step, validation_step
from infinite_id_jax.typing import Array

_VALIDATION_SEED = 0x1D  # the noise of every validation, in every run


class TrainProgram:
    """What `train.py` calls; compiled when first called, for each size of latents anew."""

    def __init__(
        self,
        objective: Objective,
        adapter: AdapterConfig,
        optimizer: OptimizerConfig,
        frozen: Frozen,
        mesh: Mesh,
        seed: int,
    ):
        make = state_maker(objective, adapter, optimizer, seed)
        self.abstract = abstract_state(make, frozen, mesh)
        self._objective, self._frozen, self._mesh = objective, frozen, mesh
        self._key = jax.random.key(seed)
        self._flops: dict[tuple[int, int], float] = {}  # of one row, by size
        places, options = jax.tree.map(lambda x: x.sharding, self.abstract), compiler_options(mesh)
        self._make = jax.jit(make, out_shardings=places)
        step = partial(train_step, objective, optimizer, places.adapter)
        self._step = jax.jit(step, donate_argnames="state", out_shardings=(places, None), compiler_options=options)
        self._validate = jax.jit(partial(validation_step, objective), compiler_options=options)

    def first(self) -> TrainState:
        """The state before the first step, made where it is to live."""
        return self._make(self._frozen)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step; `state` is used up. Returns before the device has finished."""
        with jax.set_mesh(self._mesh):  # kernels divide themselves by it
            return self._step(self._frozen, state, batch, self._key)

    def flops(self, batch: Batch) -> float:
        """Of one step on this batch over all devices, counted as two forwards of the base."""
        rows, height, width, _ = batch["latent_mean"].shape
        if (height, width) not in self._flops:
            self._flops[height, width] = 2 * unet_flops(self._objective.unet, self._frozen.unet, 1, height, width)
        return rows * self._flops[height, width]

    def validate(self, arrays: Mapping[str, Array], batches: Iterable[Batch]) -> dict[str, float]:
        """Mean errors over the batches, each on noise of its own that is the same at every call."""
        key = jax.random.key(_VALIDATION_SEED)
        with jax.set_mesh(self._mesh):
            held = [
                jax.device_get(self._validate(arrays, self._frozen, batch, jax.random.fold_in(key, i)))
                for i, batch in enumerate(batches)
            ]
        right, other, none = np.asarray(held, np.float64).T
        there = np.isfinite(other)  # batches of several people
        means = {"validation_loss": right.mean(), "validation_no_identity": none.mean()}
        return {**means, **({"validation_other_person": other[there].mean()} if there.any() else {})}
