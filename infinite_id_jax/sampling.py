"""The whole of two-stream sampling as one pure function, to be compiled once per shape and variant."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding

from infinite_id_jax.diffusion import guidance, samplers
from infinite_id_jax.identity.config import Switches, within
from infinite_id_jax.identity.cross_attention import IdentityContext
from infinite_id_jax.identity.inject import eject, mix_streams
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.unet import AddedConditions
from infinite_id_jax.typing import Array, Float, Scalar


class TextCondition(NamedTuple):
    """Text embeddings [G, P, L, C] and pooled vectors [G, P, C'] of P prompts, G the guidance halves."""

    tokens: Float[Array, "G P L C"]
    pooled: Float[Array, "G P D"]


class Controls(NamedTuple):
    """Numbers that change without compiling anew."""

    guidance_scale: Scalar
    guidance_rescale: Scalar
    id_scale: Float[Array | np.ndarray, " layers"]  # one for each cross-attention, in the order of files
    text_scale: Scalar


class Streams(NamedTuple):
    """Final latents: identity stream [P * M, h, w, c], prompt-major, and text stream [P, h, w, c].

    The text stream has none where it is shared, or where there is one stream.
    """

    identity: Float[Array, "B h w c"]
    text: Float[Array, "P h w c"] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled in: the model's structure, the variant, the sampler and the rows."""

    unet: nnx.GraphDef
    switches: Switches
    scheduler: str
    prediction_type: str
    layout: Layout
    guidance_range: tuple[int, int | None] = (0, None)  # (first, end) of the guided steps
    cache_interval: int = 1  # steps from one run of the U-Net's inner levels to the next
    batch: NamedSharding | None = None
    report: Callable[[Any], None] | None = None  # called with the index of each finished step


def sample_streams(
    program: Program,
    unet: nnx.State,
    noise: Float[Array, "T h w c"],
    text: TextCondition,
    identity: Float[Array, "G M K C"],
    time_ids: Float[Array, " 6"],
    controls: Controls,
    trajectory: samplers.Trajectory,
) -> Streams:
    """Denoise P prompts with M identities each, identity rows from the noise of their text row.

    With an `own` text stream there are T = P text rows and each serves M identity rows; with a `shared` one each of
    the T = P M identity rows brings a text row that looks at the same latents (decision 7). In single-stream
    sampling the T = P M rows are all there is. Outside `guidance_range` (Kynkäänniemi et al. 2024) the U-Net sees
    the conditional half alone, which halves the work of a step. With a `cache_interval` of N all but every Nth step
    run the U-Net's outermost level alone.
    """
    layout, prompts, people = program.layout, text.tokens.shape[1], identity.shape[1]
    single = program.switches.streams == "one" and people > 0
    shared = program.switches.text_stream == "shared" and people > 0
    if single or shared:  # repeat prompts, cycle through identities
        text = jax.tree.map(lambda x: jnp.repeat(x, people, axis=1), text)
        identity = jnp.tile(identity, (1, prompts, 1, 1))[:, :, None]
    else:
        identity = identity[:, None]

    def predictor(which: Program, text: TextCondition, identity: Array) -> Callable[..., tuple[Array, Array | None]]:
        conditions = _conditions(which, text, identity, time_ids, controls)
        return partial(_guided_prediction, which, unet, conditions, controls)

    predict = predictor(program, text, identity)
    half = dataclasses.replace(program, layout=dataclasses.replace(layout, halves=1))
    predict_half = predictor(half, jax.tree.map(lambda x: x[-1:], text), identity[-1:])

    def predict_alone(rows: Array, t: Array, step: Array, inner: Array | None) -> tuple[Array, Array | None]:
        unseen, seen = (None, None) if inner is None else jnp.split(inner, 2)
        guided, seen = predict_half(rows, t, step, seen)
        return guided, None if unseen is None or seen is None else jnp.concatenate([unseen, seen])

    def denoise(x_t: Array, t: Array, step: Array, inner: Array | None) -> tuple[Array, Array | None]:
        rows = jnp.concatenate([x_t, x_t]) if shared else x_t
        inside = within(program.guidance_range, step) if layout.halves == 2 else None
        if inside is None:
            guided, inner = predict(rows, t, step, inner)
        else:
            guided, inner = jax.lax.cond(inside, predict, predict_alone, rows, t, step, inner)
        if program.report is not None:
            jax.debug.callback(program.report, step)
        return guided[layout.text_rows :] if shared else guided, inner

    start = noise if shared else layout.spread(noise)
    inner = None
    if program.cache_interval > 1:
        rows = jnp.concatenate([start, start]) if shared else start
        shape = jax.eval_shape(predict, rows, jnp.zeros(()), jnp.zeros((), jnp.int32), None)[1]
        inner = jnp.zeros_like(shape)
    x_0 = samplers.sample(program.scheduler, trajectory, denoise, start, inner, prediction_type=program.prediction_type)
    return Streams(x_0, None) if shared or single else Streams(x_0[prompts:], x_0[:prompts])


def _conditions(
    program: Program, text: TextCondition, identity: Array, time_ids: Array, controls: Controls
) -> tuple[Any, AddedConditions]:
    """What every call of the U-Net receives beside the latents, in the row order of the layout."""
    layout, switches = program.layout, program.switches
    tokens = _all_rows(layout, text.tokens)
    pooled = _all_rows(layout, text.pooled)
    people = identity.shape[2] > 0  # [G, T, R, K, C]
    single = people and switches.streams == "one"
    if people and switches.pooled_text == "zeros":
        text_pooled, id_pooled = layout.split(pooled)
        kept = jnp.zeros_like(text_pooled) if single else text_pooled
        pooled = layout.join(kept, jnp.zeros_like(id_pooled))
    added = AddedConditions(pooled, jnp.broadcast_to(time_ids, (pooled.shape[0], time_ids.shape[0])))
    if not people:
        return tokens, added
    context = IdentityContext(
        tokens,
        rearrange(identity, "G T 1 K C -> (G T) K C") if single else identity,
        controls.id_scale,
        controls.text_scale,
        None if single else layout,
        switches.style_merge,
        switches.cross_merge,
    )
    return context, added


def _all_rows(layout: Layout, x: Float[Array, "G T ..."]) -> Float[Array, "B ..."]:
    return jnp.concatenate([layout.spread(half) for half in x])


def _guided_prediction(
    program: Program,
    state: nnx.State,
    conditions: tuple[Any, AddedConditions],
    controls: Controls,
    x_t: Array,
    t: Array,
    step: Array,
    inner: Array | None,
) -> tuple[Array, Array | None]:
    """One U-Net call over both streams and both guidance halves, then guidance; and what its inner levels gave."""
    layout, switches = program.layout, program.switches
    unet = nnx.merge(program.unet, state)
    context, added = conditions
    if layout.identities:
        mix_streams(unet, layout, switches, switches.active(step))
    elif not isinstance(context, IdentityContext):
        eject(unet)
    x = layout.double(x_t)
    if program.batch is not None:
        x = jax.lax.with_sharding_constraint(x, program.batch)
    call = partial(unet.with_inner, x, jnp.broadcast_to(t, x.shape[:1]), context, added)
    if inner is None:
        prediction, inner = call()
    else:
        # Where other streams begin or cease to be mixed, what was kept would be of those before.
        starts = [program.guidance_range[0], *(switches.step_range if layout.identities else ())]
        fresh = step % program.cache_interval == 0
        for start in starts:
            fresh |= False if start is None else step == start
        prediction, inner = jax.lax.cond(fresh, call, lambda: call(inner))
    prediction, inner = prediction.astype(jnp.float32), None if program.cache_interval == 1 else inner
    if layout.halves == 1:
        return prediction, inner
    uncond, cond = jnp.split(prediction, 2)
    guided = guidance.classifier_free(uncond, cond, controls.guidance_scale)
    return guidance.rescale(guided, cond, controls.guidance_rescale), inner
