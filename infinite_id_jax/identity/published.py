"""What published adapters have in common: they were trained with the text switched on (docs/interop.md)."""

import dataclasses
from typing import Any, ClassVar

from infinite_id_jax.identity.config import EncoderConfig

# Widths of the image encoders that IP-Adapter's releases were trained with.
_ENCODERS = {
    ("pooled", 1280): "OpenCLIP ViT-bigG/14",
    ("pooled", 1024): "OpenCLIP ViT-H/14",
    ("penultimate", 1280): "OpenCLIP ViT-H/14",
    ("penultimate", 1664): "OpenCLIP ViT-bigG/14",
}


FACE_ID_RECOGNISER = "insightface/buffalo_l"
"""Whose embeddings FaceID's releases were trained on (their model card)."""


@dataclasses.dataclass(frozen=True)
class PublishedConfig(EncoderConfig):
    """An adapter of the IP-Adapter releases, its widths read off its file."""

    family: ClassVar[str]
    title: ClassVar[str]
    licence: ClassVar[str] = "the code is Apache-2.0; read the terms of the weights where you got them"

    lora_rank: int = 0  # of low-rank maps on the identity rows' attention; 0 for none

    @property
    def version(self) -> str:
        """Where a family has several."""
        return ""

    def describe(self) -> str:
        needs, seen = self.needs, []
        if needs.clip_dim:
            encoder = _ENCODERS.get((needs.clip_layer, needs.clip_dim), f"a CLIP of width {needs.clip_dim}")
            what = "pooled image embedding" if needs.clip_layer == "pooled" else f"{needs.clip_layer} hidden states"
            seen.append(f"the {what} of {encoder}")
        if needs.face_dim:
            seen.append(f"a face embedding of {needs.face_dim} numbers (ArcFace)")
        lora = f", with a LoRA of rank {self.lora_rank} on the identity stream" if self.lora_rank else ""
        trained = "trained with text, not identity-enhanced"
        return f"{self.title}{self.version}: sees {' and '.join(seen)}{lora}; {trained}; {self.licence}"

    def to_dict(self) -> dict[str, Any]:
        """The entries of `adapter_config.json` that the weights do not tell."""
        return {"format": "ip_adapter", "family": self.family}
