"""Infinite-ID on diffusers: two-stream sampling of SDXL with an identity adapter, in PyTorch alone.

    pipe = DiffusionPipeline.from_pretrained(SDXL, custom_pipeline=FILE, trust_remote_code=True)
    pipe.load_infinite_id(FOLDER)
    person = pipe.encode_identity(clip_hidden_states=..., face_embedding=...)
    images = pipe.sample(["a man in the snow"], [person]).images

FILE is this one; it imports torch, diffusers, and what SDXL takes there: transformers, safetensors and numpy. FOLDER
holds `adapter_config.json` and `adapter.safetensors`; published SDXL adapters in safetensors (IP-Adapter, Plus,
Full-Face, FaceID, FaceID-Plus) load too. Equations are arXiv 2403.11781's.
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPImageProcessor

# What an adapter takes of a face. EMPTY is CLIP's answer to an image of zeros: nobody, for guidance, in some families.
HIDDEN, POOLED, FACE, EMPTY = "clip_hidden_states", "clip_pooled", "face_embedding", "empty_clip_hidden_states"
KEYS, SHORTCUT, OWN, SEEN = ("to_k_ip", "to_v_ip"), "shortcut_scale", "image_proj.", "image_proj.perceiver_resampler."
# The first map of each mapper, and what it reads.
OURS = {"clip_mapper.proj_in": HIDDEN, "clip_mapper.proj.0": HIDDEN, "face_mapper.proj.0": FACE}
PUBLISHED = {  # by a key that a family alone has among those below it
    "image_proj.latents": {f"{OWN}proj_in": HIDDEN},  # Plus, Plus-Face
    "image_proj.proj.3.weight": {f"{OWN}proj.0": HIDDEN},  # Full-Face
    f"{SEEN}proj_in.weight": {f"{OWN}proj.0": FACE, f"{SEEN}proj_in": HIDDEN},  # FaceID-Plus
    "image_proj.proj.weight": {f"{OWN}proj": POOLED},  # IP-Adapter
    "image_proj.proj.2.weight": {f"{OWN}proj.0": FACE},  # FaceID
}
WHOLE, NUMBER, FLOAT32_MAX = int | np.integer, int | float | np.number, 3.4e38
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULE |= {"timestep_spacing": "leading", "set_alpha_to_one": False}


class Adapter(dict[str, Tensor]):
    """Tensors under the names of their file; what they need of a face, in shapes where 0 is any size."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]):
        super().__init__(tensors)
        ours = {key: name for key, name in OURS.items() if f"{key}.weight" in self}
        first = next((maps for sign, maps in PUBLISHED.items() if sign in self), ours)
        self.maps = {key.rpartition("proj")[0]: name for key, name in first.items()}
        widths = {name: self.get(f"{key}.weight", torch.ones(1)).shape[-1] for key, name in first.items()}
        widths |= {EMPTY: widths[HIDDEN]} if OWN in self.maps and HIDDEN in widths else {}
        self.needs = {name: (0,) * (name in (HIDDEN, EMPTY)) + (width,) for name, width in widths.items()}
        self.config, self.read = config, dict[str, None]()  # those asked for, in order
        self.clip_layer = config.get("clip_layer", "penultimate" if OWN in self.maps else "last")

    def __getitem__(self, key: str) -> Tensor:
        self.read[key] = None
        return super().__getitem__(key)

    def check(self, unet: Any) -> None:
        """ValueError unless these are all the tensors that the family has over this U-Net, in its shapes."""
        dry = Adapter({key: x.to("meta") for key, x in self.items()}, self.config)  # computes shapes alone
        try:
            tokens = dry.tokens({name: torch.zeros([n or 2 for n in shape]) for name, shape in self.needs.items()})
            for n, name in enumerate(unet.attn_processors):
                for key in ("to_q", "to_k", "to_v", "to_out.0"):
                    linear, at = unet.get_submodule(name.replace("processor", key)), f"ip_adapter.{n}.{key[:6]}"
                    if ".attn2." in name and f"{key}_ip" in KEYS:
                        dry.project(f"{at}_ip", tokens).view(len(tokens), linear.out_features)
                    if any("_lora." in key for key in self):
                        down = dry.project(f"{at}_lora.down", torch.zeros(linear.in_features))
                        dry.project(f"{at}_lora.up", down).view(linear.out_features)
        except (RuntimeError, TypeError, KeyError) as error:
            key = next(reversed(dry.read))
            fault = f"{list(self[key].shape)} does not fit ({error})" if key in self else "is missing"
            raise ValueError(f"The adapter's {key} {fault}: give an adapter for this model.") from None
        if unused := sorted(self.keys() - dry.read):
            some = ", ".join(unused[:3])
            raise ValueError(f"The adapter has {len(unused)} tensors of no use to this model ({some}): give another.")

    def tokens(self, features: dict[str, Tensor]) -> Tensor:
        """c_id [K, width] of one person (Eq. 4), from [L, clip_dim], [clip_dim], [face_dim], as `needs` names them."""
        x = {at: F.normalize(features[i], dim=-1) if i == FACE else features[i] for at, i in self.maps.items()}
        if SEEN not in x:
            return torch.cat([self._map(mapper, each) for mapper, each in x.items()])
        tokens = self._map(OWN, x[OWN])
        seen, scale = self._resample(SEEN, x[SEEN], tokens), self.config[SHORTCUT]
        return seen if scale is None else tokens + scale * seen  # FaceID-Plus version 1, or 2

    def _map(self, name: str, x: Tensor) -> Tensor:
        """[..., dim] -> [tokens, width]: a resampler; or one linear map, or two around GELU, then LayerNorm."""
        if f"{name}latents" in self:
            return self._resample(name, x, self[f"{name}latents"].squeeze(0))
        if f"{name}proj.weight" in self:
            x = self.project(f"{name}proj", x, bias=True)
        else:
            x = self.project(f"{name}proj.2", F.gelu(self.project(f"{name}proj.0", x, bias=True)), bias=True)
        norm = f"{name}proj.3" if f"{name}proj.3.weight" in self else f"{name}norm"
        return self._norm(norm, x.reshape(-1, len(self[f"{norm}.weight"])))

    def _resample(self, name: str, x: Tensor, latents: Tensor) -> Tensor:
        """IP-Adapter-Plus's perceiver: latents [n, dim] look at x [L, dim_in] and at themselves -> [n, width]."""
        x, layer = self.project(f"{name}proj_in", x, bias=True), 0
        while (at := f"{name}layers.{layer}.") + "0.to_q.weight" in self:
            own, layer = self._norm(f"{at}0.norm2", latents), layer + 1
            k, v = self.project(f"{at}0.to_kv", torch.cat([self._norm(f"{at}0.norm1", x), own])).chunk(2, dim=-1)
            heads = self.config.get("resampler_heads", k.shape[-1] // 64)
            q, k, v = (split_heads(part[None], heads) for part in (self.project(f"{at}0.to_q", own), k, v))
            latents = latents + self.project(f"{at}0.to_out", attend(q, k, v)[0].transpose(0, 1).flatten(1))
            hidden = self.project(f"{at}1.1", self._norm(f"{at}1.0", latents))
            latents = latents + self.project(f"{at}1.3", F.gelu(hidden))
        return self._norm(f"{name}norm_out", self.project(f"{name}proj_out", latents, bias=True))

    def project(self, name: str, x: Tensor, bias: bool = False) -> Tensor:  # by the linear map of this name
        added, weight = self[f"{name}.bias"] if bias else None, self[f"{name}.weight"]
        return F.linear(x.to(weight), weight, None if added is None else added.view(len(weight)))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])


