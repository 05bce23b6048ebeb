"""What METHOD leaves open, tried in the miniature: each choice against the defaults of configs/miniature.py.

python evaluate.py --config configs/miniature_variants.py --output-dir outputs/miniature_variants
"""

import dataclasses

from configs.miniature import study as defaults
from infinite_id_jax.evaluation.study import Claim, Method

_MEAN = {"style_merge": "adain_mean"}
_VARIANTS = (
    ("pooled_zeros", "no pooled text in the identity stream", {"pooled_text": "zeros"}),
    ("shared", "both streams on the same latents", {"text_stream": "shared"}),
    ("mean_everywhere", "AdaIN-mean in photographs too", _MEAN),
    ("late_mixing", "mixed attention in the second half of the steps", {"step_range": (10, None)}),
    ("early_mixing", "mixed attention in the first half of the steps", {"step_range": (0, 10)}),
    ("identity_0.7", "identity weighted by 0.7", {"id_scale": 0.7}),
    ("guidance_3", "guidance of 3", {"guidance_scale": 3.0}),
)

study = dataclasses.replace(
    defaults,
    identities=50,
    prompts=10,
    methods=(
        Method("full", "Infinite-ID", "full", {}, _MEAN),
        *(Method(name, title, "full", changes, {**_MEAN, **changes}) for name, title, changes in _VARIANTS),
    ),
    claims=tuple(
        Claim(f"{metric} with {title}, against the default", metric, name, "full")
        for name, title, _ in _VARIANTS
        for metric in ("m_face", "clip_t", "prompted")
    ),
    interpolation_weights=(),
    base_pictures=0,
)
