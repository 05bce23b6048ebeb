"""What docs/method.md decides, tried in the miniature: each choice against the defaults of configs/miniature.py.

    python evaluate.py --config configs/miniature_variants.py --output-dir runs/variants

On people of their own: whatever is chosen by its figures is chosen here, and never on the people of the study, whose
figures would then be too good.
"""

import dataclasses
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
_METRICS = {"m_face": "M_Face", "clip_t": "CLIP-T", "prompted": "the accuracy of prompted attributes"}
_VARIANTS = (
    ("pooled_zeros", "without the pooled text in the identity stream", {"pooled_text": "zeros"}),
    ("shared", "with both streams on the same latents", {"text_stream": "shared"}),
    ("mean_everywhere", "with AdaIN-mean in photographs too", _MEAN),
    ("late_mixing", "with mixed attention in the second half of the steps alone", {"step_range": (6, None)}),
    ("early_mixing", "with mixed attention in the first half of the steps alone", {"step_range": (0, 6)}),
    ("identity_0.7", "with the identity weighted by 0.7", {"id_scale": 0.7}),
    ("guidance_3", "with a guidance of 3", {"guidance_scale": 3.0}),
    ("guidance_first", "with guidance in the first half of the steps alone", {"guidance_range": (0, 6)}),
    ("cached_2", "with the U-Net's inner levels in every second step", {"cache_interval": 2}),
    ("cached_3", "with the U-Net's inner levels in every third step", {"cache_interval": 3}),
)


def _method(name: str, title: str, changes: dict[str, Any]) -> Method:
    style = None if changes == _MEAN else {**_MEAN, **changes}  # where the default has AdaIN-mean already
    return Method(name, title, "full", changes, style)


_METHODS = (
    *(_method(*variant) for variant in _VARIANTS),
    *(
        Method(kind, f"with {kind} products in the U-Net's transformers", "full", {}, _MEAN, quantization=kind)
        for kind in ("int8", "float8")
    ),
)
study = dataclasses.replace(
    defaults,
    world=world,
    identities=48,
    prompts=10,
    methods=(Method("full", "Infinite-ID", "full", {}, _MEAN), *_METHODS),
    claims=tuple(
        Claim(f"{method.title[0].upper()}{method.title[1:]}, {called} is higher", metric, method.name, "full")
        for method in _METHODS
        for metric, called in _METRICS.items()
    ),
    interpolation_weights=(),
    base_pictures=0,
)
