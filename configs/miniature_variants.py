"""What docs/method.md decides, tried in the miniature: each choice against the defaults of configs/miniature.py.

    python evaluate.py --config configs/miniature_variants.py --output-dir runs/variants

On people of their own: whatever is chosen by its figures is chosen here, and never on the people of the study, whose
figures would then be too good.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from configs.miniature import study as defaults
from infinite_id_jax.evaluation.study import Claim, Method
from infinite_id_jax.evaluation.world import World
from infinite_id_jax.files import MINIATURE

_FIRST = 1000  # the study's people are those before


def world() -> World:
    """The study's prompts and judges, and other people."""
    from miniature.world import MiniatureWorld

    return MiniatureWorld(MINIATURE, first=_FIRST)


_MEAN = {"style_merge": "adain_mean"}
_METRICS = {
    "m_face": ("M_Face", -0.05),
    "clip_t": ("CLIP-T", -0.01),
    "prompted": ("the accuracy of prompted attributes", -0.05),
    "prompted_style": ("the accuracy of styles", -0.05),
}
_SHARED_3 = {"text_stream": "shared", "guidance_scale": 3.0}
_SETTINGS = {
    "pooled_zeros": ("without the pooled text in the identity stream", {"pooled_text": "zeros"}),
    "shared": ("with both streams on the same latents", {"text_stream": "shared"}),
    "mean_everywhere": ("with AdaIN-mean in photographs too", _MEAN),
    "late_mixing": ("with mixed attention in the second half of the steps alone", {"step_range": (6, None)}),
    "early_mixing": ("with mixed attention in the first half of the steps alone", {"step_range": (0, 6)}),
    "identity_0.7": ("with the identity weighted by 0.7", {"id_scale": 0.7}),
    "guidance_3": ("with a guidance of 3", {"guidance_scale": 3.0}),
    "shared_3": ("with both streams on the same latents and a guidance of 3", _SHARED_3),
    "shared_3_0.8": (
        "with the same latents, a guidance of 3 and the identity weighted by 0.8",
        {**_SHARED_3, "id_scale": 0.8},
    ),
}
_SHORTCUTS = {  # which are to lose little
    "guidance_first": ("with guidance in the first half of the steps alone", {"guidance_range": (0, 6)}),
    "cached_2": ("with the U-Net's inner levels in every second step", {"cache_interval": 2}),
    "cached_3": ("with the U-Net's inner levels in every third step", {"cache_interval": 3}),
}
_ABLATIONS = {"no_mixed": {"attention": "off"}, "mutual": {"attention": "mutual"}, "no_merge": {"cross_merge": False}}
_UNDER = {"full": {}, **{name: _SETTINGS[name][1] for name in ("pooled_zeros", "shared")}}  # what they are tried under


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _method(name: str, title: str, changes: dict[str, Any]) -> Method:
    style = None if changes == _MEAN else {**_MEAN, **changes}  # where the default has AdaIN-mean already
    return Method(name, title, "full", changes, style)


def _ablations() -> Iterator[tuple[Method, tuple[Claim, ...]]]:
    """Of photographs alone, as the study's claims of them are."""
    for under, setting in _UNDER.items():
        for name, change in _ABLATIONS.items():
            title = f"{name.replace('_', ' ')}, {under.replace('_', ' ')}"
            method = Method(f"{name}.{under}", title, "full", {**setting, **change}, None)
            yield (
                method,
                tuple(
                    Claim(f"{metric} falls: {title}", metric, under, method.name, prompts="photo")
                    for metric in ("m_face", "clip_t", "prompted")
                ),
            )


_FULL = Method("full", "Infinite-ID", "full", {}, _MEAN)
_CHANGED = tuple(_method(name, *setting) for name, setting in _SETTINGS.items())
_SHORTER = (
    *(_method(name, *setting) for name, setting in _SHORTCUTS.items()),
    *(
        Method(kind, f"with {kind} products in the U-Net's transformers", "full", {}, _MEAN, quantization=kind)
        for kind in ("int8", "float8")
    ),
)
study = dataclasses.replace(
    defaults,
    adapters={"full": defaults.adapters["full"]},
    world=world,
    identities=48,
    prompts=10,
    methods=(
        _FULL,
        *_CHANGED,
        *(method for method, _ in _ablations()),
        *_SHORTER,  # last, as other precisions are loaded for them
    ),
    claims=(
        *(
            Claim(f"{_capital(method.title)}, {called} is higher", metric, method.name, "full")
            for method in _CHANGED
            for metric, (called, _) in _METRICS.items()
        ),
        *(
            Claim(
                f"{_capital(method.title)}: prompted attributes lose at most 5 points",
                "prompted",
                method.name,
                "text_only",
                -0.05,
            )
            for method in (_FULL, *_CHANGED)
        ),
        *(claim for _, claims in _ablations() for claim in claims),
        *(
            Claim(
                f"{_capital(method.title)}, {called} falls little",
                metric,
                method.name,
                "full",
                least,
            )
            for method in _SHORTER
            for metric, (called, least) in _METRICS.items()
        ),
    ),
    interpolation_weights=(),
    base_pictures=0,
)