def is_version_1(path: Path) -> bool:
    """Whether a FaceID-Plus is the first, which nothing but the file's name tells."""
    name = path.name.lower()
    return "plus" in name and not re.search("plus[-_ ]?v2", name)


def read_adapter(path: str | Path) -> Adapter:
    """An adapter folder, or a published .safetensors file. ValueError for what is damaged or something else."""
    path, config = Path(path), {}
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        cure = f"`python export.py --checkpoint {path} --format diffusers` of infinite_id_jax makes a folder of it"
        raise ValueError(f"{path} is a pickle and this reads safetensors only: {cure}.")
    try:
        if path.name == "adapter.safetensors" and path.with_name("adapter_config.json").is_file():
            path = path.parent  # a folder's file is no more and no less than the folder
        if path.is_dir():
            config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
            path = path / "adapter.safetensors"
        config = {SHORTCUT: None if is_version_1(path) else 1.0} | config
        with safe_open(path, framework="pt") as file:
            adapter = Adapter({key: file.get_tensor(key) for key in sorted(file.keys())}, config)
            types, metadata = {key: file.get_slice(key).get_dtype() for key in adapter}, file.metadata() or {}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole adapter ({error}): give another folder or .safetensors file.") from None
    digest = hashlib.sha256()
    for key, tensor in adapter.items():
        digest.update(f"{key}:{types[key]}:{'x'.join(map(str, tensor.shape))};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if metadata.get("infinite_id.sha256", digest.hexdigest()) != digest.hexdigest():
        raise ValueError(f"{path} is damaged (its checksum does not fit its contents): copy it again.")
    latents = f"{OWN}latents"
    plus = (adapter.needs[HIDDEN][-1], adapter[latents].shape[-1]) if latents in adapter else (0, 0)
    for sign, kind in (
        (plus[0] == 512, "InstantID's adapter, which needs its ControlNet"),  # it sees a face where Plus sees CLIP
        (plus == (1024, 2048), "Kolors' adapter"),
        (not adapter.needs, "no adapter of a known family"),
    ):
        if sign:
            raise ValueError(f"{path} is {kind}: give IP-Adapter, Plus, Full-Face, FaceID or FaceID-Plus, or a folder.")
    check_number(SHORTCUT, 0 if config[SHORTCUT] is None else config[SHORTCUT])
    return adapter


def check_number(name: str, value: Any, least: int | float = -math.inf, kind: Any = NUMBER) -> None:
    if not isinstance(value, kind) or not abs(value) < FLOAT32_MAX or value < least:
        what = "one finite number" if kind is NUMBER else f"one whole number of {least} or more"
        raise ValueError(f"{name} {value!r} cannot be used: give {what}.")


@dataclasses.dataclass(frozen=True)
class Switches:
    """The variants of the method and its two numbers. ValueError for a value that cannot be used."""

    streams: Literal["two", "one"] = "two"  # one: identity rows with plain self-attention, as published IP-Adapters run
    attention: Literal["mixed", "mutual", "off"] = "mixed"  # identity rows look at text rows: Eq. 5; at them alone; not
    style_merge: Literal["none", "adain_mean", "adain"] = "none"  # what identity keys and values take over (Eq. 7, 8)
    cross_merge: bool = True  # the text term of Eq. 6
    id_scale: float = 1.0
    text_scale: float = 1.0
    text_stream: Literal["own", "shared"] = "own"  # shared: it looks at the identity stream's latents
    pooled_text: Literal["prompt", "zeros"] = "prompt"  # in the identity stream
    step_range: tuple[int, int | None] = (0, None)  # (first, end) of the steps in which `attention` applies
    layer_range: tuple[int, int | None] = (0, None)  # and of the self-attention layers, in order of execution

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, allowed = field.name, getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in allowed:
                raise ValueError(f"Unknown {name} {value!r}: choose from {', '.join(allowed)}.")
            if field.type is float:
                check_number(name, value)
            if name.endswith("_range"):
                first, end = value if isinstance(value, list | tuple) and len(value) == 2 else (-1, None)
                last = first if end is None else end
                if not (isinstance(first, WHOLE) and isinstance(last, WHOLE) and 0 <= first <= last):
                    raise ValueError(f"{name} {value!r} is no range: give 0 <= first <= end, or None as the end.")
                object.__setattr__(self, name, value := (first, end))
            of_text = name in ("attention", "text_stream", "step_range", "layer_range")
            if of_text and self.streams == "one" and value not in (field.default, "off"):
                raise ValueError(f"{name} concerns the text stream, which streams='one' lacks: leave it out.")


@dataclasses.dataclass
class Rows:
    """The rows of a batch: in each guidance half the text rows, prompt-major, and then `people` rows of each prompt."""

    halves: int  # unconditional before conditional; 1 without guidance
    prompts: int
    people: int
    texts: int  # text rows of a half: one a prompt; with a shared text stream one an identity row; in one stream none
    mixed: bool  # whether the sampler's step is in step_range; a number would be another program at each step

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, ...] -> text rows [halves, T, ...], and identity rows beside theirs [halves, T, rows of each, ...]."""
        x = x.unflatten(0, (self.halves, -1))
        return x[:, : self.texts], x[:, self.texts :].unflatten(1, (max(self.texts, self.prompts), -1))

    def join(self, text: Tensor, identity: Tensor) -> Tensor:  # the inverse of `split`
        return torch.cat([text, identity.flatten(1, 2)], dim=1).flatten(0, 1)

    def spread(self, x: Tensor) -> Tensor:
        """What belongs to the prompts [P, ...], for all rows of one half."""
        return torch.cat([x.repeat_interleave(n, 0) for n in (self.texts // self.prompts, self.people)])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., L, heads * d] -> [..., heads, L, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(d)) V over [..., heads, L, d]."""
    return F.scaled_dot_product_attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)).reshape(q.shape)


