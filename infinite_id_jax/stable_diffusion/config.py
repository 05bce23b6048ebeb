"""Configurations of the frozen base, read from the JSON files of a diffusers-layout folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from infinite_id_jax.errors import InputError

BASES = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}
"""The Stable Diffusions, by the width of their cross-attention."""

MAX_SIDE = 8192
"""Pixels, far beyond SDXL's training; sizes that overflow XLA's counters end the process without a word."""

C = TypeVar("C", bound="_Config")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON file of a model folder. Raises InputError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: check the path, or fetch the folder again whole.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): fetch the file again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object: fetch the file again.")
    return content


@dataclasses.dataclass(frozen=True)
class _Config:
    """Fields are the JSON's keys. `_fixed` lists keys whose other values are an architecture we do not build."""

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Take the known keys; raise InputError for a setting that would change the architecture."""
        fixed: dict[str, tuple[Any, ...]] = cls._fixed()
        for key, allowed in fixed.items():
            if key in values and _frozen(values[key]) not in allowed:
                raise InputError(
                    f"{cls.__name__}: {key}={values[key]!r} is not supported (only {allowed[0]!r}): "
                    "use an SDXL, SD 2 or SD 1.5 model."
                )
        names = {field.name for field in dataclasses.fields(cls)}
        given = {key: _frozen(value) for key, value in values.items() if key in names and value is not None}
        return cls(**(cls._absent() | given))

    @classmethod
    def from_json(cls: type[C], path: Path) -> C:
        """`from_dict` of a file; errors name the file."""
        try:
            return cls.from_dict(read_json(path))
        except InputError as error:
            raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
        except TypeError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def _fixed(cls) -> dict[str, tuple[Any, ...]]:
        return {}

    @classmethod
    def _absent(cls) -> dict[str, Any]:
        """What diffusers takes for a setting that is younger than the file."""
        return {}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _check_groups(config: "UNetConfig | VAEConfig") -> None:
    name, groups = type(config).__name__, config.norm_num_groups
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in config.block_out_channels):
        raise InputError(
            f"{name}: norm_num_groups={groups!r} does not divide block_out_channels "
            f"{list(config.block_out_channels)}: fetch its config.json again."
        )


@dataclasses.dataclass(frozen=True)
class UNetConfig(_Config):
    """UNet2DConditionModel; the defaults are SDXL's."""

    sample_size: int = 128  # latent height and width the model was trained at
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = (1, 2, 10)
    attention_head_dim: int | tuple[int, ...] = (5, 10, 20)  # the number of heads, in spite of the name
    num_attention_heads: int | tuple[int, ...] | None = None  # wins over attention_head_dim where given
    cross_attention_dim: int = 2048
    use_linear_projection: bool = True
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    addition_embed_type: str | None = None  # "text_time" (pooled text and micro-conditioning) in SDXL
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    @classmethod
    def _fixed(cls) -> dict[str, tuple[Any, ...]]:
        return {
            "mid_block_type": ("UNetMidBlock2DCrossAttn",),
            "act_fn": ("silu",),
            "addition_embed_type": ("text_time", None),
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "attention_type": ("default",),
            "encoder_hid_dim_type": (None,),
            "time_embedding_type": ("positional",),
            "time_cond_proj_dim": (None,),
            "resnet_time_scale_shift": ("default",),
            "only_cross_attention": (False,),
            "dual_cross_attention": (False,),
            "center_input_sample": (False,),
            "conv_in_kernel": (3,),
            "conv_out_kernel": (3,),
            "dropout": (0.0,),
            "downsample_padding": (1,),
            "mid_block_scale_factor": (1, 1.0),
            "reverse_transformer_layers_per_block": (None,),
            "resnet_out_scale_factor": (1, 1.0),
            "resnet_skip_time_act": (False,),
            "time_embedding_act_fn": (None,),
            "time_embedding_dim": (None,),
            "timestep_post_act": (None,),
        }

    @classmethod
    def _absent(cls) -> dict[str, Any]:
        return {"transformer_layers_per_block": 1, "use_linear_projection": False}

    def __post_init__(self):
        for key in ("layers_per_block", "cross_attention_dim"):
            if not isinstance(getattr(self, key), int):
                raise InputError(f"UNetConfig: {key}={getattr(self, key)!r} is not supported (only one number).")
        for key, kind in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
            for block_type in getattr(self, key):
                if block_type not in (kind, f"CrossAttn{kind}"):
                    raise InputError(
                        f"UNetConfig: {key} has {block_type}, which is not supported: use SDXL, SD 2 or SD 1.5."
                    )
        per_level = {
            "down_block_types": self.down_block_types,
            "up_block_types": self.up_block_types,
            "attention_head_dim": self.heads,
            "transformer_layers_per_block": self.transformer_layers,
        }
        for key, values in per_level.items():
            if len(values) != len(self.block_out_channels):
                raise InputError(
                    f"UNetConfig: {key} names {len(values)} levels and block_out_channels "
                    f"{len(self.block_out_channels)}: fetch unet/config.json again."
                )
        _check_groups(self)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each resolution."""
        heads = self.num_attention_heads or self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)

    @property
    def transformer_layers(self) -> tuple[int, ...]:
        """Transformer blocks of each resolution."""
        layers = self.transformer_layers_per_block
        return layers if isinstance(layers, tuple) else (layers,) * len(self.block_out_channels)

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text vector, 0 without SDXL's added conditioning."""
        if self.addition_embed_type is None:
            return 0
        return (self.projection_class_embeddings_input_dim or 0) - 6 * (self.addition_time_embed_dim or 0)


@dataclasses.dataclass(frozen=True)
class VAEConfig(_Config):
    """AutoencoderKL; the defaults are SDXL's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025

    @classmethod
    def _fixed(cls) -> dict[str, tuple[Any, ...]]:
        return {
            "act_fn": ("silu",),
            "shift_factor": (None,),
            "latents_mean": (None,),
            "latents_std": (None,),
            "mid_block_add_attention": (True,),
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
        }

    @classmethod
    def _absent(cls) -> dict[str, Any]:
        return {"scaling_factor": 0.18215}

    def __post_init__(self):
        _check_groups(self)

    @property
    def downscale(self) -> int:
        """Pixels per latent, 8 in SDXL."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(_Config):
    """CLIPTextModel or CLIPTextModelWithProjection; the defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    eos_token_id: int = 49407
    architectures: tuple[str, ...] = ("CLIPTextModel",)

    @property
    def with_projection(self) -> bool:
        return any("WithProjection" in name for name in self.architectures)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(_Config):
    """CLIPVisionModelWithProjection; the defaults are OpenCLIP ViT-bigG/14's."""

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 1280

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CLIPVisionConfig":
        """Raises InputError for a whole CLIP, whose images' half is described by a part of it."""
        if "vision_config" in values:
            raise InputError(
                "This is a whole CLIP, of texts and images: save the half that sees with transformers' "
                "CLIPVisionModelWithProjection.from_pretrained(FOLDER).save_pretrained(OTHER), and name that."
            )
        return super().from_dict(values)

    @property
    def tokens(self) -> int:
        """Patches and the class token: 257 at 224 px with patches of 14."""
        return (self.image_size // self.patch_size) ** 2 + 1
