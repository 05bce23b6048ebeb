"""The layers that work is spent in, one by one: ours and XLA's own form of each, both against PyTorch.

    python -m benchmarks.kernels [--device cpu|gpu] [--size tiny|small|full] [--json FILE]

Shapes are SDXL's at 256 px (small), with those at 1024 px too (full). The peer's layers are not compiled.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.compare import Case, Run, main

# (rows, queries, keys, heads), heads of 64
ATTENTION = {
    "tiny": [(1, 16, 16, 2)],
    "small": [(2, 256, 256, 10), (2, 256, 512, 10), (2, 256, 77, 10), (2, 64, 64, 20)],
    "full": [
        *((1, 4096, keys, 10) for keys in (4096, 8192, 77, 258)),
        *((1, 1024, keys, 20) for keys in (1024, 2048)),
    ],
}
# (rows, side, channels in, channels out) of 3 x 3
CONVOLUTION = {
    "tiny": [(1, 4, 16, 32)],
    "small": [(1, 8, 1280, 1280), (2, 8, 2560, 1280), (1, 16, 1280, 640), (1, 32, 320, 320)],
    "full": [(1, 128, 320, 320), (1, 32, 1280, 1280)],
}
# (rows, side, channels) of what is doubled, nearest, before 3 x 3: a U-Net's and the VAE's
DOUBLING = {
    "tiny": [(1, 4, 16)],
    "small": [(2, 8, 1280), (2, 16, 640), (1, 32, 256)],
    "full": [(1, 64, 640), (1, 256, 512)],
}
# (rows, side, channels), 32 groups
NORM = {"tiny": [(1, 4, 32)], "small": [(2, 32, 320), (2, 16, 640)], "full": [(1, 128, 320)]}


def cases(run: Run) -> Iterator[Case]:
    """Forward, and forward with the gradients that training takes."""
    sizes = ("small", "full") if run.size == "full" else (run.size,)
    for size in sizes:
        for rows, queries, keys, heads in ATTENTION[size]:
            yield from _attention(run, rows, queries, keys, heads)
        for shape in CONVOLUTION[size]:
            yield from _convolution(run, *shape)
        for shape in DOUBLING[size]:
            yield from _doubling(run, *shape)
        for shape in NORM[size]:
            yield from _norm(run, *shape)


def _attention(run: Run, rows: int, queries: int, keys: int, heads: int) -> Iterator[Case]:
    import jax
    import torch.nn.functional as F

    from infinite_id_jax.stable_diffusion.kernels import dot_product_attention

    shapes = [(rows, queries, heads, 64), (rows, keys, heads, 64), (rows, keys, heads, 64)]

    def peer(*inputs: Any) -> Any:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)

    name = f"attention {rows}x{queries}x{keys}, {heads} heads"
    yield from _both(run, name, shapes, dot_product_attention, jax.nn.dot_product_attention, peer)


def _convolution(run: Run, rows: int, side: int, channels_in: int, channels_out: int) -> Iterator[Case]:
    import torch.nn.functional as F
    from jax import lax

    from infinite_id_jax.stable_diffusion.kernels import convolve

    def of(function: Any) -> Callable[..., Any]:
        padding, numbers = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
        return lambda x, kernel: function(x, kernel, (1, 1), padding, dimension_numbers=numbers)

    def peer(x: Any, kernel: Any) -> Any:
        return F.conv2d(x, kernel, padding=1)

    shapes = [(rows, side, side, channels_in), (3, 3, channels_in, channels_out)]
    name = f"convolution {rows}x{side}x{side}, {channels_in} to {channels_out}"
    yield from _both(run, name, shapes, of(convolve), of(lax.conv_general_dilated), peer, learned=1, nchw=True)


def _doubling(run: Run, rows: int, side: int, channels: int) -> Iterator[Case]:
    import torch.nn.functional as F
    from jax import lax

    from infinite_id_jax.stable_diffusion.kernels import convolve_doubled, double

    def plain(x: Any, kernel: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(double(x), kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)

    def peer(x: Any, kernel: Any) -> Any:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), kernel, padding=1)

    ours = convolve_doubled if run.device == "cpu" else plain  # as Upsample2D does
    shapes = [(rows, side, side, channels), (3, 3, channels, channels)]
    name = f"doubling and convolution {rows}x{side}x{side}x{channels}"
    yield from _both(run, name, shapes, ours, plain, peer, learned=1, nchw=True)


def _norm(run: Run, rows: int, side: int, channels: int) -> Iterator[Case]:
    import torch.nn.functional as F
    from flax import nnx

    from infinite_id_jax.stable_diffusion.kernels import GroupNorm

    ours = GroupNorm(channels, 32, eps=1e-5, rngs=nnx.Rngs(0))
    flaxs = nnx.GroupNorm(channels, 32, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))

    def peer(x: Any) -> Any:
        return F.group_norm(x, 32, eps=1e-5)

    shapes = [(rows, side, side, channels)]
    yield from _both(run, f"GroupNorm {rows}x{side}x{side}x{channels}", shapes, ours, flaxs, peer, nchw=True)


def _both(
    run: Run,
    name: str,
    shapes: list[tuple[int, ...]],
    ours: Any,
    plain: Any,
    peer: Any,
    *,
    learned: int = 0,
    nchw: bool = False,
) -> Iterator[Case]:
    """Forward and all gradients, ours and XLA's; the last `learned` inputs are frozen weights, that get no gradient.

    With `nchw` the peer gets its own layout, [B, C, H, W] and [out, in, h, w], and gives it.
    """
    import jax

    from infinite_id_jax.training.flops import count_flops

    arrays = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]
    inputs = [jax.numpy.asarray(x, run.dtype) for x in arrays]
    moving = len(shapes) - learned
    result = jax.eval_shape(ours, *inputs).shape
    cotangent = np.random.default_rng(9).normal(size=result).astype(np.float32)

    def forward(function: Any) -> Callable[..., Any]:
        return jax.jit(lambda *inputs: function(*inputs))

    def backward(function: Any) -> Callable[..., Any]:
        def gradients(cotangent: Any, *inputs: Any) -> tuple[Any, ...]:
            still = inputs[moving:]
            value, pull = jax.vjp(lambda *xs: function(*xs, *still), *inputs[:moving])
            return *pull(cotangent), value

        return partial(jax.jit(gradients), jax.numpy.asarray(cotangent, run.dtype))

    theirs = _peer(run, peer, arrays, cotangent, learned, nchw)
    for kind, make, side in (("", forward, theirs[0]), (" and gradient", backward, theirs[1])):
        for form, function in (("", ours), (", XLA's", plain)):
            program = make(function)
            yield Case(
                f"{name}{kind}{form}",
                partial(program, *inputs),
                side,
                None if kind else count_flops(program, *inputs) or None,
            )


def _peer(
    run: Run, peer: Any, arrays: list[np.ndarray], cotangent: np.ndarray, learned: int, nchw: bool
) -> tuple[Callable[[], Any], Callable[[], tuple[Any, ...]]]:
    """Forward, and forward with all gradients; on a GPU images and their kernels have channels last."""
    import torch

    moving, order = len(arrays) - learned, (0, 3, 1, 2) if nchw else (0, 1, 2, 3)
    back = (0, 2, 3, 1) if nchw else order
    layout = torch.channels_last if nchw and run.device == "gpu" else torch.contiguous_format

    def placed(x: np.ndarray, axes: tuple[int, ...]) -> Any:
        place = "cuda" if run.device == "gpu" else "cpu"
        tensor = torch.from_numpy(np.ascontiguousarray(x.transpose(axes)))
        return tensor.to(place, getattr(torch, run.dtype)).contiguous(memory_format=layout)

    moved, onto = [placed(x, order) for x in arrays[:moving]], placed(cotangent, order)
    xs = [x.detach().requires_grad_() for x in moved]
    still = [placed(x, (3, 2, 0, 1)) for x in arrays[moving:]]

    def forward() -> Any:
        with torch.inference_mode():
            return peer(*moved, *still).permute(back)

    def gradients() -> tuple[Any, ...]:
        first, *others = torch.autograd.grad(peer(*xs, *still), xs, onto)
        return first.permute(back), *others

    return forward, gradients


if __name__ == "__main__":
    sys.exit(main("benchmarks.kernels", __doc__, cases, ["--no-compile-peer", *sys.argv[1:]]))
