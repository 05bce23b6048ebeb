"""The laws of a training step on a U-Net of four small transformer blocks, and what it costs."""

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from infinite_id_jax.diffusion.schedule import ScheduleConfig
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.sharding import abstract_mesh, batch_sharding
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel, preprocess
from infinite_id_jax.stable_diffusion.config import CLIPVisionConfig, UNetConfig
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.training.budget import Budget, make_budget
from infinite_id_jax.training.flops import count_flops
from infinite_id_jax.training.objective import Frozen, MethodConfig, Objective, draw, hidden_states, row_losses
from infinite_id_jax.training.remat import REMAT
from infinite_id_jax.training.setup import abstract_state, base_sharding, make_objective, state_maker
from infinite_id_jax.training.state import OptimizerConfig, TrainState, initial_state
from infinite_id_jax.training.step import BINS, Metrics, train_step, validation_step
from infinite_id_jax.weights.load import abstract, described

UNET = UNetConfig(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(1, 2),
    cross_attention_dim=16,
    norm_num_groups=4,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 8,
)
ADAPTER = AdapterConfig(clip_dim=12, face_dim=6, face_tokens=2, cross_attention_dim=16)
VISION = CLIPVisionConfig(
    hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, projection_dim=8
)
ROWS, KEY = 8, jax.random.key(0)
SCALING = 0.13025
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def abstract_unet() -> UNet2DConditionModel:
    return abstract(lambda rngs: UNet2DConditionModel(UNET, rngs=rngs))