def merge_style(name: str, x: Tensor, y: Tensor) -> Tensor:
    """x [..., L, d] with y's mean over its tokens (Eq. 8), for adain also y's deviation; in fp32."""
    if name == "none":
        return x
    x32, y32 = x.float(), y.float()
    centred = x32 - x32.mean(-2, keepdim=True)
    if name == "adain":
        var_x, var_y = (z.var(-2, keepdim=True) + 1e-5 for z in (x32, y32))
        centred = centred * (var_y / var_x).sqrt()
    return (centred + y32.mean(-2, keepdim=True)).to(x.dtype)


def draw(shape: tuple[int, ...], seed: Any) -> Tensor:
    """Unit normal numbers [P, ...]: row p from seed + p, or from seed[p]. ValueError for what is no seed."""
    seeds = [seed + p if isinstance(seed, WHOLE) else seed for p in range(shape[0])]
    seeds = list(seed) if isinstance(seed, list | tuple | np.ndarray) else seeds
    if len(seeds) != shape[0] or not all(isinstance(x, WHOLE | torch.Generator) for x in seeds):
        raise ValueError(f"seed {seed!r} cannot be used: give an integer or a torch.Generator, or one for each prompt.")
    every = [torch.Generator().manual_seed(int(x)) if isinstance(x, WHOLE) else x for x in seeds]
    return torch.cat([randn_tensor((1, *shape[1:]), generator=one, device=one.device).cpu() for one in every])


