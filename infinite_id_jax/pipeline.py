"""What a user imports: the whole of sampling in one class."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image as PILImage

from infinite_id_jax import conditioning
from infinite_id_jax.diffusion.samplers import trajectory
from infinite_id_jax.errors import InputError
from infinite_id_jax.faces.extract import ExtractedFace, extract_face
from infinite_id_jax.faces.photo import open_photo
from infinite_id_jax.faces.protocol import FaceBackend
from infinite_id_jax.identity import encoder
from infinite_id_jax.identity.config import Switches
from infinite_id_jax.identity.inject import IdentityAdapter, inject
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.sampling import Controls, Program, TextCondition, sample_streams
from infinite_id_jax.sharding import batch_sharding, gathered, make_mesh, parameter_sharding
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel, preprocess, resize_and_crop
from infinite_id_jax.stable_diffusion.tokenizer import unseen_words
from infinite_id_jax.typing import Array, Float
from infinite_id_jax.weights.adapter import load_adapter, read_adapter_config, save_adapter
from infinite_id_jax.weights.folder import StableDiffusionXL, load_base, load_image_encoder, read_settings, resolve

DTYPES = ("float32", "bfloat16", "float16")
OUTPUTS = ("pil", "numpy", "latent")
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class FaceFeatures:
    """Precomputed features of one face: CLIP hidden states [tokens, clip_dim] and the recogniser's [face_dim]."""

    clip_hidden_states: np.ndarray | Array
    face_embedding: np.ndarray | Array


@dataclasses.dataclass(frozen=True)
class Identity:
    """One person (or a mixture) as identity tokens c_id [K, D]; `face` where it came from a photo."""

    tokens: Float[Array, "K D"]
    face: ExtractedFace | None = None
    people: int = 1  # whose tokens stand side by side


class Output(NamedTuple):
    """P x M images in prompt-major order (p * M + m), and where both streams ended."""

    images: list[PILImage.Image] | Float[np.ndarray, "B H W 3"] | None
    latents: Float[np.ndarray, "B h w c"]
    text_stream_latents: Float[np.ndarray, "P h w c"] | None


