"""Floating-point operations of a program, counted from its jaxpr: products and convolutions, 2 per multiply-add.

Counted are the layers' plain forms: a kernel for some hardware hides its products, or needs fewer. XLA's own cost
analysis counts the body of a loop once and depends on the backend.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.stable_diffusion.kernels import PLAIN, compiling_for
from infinite_id_jax.stable_diffusion.unet import AddedConditions

TEXT_TOKENS = 77

# Dense bfloat16 TFLOP/s of one device, without sparsity, by jax's device_kind (vendors' data sheets).
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,  # before the names that these begin with
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def peak_flops(device: Any) -> float | None:
    """Floating-point operations a second of this device at best, None where its kind is not in the table."""
    kind = device.device_kind
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if kind.startswith(name)), None)


def unet_flops(graph: Any, state: Any, rows: int, height: int, width: int) -> float:
    """One forward of the base on `rows` latents of this size with 77 text tokens: 6.761e12 for SDXL at 128 x 128.

    An adapter's step over a frozen base is counted as two of them, whatever it computes twice to save memory.
    """

    def forward(state: Any) -> jax.Array:
        unet = nnx.merge(graph, state)
        c, dtype = unet.config, unet.conv_in.kernel[...].dtype
        added = AddedConditions(jnp.zeros((rows, c.pooled_dim)), jnp.zeros((rows, 6)))
        text = jnp.zeros((rows, TEXT_TOKENS, c.cross_attention_dim), dtype)
        return unet(jnp.zeros((rows, height, width, c.in_channels)), jnp.zeros(rows), text, added)

    return count_flops(forward, state)


def count_flops(function: Callable[..., Any], *arguments: Any, convolutions_only: bool = False) -> float:
    """Operations of `function` of arrays or shapes, loops counted as often as they run; of two branches the larger."""
    with compiling_for(PLAIN):
        return float(_count(jax.make_jaxpr(function)(*arguments).jaxpr, convolutions_only))


def _count(jaxpr: Any, convolutions_only: bool) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += 0 if convolutions_only else _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            total += max(_count(branch.jaxpr, convolutions_only) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(_count(inner, convolutions_only) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "jaxpr"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation: Any) -> int:
    """Products with the zeros that a dilated input is spread with do not count."""
    params, kernel = equation.params, equation.invars[1].aval.shape
    out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
    per_output = math.prod(kernel) // out_features
    return 2 * math.prod(equation.outvars[0].aval.shape) * per_output // math.prod(params["lhs_dilation"])