class IdentityAttention:
    """The processor of layer `n` of the adapter's file: text rows are plain SDXL's, identity rows see more.

    tokens: for a cross-attention c_id [halves, T or 1, rows of each, K, width], with T as `Rows.split` has it.
    mixes: whether a self-attention is one of those where the text stream reaches the identity stream.
    """

    def __init__(self, adapter: Adapter, n: int, rows: Rows, s: Switches, tokens: Tensor | None, mixes: bool):
        self.adapter, self.name, self.rows, self.switches, self.mixes = adapter, f"ip_adapter.{n}.", rows, s, mixes
        # K'_id and V'_id are the same at all steps.
        self.identity = [] if tokens is None else [adapter.project(f"{self.name}{key}", tokens) for key in KEYS]

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = {"to_q": hidden_states, "to_k": source, "to_v": source}
        q, k, v = (split_heads(self._map(key, getattr(attn, key), x), attn.heads) for key, x in inputs.items())
        out = self._cross_attention(q, k, v) if self.identity else self._self_attention(q, k, v)
        return attn.to_out[1](self._map("to_out", attn.to_out[0], out.transpose(1, 2).flatten(2)))

    def _map(self, key: str, linear: torch.nn.Module, x: Tensor) -> Tensor:
        """The layer's own linear map, and in the identity rows FaceID's low-rank one beside it."""
        y, lora = linear(x), f"{self.name}{key}_lora"
        if f"{lora}.down.weight" not in self.adapter:
            return y
        text, identity = self.rows.split(y)
        down = self.adapter.project(f"{lora}.down", self.rows.split(x)[1])
        return self.rows.join(text, identity + self.adapter.project(f"{lora}.up", down))

    def _self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Identity rows attend to themselves and to their text row (Eq. 5), text rows to themselves."""
        s = self.switches
        if not self.mixes or not self.rows.mixed:
            return attend(q, k, v)
        (q_t, q_id), (k_t, k_id), (v_t, v_id) = (self.rows.split(x) for x in (q, k, v))
        texts = attend(q_t, k_t, v_t)
        k_t, v_t = (x[:, :, None].expand(k_id.shape) for x in (k_t, v_t))
        if s.attention == "mixed":
            k_t, v_t = (torch.cat([merge_style(s.style_merge, x, y), y], -2) for x, y in ((k_id, k_t), (v_id, v_t)))
        return self.rows.join(texts, attend(q_id, k_t, v_t))

    def _cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In identity rows id_scale Attn(Q, K'_id, V'_id) + text_scale Attn(Q, K'_t, V'_t) (Eq. 6)."""
        s, (texts, read) = self.switches, self.rows.split(attend(q, k, v))
        q_id, k_t, v_t = (self.rows.split(x)[1] for x in (q, k, v))
        k_id, v_id = (split_heads(x, q.shape[1]).expand(-1, q_id.shape[1], *[-1] * 4) for x in self.identity)
        if s.cross_merge:
            k_id, v_id = (merge_style(s.style_merge, x, y) for x, y in ((k_id, k_t), (v_id, v_t)))
        seen = s.id_scale * attend(q_id, k_id, v_id)
        return self.rows.join(texts, seen + s.text_scale * read if s.cross_merge else seen)