@functools.cache
def unet() -> UNet2DConditionModel:
    """Random in every parameter, so that no bias is 0 and no norm the identity."""
    graph, state = nnx.split(abstract_unet())
    rng, flat = np.random.default_rng(0), dict(nnx.to_flat_state(state))
    for path, leaf in flat.items():
        noise = rng.normal(size=leaf.shape) * (0.1 if len(leaf.shape) == 1 else np.prod(leaf.shape[:-1]) ** -0.5)
        flat[path] = leaf.replace(jnp.asarray(noise + (path[-1] == "scale"), jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


@functools.cache
def first_arrays() -> dict[str, jax.Array]:
    objective, frozen = objective_of(MethodConfig())
    make = state_maker(objective, ADAPTER, OptimizerConfig(), 0)
    return jax.jit(make, compiler_options=FAST_COMPILE)(frozen).adapter


def objective_of(method: MethodConfig) -> tuple[Objective, Frozen]:
    return make_objective(method, ADAPTER, ScheduleConfig(), SCALING, unet())


def batch_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {
        "latent_mean": 4 * rng.normal(size=(ROWS, 4, 4, 4)),
        "latent_std": rng.uniform(0.1, 1, size=(ROWS, 4, 4, 4)),
        "time_ids": rng.integers(32, 128, size=(ROWS, 6)),
        "clip_hidden_states": rng.normal(size=(ROWS, 5, ADAPTER.clip_dim)),
        "face_embedding": 3 * rng.normal(size=(ROWS, ADAPTER.face_dim)),
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def compiled_step(objective: Objective, optimizer: OptimizerConfig) -> Any:
    return jax.jit(partial(train_step, objective, optimizer, None), compiler_options=FAST_COMPILE)


def equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


# A run


class Run(NamedTuple):
    """Three good steps, one on a batch with a NaN, one good again; `states` has the first state before them."""

    frozen: Frozen
    frozen_before: Any
    states: list[TrainState]
    metrics: list[Metrics]


@pytest.fixture(scope="module")
def run() -> Run:
    objective, frozen = objective_of(MethodConfig(identity_drop=0.3))
    before = jax.tree.map(lambda x: np.array(x, copy=True), frozen)
    optimizer = OptimizerConfig(learning_rate=1e-2, ema_decay=0.75, max_grad_norm=1.0)
    step = compiled_step(objective, optimizer)
    states, metrics = [initial_state(optimizer, first_arrays())], []
    bad = batch_of(3)
    bad["clip_hidden_states"][5, 2, 7] = np.nan
    for batch in (batch_of(0), batch_of(1), batch_of(2), bad, batch_of(4)):
        state, numbers = step(frozen, states[-1], batch, KEY)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(numbers))
    return Run(frozen, before, states, metrics)


def test_projections_start_as_the_bases(run):
    """Decision 23, in the order of the files: the up block's come before the middle's."""
    blocks = {key.split(".")[1]: key for key in run.states[0].adapter if key.endswith("to_k_ip.weight")}
    assert sorted(map(int, blocks)) == [1, 3, 5, 7]
    flat = {path: x[...] for path, x in nnx.to_flat_state(run.frozen.unet)}
    for n, place in {
        1: ("down_blocks", 1, "attentions", 0),
        3: ("up_blocks", 0, "attentions", 0),
        5: ("up_blocks", 0, "attentions", 1),
        7: ("mid_block", "attentions", 0),
    }.items():
        for kind in "kv":
            expected = flat[(*place, "transformer_blocks", 0, "attn2", f"to_{kind}", "kernel")]
            np.testing.assert_array_equal(run.states[0].adapter[f"ip_adapter.{n}.to_{kind}_ip.weight"], expected)


def test_every_adapter_array_learns_and_the_base_does_not(run):
    first, third = run.states[0], run.states[3]
    assert int(third.step) == 3
    for name, moment in optax.tree.get(third.optimizer, "mu").items():
        assert np.abs(moment).max() > 0, name  # else weight decay alone could have moved it
        assert not np.array_equal(first.adapter[name], third.adapter[name]), name
    assert equal(run.frozen, run.frozen_before)


def test_the_average_follows_the_adapter(run):
    average = run.states[0].adapter
    assert equal(run.states[0].ema, average)
    for state in run.states[1:4]:
        average = {name: 0.75 * x + 0.25 * state.adapter[name] for name, x in average.items()}
        for name, x in average.items():
            np.testing.assert_allclose(state.ema[name], x, rtol=1e-6, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_run_where_it_was(run):
    good, bad, later = run.states[3:]
    assert [int(state.failed_at) for state in run.states] == [-1, -1, -1, -1, 3, 3]
    assert [int(numbers.failed_at) for numbers in run.metrics] == [-1, -1, -1, 3, 3]
    assert np.isnan(run.metrics[3].loss)
    assert np.isfinite(run.metrics[4].loss)
    for state in (bad, later):
        assert equal(dataclasses.replace(state, failed_at=good.failed_at), good)


def test_errors_are_counted_by_tenth_of_the_timesteps(run):
    objective, _ = objective_of(MethodConfig(identity_drop=0.3))
    drawn = draw(objective, jax.random.fold_in(KEY, 0), batch_of(0))
    np.testing.assert_array_equal(run.metrics[0].rows_by_bin, np.bincount(np.asarray(drawn.t) // 100, minlength=BINS))
    np.testing.assert_allclose(run.metrics[0].error_by_bin.sum() / ROWS, run.metrics[0].loss, rtol=1e-6)


# What a step draws


def test_draws():
    objective, _ = objective_of(MethodConfig(identity_drop=0.3))
    rows = 4000
    drawn = draw(objective, jax.random.key(1), {"latent_mean": np.zeros((rows, 1, 1, 1))})
    counts = np.bincount(np.asarray(drawn.t) // 100, minlength=BINS)
    assert 0 <= drawn.t.min() < 5 and 995 <= drawn.t.max() < 1000  # noqa: PT018
    assert np.sum((counts - rows / BINS) ** 2) / (rows / BINS) < 30  # chi-squared of 9: above 30 in 1 of 2000
    assert abs(drawn.keep.mean() - 0.7) < 4 * np.sqrt(0.21 / rows)
    noise = np.stack([drawn.posterior.ravel(), drawn.eps.ravel(), drawn.t / 1000, drawn.keep])
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 4 / np.sqrt(rows)
    np.testing.assert_allclose(noise[:2].std(axis=1), 1, atol=0.05)
    # The identity alone, the text alone, both: each in half of identity_drop of the rows.
    dropped = (~drawn.keep & drawn.keep_text, drawn.keep & ~drawn.keep_text, ~drawn.keep & ~drawn.keep_text)
    for share in map(np.mean, dropped):
        assert abs(share - 0.15) < 4 * np.sqrt(0.15 * 0.85 / rows)


# The identity


@pytest.fixture(scope="module")
def losses():
    """`row_losses` of the first state, compiled once: (batch, keep) -> errors of the rows."""
    objective, frozen = objective_of(MethodConfig())
    compiled = jax.jit(partial(row_losses, objective), compiler_options=FAST_COMPILE)

    def errors(batch: dict[str, np.ndarray], keep: Any) -> np.ndarray:
        drawn = draw(objective, KEY, batch)._replace(keep=jnp.broadcast_to(jnp.asarray(keep), ROWS))
        return np.asarray(compiled(first_arrays(), frozen, batch, drawn).error)

    return errors


def without_identity(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return batch | {name: np.zeros_like(batch[name]) for name in ("clip_hidden_states", "face_embedding")}


def test_a_dropped_identity_is_the_mappers_on_zeros(losses):
    """Decision 11: row by row, of both parts of the identity."""
    batch, odd = batch_of(5), np.arange(ROWS) % 2 == 1
    none, everyone = losses(without_identity(batch), True), losses(batch, True)
    assert np.abs(none / everyone - 1).min() > 1e-4  # the identity matters in each row; measured: 1e-3
    np.testing.assert_array_equal(losses(batch, odd), np.where(odd, everyone, none))


@pytest.mark.parametrize(
    ("person", "following"),
    [
        (range(ROWS), [*range(1, ROWS), 0]),
        ([1, 1, 2, 1, 1, 1, 3, 1], [2, 2, 3, 6, 6, 6, 7, 2]),
        ([5] * ROWS, None),
    ],
)
def test_validation_compares_with_the_next_persons_identity_and_with_none(losses, person, following):
    objective, frozen = objective_of(MethodConfig(min_snr_gamma=1.0))  # a weight that validation leaves out
    batch = batch_of(5)
    validate = jax.jit(partial(validation_step, objective), compiler_options=FAST_COMPILE)
    held = validate(first_arrays(), frozen, batch | {"person": np.array(person, np.int32)}, KEY)
    if following is None:
        assert np.isnan(held.other)
        return
    other = batch | {name: batch[name][following] for name in ("clip_hidden_states", "face_embedding")}
    expected = [losses(b, keep).mean() for b, keep in ((batch, True), (other, True), (batch, False))]
    np.testing.assert_allclose(held, expected, rtol=1e-6)
    assert len(set(map(float, held))) == 3


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.random.default_rng(6).integers(0, 256, (ROWS, 28, 28, 3), np.uint8)


@pytest.mark.parametrize("clip_layer", ["last", "penultimate"])
def test_crops_encoded_on_the_device_are_the_cached_features(crops, clip_layer):
    vision = CLIPVisionModel(VISION, rngs=nnx.Rngs(1))
    adapter = dataclasses.replace(ADAPTER, clip_layer=clip_layer)
    objective, frozen = make_objective(MethodConfig(), adapter, ScheduleConfig(), SCALING, unet(), vision=vision)
    out = vision(preprocess(crops))
    features = out.penultimate if clip_layer == "penultimate" else out.last_hidden_state
    encoded = hidden_states(objective, frozen, {"clip_crop": crops})
    np.testing.assert_allclose(encoded, features, rtol=0, atol=1e-5)  # measured: 1e-6, features up to 4
    if clip_layer == "last":
        cached = batch_of(5) | {"clip_hidden_states": features}
        on_device = batch_of(5) | {"clip_crop": crops}
        del on_device["clip_hidden_states"]
        drawn = draw(objective, KEY, cached)
        loss = jax.jit(partial(row_losses, objective), compiler_options=FAST_COMPILE)
        ours, expected = (loss(first_arrays(), frozen, batch, drawn).error for batch in (on_device, cached))
        np.testing.assert_allclose(ours, expected, rtol=6e-6)  # measured: 3e-7


def test_crops_without_an_image_encoder(crops):
    objective, frozen = objective_of(MethodConfig())
    with pytest.raises(ValueError, match="image encoder"):
        hidden_states(objective, frozen, {"clip_crop": crops})


# Memory against time


@pytest.fixture(scope="module")
def one_step():
    """(loss, gradient) of one step with the given rematerialisation and accumulation."""

    def gradient(remat: str, accumulate: int) -> tuple[float, dict[str, np.ndarray]]:
        objective, frozen = objective_of(MethodConfig(remat=remat, min_snr_gamma=5.0))
        optimizer = OptimizerConfig(accumulate=accumulate)
        step = compiled_step(objective, optimizer)
        state, metrics = step(frozen, initial_state(optimizer, first_arrays()), batch_of(7), KEY)
        assert metrics.rows_by_bin.sum() == ROWS
        moment = optax.tree.get(state.optimizer, "mu")  # (1 - beta1) times the gradient
        return float(metrics.loss), {name: np.asarray(x) / (1 - optimizer.beta1) for name, x in moment.items()}

    plain = gradient("none", 1)
    return lambda remat, accumulate: (plain, gradient(remat, accumulate))


@pytest.mark.parametrize(("remat", "accumulate"), [("dots", 1), ("all", 2), ("blocks", 4)])
def test_parts_and_rematerialisation_change_nothing(one_step, remat, accumulate):
    (loss, gradient), (other_loss, other) = one_step(remat, accumulate)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    worst = max(np.abs(other[name] - x).max() / np.abs(x).max() for name, x in gradient.items())
    assert worst < 2e-5  # measured: 2.9e-6 at most


class Abstract(NamedTuple):
    """Shapes of a step, with their places on a mesh of machines that are not here."""

    mesh: AbstractMesh
    objective: Objective
    frozen: Frozen
    state: TrainState
    batch: dict[str, Any]

    def budget(self, parts: int = 1) -> Budget:
        return make_budget(self.objective, self.frozen, self.state, self.batch, self.mesh, parts)


def abstract_step(remat: str, mesh: str) -> Abstract:
    devices = abstract_mesh(mesh)
    base = described(abstract_unet(), dtype="float32", sharding=base_sharding(devices, True))
    objective, frozen = make_objective(MethodConfig(remat=remat), ADAPTER, ScheduleConfig(), SCALING, base)
    state = abstract_state(state_maker(objective, ADAPTER, OptimizerConfig(), 0), frozen, devices)
    rows = batch_sharding(devices)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch_of(0).items()}
    return Abstract(devices, objective, frozen, state, batch)


def kept(budget: Budget) -> int:
    (size,) = [size for name, size in budget.bytes_each.items() if name.startswith("kept")]
    return size


def test_rematerialisation_trades_memory_for_operations():
    """In the order of REMAT less is kept and more is computed again; what is asked of the device stays the same."""
    steps = [abstract_step(remat, "data=1") for remat in REMAT]
    budgets = [step.budget() for step in steps]
    asked = {(budget.step_flops, budget.all_flops) for budget in budgets}
    computed = [count_flops(partial(train_step, s.objective, OptimizerConfig(), None), *s[2:], KEY) for s in steps]
    ((_, all_flops),) = asked
    assert computed[0] == all_flops + 2 * ROWS * BINS  # with the sums over timesteps
    assert computed == sorted(set(computed))
    sizes = [kept(budget) for budget in budgets]
    assert sizes == sorted(set(sizes), reverse=True)


def test_bytes_are_those_of_one_device():
    one, four = abstract_step("blocks", "data=1"), abstract_step("blocks", "data=2,fsdp=2")
    whole, share, parts = one.budget(), four.budget(), four.budget(parts=2)
    size = sum(x.size for x in first_arrays().values())
    halved = sum(x.size for x in first_arrays().values() if x.ndim > 1)  # biases and the scales of norms stay whole
    assert whole.adapter_parameters == share.adapter_parameters == size
    assert whole.base_parameters == sum(x.size for x in jax.tree.leaves(nnx.state(unet())))
    for name in ("adapter (fp32)", "gradient (fp32)"):
        assert whole.bytes_each[name] == 4 * size
        assert share.bytes_each[name] == 4 * (size - halved / 2)
    assert whole.bytes_each["optimiser"] == 8 * size + 4  # two moments and the count
    assert whole.bytes_each["average"] == 0
    assert whole.bytes_each["frozen models"] == 4 * whole.base_parameters > share.bytes_each["frozen models"]
    rows = sum(x.nbytes for x in batch_of(0).values())
    assert (whole.bytes_each["batch"], share.bytes_each["batch"]) == (rows, rows / 4)
    assert (kept(share), kept(parts)) == (kept(whole) // 4, kept(whole) // 8)