class InfiniteIDPipeline:
    """Infinite-ID on SDXL. Make one with `from_pretrained`."""

    def __init__(
        self,
        base: StableDiffusionXL,
        adapter: IdentityAdapter | None = None,
        *,
        mesh: Mesh | None = None,
        faces: str | FaceBackend = "auto",
        image_encoder: Callable[[], CLIPVisionModel] | None = None,
    ):
        """`faces` is a backend or its name; `image_encoder` loads the CLIP image encoder when first needed."""
        self.settings = base.settings
        self.adapter = adapter
        self.mesh = mesh
        self._faces = faces
        self._make_image_encoder = image_encoder
        self._tokenizers = base.tokenizers
        self._text_encoders = [nnx.split(model) for model in base.text_encoders]
        self._vae = nnx.split(base.vae)
        if adapter is not None:
            inject(base.unet, adapter)
        self._unet = nnx.split(base.unet)
        self._sample = jax.jit(sample_streams, static_argnums=0, donate_argnames="noise")
        self._progress: Callable[[int], None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        base: str | PathLike[str],
        adapter: str | PathLike[str] | None = None,
        *,
        dtype: str = "float32",
        mesh: str | Mapping[str, int] | Mesh | None = None,
        image_encoder: str | PathLike[str] | None = None,
        faces: str | FaceBackend = "auto",
    ) -> "InfiniteIDPipeline":
        """Load an SDXL folder (diffusers' layout) or hub id, and an adapter folder; without one, text-to-image only.

        mesh: "data=1,fsdp=1,tensor=1", a mapping, a Mesh, or None for one device. image_encoder: the folder of the
        CLIP image encoder if it is not `image_encoder/` in the base. Raises InputError for what cannot be used.
        """
        if dtype not in DTYPES:
            raise InputError(f"Unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}.")
        if dtype == "float16" and jax.default_backend() == "cpu":
            raise InputError("float16 does not run on a CPU: take float32 or bfloat16.")
        device_mesh = make_mesh(mesh)
        sharding = None if device_mesh is None else parameter_sharding(device_mesh)
        folder = resolve(base if isinstance(base, str) else Path(base))
        if adapter is not None:  # before anything large is read
            read_adapter_config(Path(adapter)).check_fits(read_settings(folder).unet.cross_attention_dim)
        model = load_base(folder, dtype=dtype, sharding=sharding)
        loaded = None
        if adapter is not None:
            loaded = load_adapter(Path(adapter), model.unet, dtype=dtype, sharding=sharding)
        vision = Path(image_encoder) if image_encoder is not None else folder / "image_encoder"
        return cls(
            model,
            loaded,
            mesh=device_mesh,
            faces=faces,
            image_encoder=lambda: load_image_encoder(vision, dtype=dtype, sharding=sharding),
        )

    @cached_property
    def faces(self) -> FaceBackend:
        """The face backend, loaded when first used. Raises MissingExtraError if none is installed."""
        from infinite_id_jax.faces.backends import get_backend

        return get_backend(self._faces) if isinstance(self._faces, str) else self._faces

    @cached_property
    def image_encoder(self) -> CLIPVisionModel:
        """The CLIP image encoder, loaded when a photo first needs it."""
        if self._make_image_encoder is None:
            raise InputError("This pipeline has no CLIP image encoder: pass FaceFeatures, or load one.")
        return self._make_image_encoder()

    def save_adapter(self, folder: str | PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter.safetensors` (PyTorch layout), bit-exact on a round trip."""
        save_adapter(self._require_adapter(), Path(folder))

    def encode_identity(
        self,
        source: str | PathLike[str] | PILImage.Image | np.ndarray | ExtractedFace | FaceFeatures,
        *,
        face_index: int | None = None,
    ) -> Identity:
        """One person from a photo, from a face found in one, or from precomputed features (Eq. 4).

        Raises InputError for an unusable photo or features of another width, NoFaceError for a photo without a face.
        """
        adapter = self._require_adapter()
        if isinstance(source, FaceFeatures):
            return Identity(self._tokens(source))
        if isinstance(source, ExtractedFace):
            face = source
        else:
            adapter.config.check_recogniser(self.faces.name, self.faces.embedding_dim)
            face = extract_face(open_photo(source), self.faces, face_index=face_index)
        hidden = self._clip_hidden_states(face.clip_crop)
        return Identity(self._tokens(FaceFeatures(hidden, face.embedding)), face)

    def mix_identities(self, identities: Sequence[Identity], weights: Sequence[float] | None = None) -> Identity:
        """Several people as one: their tokens side by side, or with weights their weighted sum (A.7)."""
        tokens = [identity.tokens for identity in identities]
        if not tokens:
            raise InputError("There is no identity to mix: give at least one.")
        if weights is not None:
            return Identity(encoder.interpolate(tokens, weights), people=identities[0].people)
        return Identity(encoder.mix(tokens), people=sum(identity.people for identity in identities))

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that the text encoders do not see, "" if all of it fits."""
        return unseen_words(self._tokenizers, prompt)

    def __call__(
        self,
        prompts: str | Sequence[str],
        identities: Identity | Sequence[Identity] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 30,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | Array | None = None,
        scheduler: str = "ddim",
        style_merge: str = "none",
        attention: str = "mixed",
        cross_merge: bool = True,
        id_scale: float = 1.0,
        text_scale: float = 1.0,
        text_stream: str = "own",
        pooled_text: str = "prompt",
        step_range: tuple[int, int | None] = (0, None),
        layer_range: tuple[int, int | None] = (0, None),
        output: str = "pil",
        progress: Callable[[int], None] | None = None,
    ) -> Output:
        """P prompts x M identities -> P * M images, prompt-major; without identities, P plain SDXL images.

        seed: prompt row p starts from the noise of seed + p, or of seed[p]; or from latents[p] of [P, h, w, c], unit
        normal. guidance_scale of 1 or less turns guidance off and halves the work. negative_prompt None is zero
        embeddings, "" is encoded. step_range and layer_range (end exclusive) bound where `attention` applies; see
        `Switches` for the variants. output: pil, numpy (floats in [0, 1]) or latent (no decoding).
        progress: called with the number of finished steps. Raises InputError for values that cannot be used.
        """
        prompts = _checked_prompts(prompts)
        people = [identities] if isinstance(identities, Identity) else list(identities or ())
        switches = Switches(attention, style_merge, cross_merge, text_stream, pooled_text, step_range, layer_range)
        if output not in OUTPUTS:
            raise InputError(f"Unknown output {output!r}: choose from {', '.join(OUTPUTS)}.")
        shape = self._latent_shape(height, width, latents)
        factor = self.settings.vae.downscale
        halves = 1 if guidance_scale <= 1 else 2
        shared = switches.text_stream == "shared" and people
        layout = Layout(len(prompts) * len(people), 1, halves) if shared else Layout(len(prompts), len(people), halves)
        self._progress = progress
        program = Program(
            unet=self._unet[0],
            switches=switches,
            scheduler=scheduler,
            prediction_type=self.settings.schedule.prediction_type,
            layout=layout,
            batch=None if self.mesh is None else batch_sharding(self.mesh),
            report=self._report if progress is not None else None,
        )
        noise = self._noise(len(prompts), shape, seed, latents)
        streams = self._sample(
            program,
            self._unet[1],
            noise=jnp.repeat(noise, len(people), axis=0) if shared else noise,
            text=self._encode_prompts(prompts, negative_prompt, halves),
            identity=self._identity_tokens(people, halves),
            time_ids=conditioning.time_ids(shape[0] * factor, shape[1] * factor),
            controls=Controls(*(np.float32(x) for x in (guidance_scale, guidance_rescale, id_scale, text_scale))),
            trajectory=trajectory(scheduler, self.settings.schedule, steps),
        )
        if progress is not None:
            jax.effects_barrier()  # a late report would move the next call's bar
        streams = gathered(streams)
        final = streams.identity if people else streams.text
        return Output(self._images(final, output), final, streams.text)

    def _report(self, step: Any) -> None:
        """One callable for every call, so that a new progress bar compiles nothing."""
        if self._progress is not None:
            self._progress(int(step) + 1)

    def _require_adapter(self) -> IdentityAdapter:
        if self.adapter is None:
            raise InputError("Identities need an adapter: load one with from_pretrained(base, adapter=FOLDER).")
        return self.adapter

    def _clip_hidden_states(self, crop: np.ndarray) -> Float[Array, "L C"]:
        fitted = resize_and_crop(PILImage.fromarray(crop), self.image_encoder.config.image_size)
        out = conditioning.encode_crops(nnx.split(self.image_encoder), preprocess(fitted[None]))
        penultimate = self._require_adapter().config.clip_layer == "penultimate"
        return (out.penultimate if penultimate else out.last_hidden_state)[0]

    def _tokens(self, features: FaceFeatures) -> Float[Array, "K D"]:
        adapter = self._require_adapter()
        hidden, embedding = jnp.asarray(features.clip_hidden_states), jnp.asarray(features.face_embedding)
        for name, array, form in (
            ("clip_hidden_states", hidden, ("tokens", adapter.config.clip_dim)),
            ("face_embedding", embedding, (adapter.config.face_dim,)),
        ):
            if array.ndim != len(form) or array.shape[-1] != form[-1]:
                raise InputError(
                    f"{name} has shape {list(array.shape)} and this adapter takes [{', '.join(map(str, form))}]: "
                    "compute it with the encoders the adapter was trained with."
                )
        return conditioning.map_features(self._split_adapter, hidden[None], embedding[None])[0]

    @cached_property
    def _split_adapter(self) -> conditioning.Split:
        return nnx.split(self._require_adapter())

    def _identity_tokens(self, people: list[Identity], halves: int) -> Float[Array, "G M K D"]:
        """c_id of each half; the unconditional one comes of zero features, as long as the others (METHOD row 11)."""
        if not people:
            return jnp.zeros((halves, 0, 1, self.settings.unet.cross_attention_dim))
        tokens = encoder.stack([person.tokens for person in people])
        if halves == 1:
            return tokens[None]
        config = self._require_adapter().config
        length = people[0].tokens.shape[0] // people[0].people
        zeros = FaceFeatures(np.zeros((length - config.face_tokens, config.clip_dim)), np.zeros(config.face_dim))
        uncond = jnp.tile(self._tokens(zeros), (tokens.shape[1] // length, 1))
        return jnp.stack([jnp.broadcast_to(uncond, tokens.shape), tokens])

    def _latent_shape(
        self, height: int | None, width: int | None, latents: np.ndarray | Array | None
    ) -> tuple[int, int, int]:
        unet, factor = self.settings.unet, self.settings.vae.downscale
        if latents is not None and np.ndim(latents) == 4:
            default = (np.shape(latents)[1] * factor, np.shape(latents)[2] * factor)
        else:
            default = (unet.sample_size * factor,) * 2
        size = {"height": default[0] if height is None else height, "width": default[1] if width is None else width}
        for name, pixels in size.items():
            if pixels < factor or pixels % factor:
                raise InputError(f"The {name} {pixels} is not a multiple of {factor}: take {_nearest(pixels, factor)}.")
        return size["height"] // factor, size["width"] // factor, unet.in_channels

    def _noise(
        self,
        count: int,
        shape: tuple[int, int, int],
        seed: int | Sequence[int],
        latents: np.ndarray | Array | None,
    ) -> Float[Array, "P h w c"]:
        """Unit normal noise of each prompt row; always a fresh buffer, because sampling donates it."""
        if latents is not None:
            if np.shape(latents) != (count, *shape):
                raise InputError(f"latents have shape {list(np.shape(latents))}; {[count, *shape]} is needed.")
            return jnp.array(latents, jnp.float32, copy=True)
        seeds = [seed + row for row in range(count)] if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} prompts: give one number, or one for each prompt.")
        if not all(0 <= s <= MAX_SEED for s in seeds):
            raise InputError(f"Seeds lie between 0 and {MAX_SEED}: choose another than {seed}.")
        return conditioning.seeded_noise(np.asarray(seeds, np.uint32), shape)

    def _encode_prompts(self, prompts: list[str], negative: str | Sequence[str] | None, halves: int) -> TextCondition:
        cond = self._encode_text(prompts)
        if halves == 1:
            return jax.tree.map(lambda x: x[None], cond)
        if negative is None and self.settings.zeros_for_no_negative:
            uncond = jax.tree.map(jnp.zeros_like, cond)
        else:
            texts = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
            if len(texts) != len(prompts):
                raise InputError(
                    f"{len(texts)} negative prompts for {len(prompts)} prompts: give one, or one for each."
                )
            uncond = self._encode_text(texts)
        return jax.tree.map(lambda *halves: jnp.stack(halves), uncond, cond)

    def _encode_text(self, texts: list[str]) -> TextCondition:
        (first, second), (ids, ids_2) = self._text_encoders, (tokenizer(texts) for tokenizer in self._tokenizers)
        return TextCondition(*conditioning.encode_text(first, second, ids, ids_2))

    def _images(self, latents: np.ndarray, output: str) -> list[PILImage.Image] | np.ndarray | None:
        if output == "latent":
            return None
        rows = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        pixels = conditioning.decode(self._vae, latents / self.settings.vae.scaling_factor, rows)
        if output == "numpy":
            return pixels
        return [PILImage.fromarray((image * 255).round().astype(np.uint8)) for image in pixels]


def _checked_prompts(prompts: str | Sequence[str]) -> list[str]:
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise InputError("There is no prompt: give at least one.")
    return listed


def _nearest(pixels: int, factor: int) -> int:
    return max(factor, round(pixels / factor) * factor)
