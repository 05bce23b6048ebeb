"""What a file of weights looks like, for the errors that refuse it."""

import re
from collections.abc import Mapping, Sequence

from infinite_id_jax.stable_diffusion.config import BASES

# (pattern of a key, what a file with such keys is), the first that matches wins.
_SIGNS: tuple[tuple[str, str], ...] = (
    (r"^(id_encoder|id_adapter|id_adapter_attn_layers|pulid_\w+)\.", "PhotoMaker or PuLID, which are not built"),
    (r"lora_magnitude_vector|dora_scale", "a DoRA"),
    (r"^lora_(unet|te\d?|transformer)_|\.lora_[AB]\.|\.lora\.(down|up)\.", "a LoRA"),
    (r"^(first_stage_model|conditioner|cond_stage_model|model\.diffusion_model)\.", "a single-file checkpoint"),
    (r"^(control_model|controlnet_\w+|input_hint_block)\.", "a ControlNet"),
    (r"^(double_blocks|single_blocks|transformer_blocks)\.", "a diffusion transformer (Flux, SD 3)"),
    (r"^image_proj_model\.|^adapter_modules\.", "a training checkpoint of IP-Adapter, not its release"),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter"),
    (r"^(text_model|vision_model|encoder\.layers|embeddings)\.", "a CLIP encoder"),
    (r"^(encoder|decoder)\.", "a VAE"),
    (r"^(down_blocks|up_blocks|mid_block)\.", "a U-Net"),
)


def looks_like(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """A name for {key: shape}, with the base where a cross-attention tells it, or None."""
    kind = next((what for sign, what in _SIGNS if any(re.search(sign, key) for key in shapes)), None)
    if kind is None:
        return None
    width = next(
        (
            shape[1]
            for key, shape in shapes.items()
            if re.search(r"to_k_ip\.weight$|attn2[._]to_k\.weight$", key) and len(shape) > 1
        ),
        None,
    )
    if width is None or width not in BASES:
        return kind
    return f"an {BASES[width]} adapter" if kind == "an IP-Adapter" else f"{kind} for {BASES[width]}"