class Identity(NamedTuple):
    """One person (or a mixture) as identity tokens c_id [K, width], and nobody as as many, for guidance."""

    tokens: Tensor
    unconditional: Tensor


class InfiniteIDOutput(NamedTuple):
    """P x M images, prompt-major, and final latents [P * M, 4, h, w]; of the text stream [P, 4, h, w] if it has any."""

    images: Any
    latents: Tensor
    text_stream_latents: Tensor | None


class InfiniteIDPipeline(StableDiffusionXLPipeline):
    """Plain SDXL where it is called as in diffusers; Infinite-ID by `sample`, with any deterministic scheduler."""

    adapter: Adapter | None = None
    image_encoder: Any  # transformers' CLIPVisionModelWithProjection, or None
    scheduler: Any

    def load_infinite_id(self, path: str | Path) -> None:
        """Take an adapter folder, or a published .safetensors file, and DDIM. ValueError for what does not fit."""
        adapter, said = read_adapter(path), dict(self.scheduler.config)
        adapter.check(self.unet)
        for key in said.pop("_use_default_values", []):  # a scheduler's own defaults; SDXL's are others
            del said[key]
        self.adapter, self.scheduler = adapter, DDIMScheduler.from_config(SCHEDULE | said, clip_sample=False)

    @torch.no_grad()
    def encode_identity(self, head_crop: Any = None, **features: Any) -> Identity:
        """One person from features of a face, tensors or arrays; with an image_encoder CLIP's from a PIL head_crop.

        clip_hidden_states [L, clip_dim] of the layer the adapter was trained with, clip_pooled [clip_dim],
        face_embedding [face_dim], empty_clip_hidden_states, of an image of zeros. ValueError names what is missing.
        """
        adapter = self._loaded()
        if self.image_encoder is not None:
            features = (self._see(head_crop) if head_crop is not None else {}) | features
            features = ({EMPTY: self._see(None)[HIDDEN]} if EMPTY in adapter.needs else {}) | features
        missing = [name for name in adapter.needs if features.get(name) is None]
        if missing:
            clip = "" if missing == [FACE] else "; a head_crop gives CLIP's to a pipeline loaded with image_encoder=..."
            raise ValueError(f"This adapter also takes {' and '.join(missing)}: give it to encode_identity{clip}.")
        person = {}
        for name, shape in adapter.needs.items():
            x = features[name]
            x = x.float() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, "f4", order="C"))
            if x.ndim != len(shape) or x.shape[-1] != shape[-1] or not x.numel() or not x.isfinite().all():
                wrong = f"{list(x.shape)}{'' if x.isfinite().all() else ', not finite,'}"
                needed = ", ".join(str(n or "any") for n in shape)
                raise ValueError(f"{name} {wrong} cannot be used: give one face's finite numbers, [{needed}].")
            person[name] = x
        nobody = {name: torch.zeros_like(x) for name, x in person.items()}
        nobody |= {HIDDEN: person[EMPTY]} if EMPTY in person else {}
        return Identity(adapter.tokens(person), adapter.tokens(nobody))

    def mix_identities(self, identities: list[Identity], weights: list[float] | None = None) -> Identity:
        """Several people as one: their tokens side by side, or with weights that sum to 1 their weighted sum (A.7)."""
        parts = zip(*identities, strict=True)
        if weights is None:
            return Identity(*(torch.cat(part) for part in parts))
        alike = len({person.tokens.shape for person in identities}) == 1 and len(weights) == len(identities)
        if not alike or not math.isclose(sum(weights), 1, abs_tol=1e-4):
            raise ValueError(f"The weights {weights} must be one for each identity, of one person each, and sum to 1.")
        return Identity(*(torch.stack([w * x for w, x in zip(weights, part, strict=True)]).sum(0) for part in parts))

    @torch.no_grad()
    def sample(
        self,
        prompts: str | list[str],
        identities: Identity | list[Identity],
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 30,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        seed: int | torch.Generator | list[Any] | tuple[Any, ...] | np.ndarray = 0,
        latents: Tensor | None = None,
        output: str = "pil",
        **switches: Any,
    ) -> InfiniteIDOutput:
        """P prompts x M identities -> P * M images, prompt-major; `switches` are the fields of `Switches`.

        Prompt row p starts from the noise of seed + p, of seed[p], maybe a torch.Generator, or from latents[p] of
        [P, 4, h, w], unit normal. guidance_scale of 1 or less turns guidance off. negative_prompt None is zero
        embeddings. output: pil, np, pt or latent. ValueError for what cannot be used.
        """
        for name in switches.keys() - Switches.__dataclass_fields__.keys():
            raise ValueError(f"sample takes no {name}: its switches are {', '.join(Switches.__dataclass_fields__)}.")
        s = Switches(**switches)
        check_number("guidance_scale", guidance_scale)
        check_number("guidance_rescale", guidance_rescale)
        check_number("steps", steps, 1, WHOLE)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        people = [identities] if isinstance(identities, Identity) else list(identities)
        if not prompts or not people:
            raise ValueError("There is nothing to sample: give at least one prompt and one identity.")
        sides = (self.default_sample_size,) * 2 if latents is None else latents.shape[2:]
        size = [n * self.vae_scale_factor if x is None else x for n, x in zip(sides, (height, width), strict=True)]
        shape = (len(prompts), self.unet.config.in_channels, *(n // self.vae_scale_factor for n in size))
        latents = draw(shape, seed) if latents is None else latents
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; {list(shape)} is needed.")
        copies = 0 if s.streams == "one" else len(people) if s.text_stream == "shared" else 1
        mixing = range(10**6)[slice(*s.step_range)]  # the steps in which `attention` applies
        halves, ended = 2 if guidance_scale > 1 else 1, []
        rows = Rows(halves, len(prompts), len(people), len(prompts) * copies, 0 in mixing)

        def after_step(_: Any, step: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            rows.mixed, x = step + 1 in mixing, values["latents"]
            x = torch.cat([x[rows.texts :]] * 2) if s.text_stream == "shared" else x
            ended[:] = [x]
            return {"latents": x[rows.texts :] if step + 1 == self.num_timesteps else x}  # text is not decoded

        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        words: Any = (prompts, None, self._execution_device, 1, rows.halves == 2, negative_prompt)
        options: Any = {
            name: x if x is None else rows.spread(x) for name, x in zip(names, self.encode_prompt(*words), strict=True)
        }
        for pooled in (x for x in (options[name] for name in names[2:]) if x is not None):
            pooled[rows.texts :] *= s.pooled_text == "prompt"
        options |= {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "output_type": output}
        options |= {"height": size[0], "width": size[1], "latents": rows.spread(latents).to(self.unet.dtype)}
        options |= {"num_inference_steps": steps, "callback_on_step_end": after_step}
        before = self.unet.attn_processors
        self.unet.set_attn_processor(self._processors(people, rows, s))
        try:  # to diffusers' own loop the rows of both streams are one batch
            out: Any = self(**options)
        finally:
            self.unet.set_attn_processor(before)
        text = ended[0][: rows.texts] if s.streams == "two" and s.text_stream == "own" else None
        return InfiniteIDOutput(out.images, ended[0][rows.texts :], text)

    def _processors(self, people: list[Identity], rows: Rows, s: Switches) -> dict[str, IdentityAttention]:
        adapter, names = self._loaded(), list(self.unet.attn_processors)
        length = math.lcm(*(len(x.tokens) for x in people))  # repeating all tokens of one is invisible to softmax
        parts = [[x.repeat(length // len(x), 1) for x in part] for part in zip(*people, strict=True)]
        tokens = torch.stack([torch.stack(part) for part in parts[::-1][-rows.halves :]])
        # [halves, people, K, width] -> [halves, T or 1, rows of each, K, width]
        tokens = tokens[:, None] if rows.texts <= rows.prompts else tokens.repeat(1, rows.prompts, 1, 1)[:, :, None]
        order = [x for stage in ("down", "mid", "up") for x in names if x.startswith(stage) and ".attn1." in x]
        mixing = order[slice(*s.layer_range)] if rows.texts and s.attention != "off" else []
        return {
            name: IdentityAttention(adapter, n, rows, s, tokens if ".attn2." in name else None, name in mixing)
            for n, name in enumerate(names)
        }

    def _loaded(self) -> Adapter:
        if self.adapter is None:
            raise ValueError("Identities need an adapter: call load_infinite_id(FOLDER) first.")
        where = self._execution_device, self.unet.dtype  # each walks over all modules: ask once
        self.adapter = Adapter({key: x.to(*where) for key, x in self.adapter.items()}, self.adapter.config)
        return self.adapter

    def _see(self, picture: Any) -> dict[str, Tensor]:
        size = self.image_encoder.config.image_size
        pixels = torch.zeros(1, 3, size, size)
        if picture is not None:
            pixels = CLIPImageProcessor(size=size, crop_size=size)(picture, return_tensors="pt")["pixel_values"]
        out = self.image_encoder(pixels.to(self._execution_device, self.image_encoder.dtype), output_hidden_states=True)
        hidden = out.last_hidden_state if self._loaded().clip_layer == "last" else out.hidden_states[-2]
        return {HIDDEN: hidden[0], POOLED: out.image_embeds[0]}
