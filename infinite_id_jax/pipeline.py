"""What a user imports: the whole of sampling in one class."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from os import PathLike, fspath
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
from infinite_id_jax.errors import CutPromptWarning, InputError, finite
from infinite_id_jax.faces.extract import ExtractedFace, extract_face
from infinite_id_jax.faces.photo import open_photo
from infinite_id_jax.faces.protocol import FaceBackend
from infinite_id_jax.identity import encoder
from infinite_id_jax.identity.config import Switches, check_reach, checked_range
from infinite_id_jax.identity.features import FaceFeatures
from infinite_id_jax.identity.inject import IdentityAdapter, block_names, inject
from infinite_id_jax.identity.scales import layer_scales
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.people import Identity, checked_people
from infinite_id_jax.sampling import Controls, Program, TextCondition, sample_streams
from infinite_id_jax.sharding import batch_sharding, compiler_options, gathered, make_mesh, parameter_sharding
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel, VisionOutput, preprocess, resize_and_crop
from infinite_id_jax.stable_diffusion.low_rank import set_lora_scale
from infinite_id_jax.stable_diffusion.quantized import checked_kind, quantize
from infinite_id_jax.stable_diffusion.tokenizer import unseen_words
from infinite_id_jax.typing import Array, Float
from infinite_id_jax.weights import lora as lora_files
from infinite_id_jax.weights.adapter import check_adapter, load_adapter, save_adapter
from infinite_id_jax.weights.folder import (
    StableDiffusionXL,
    describe_base,
    image_encoder_beside,
    load_base,
    load_image_encoder,
    resolve,
)

OUTPUTS = ("pil", "numpy", "latent")


class Output(NamedTuple):
    """P x M images in prompt-major order (p * M + m), and where both streams ended (None for what there is not)."""

    images: list[PILImage.Image] | Float[np.ndarray, "B H W 3"] | None
    latents: Float[np.ndarray, "B h w c"]
    text_stream_latents: Float[np.ndarray, "P h w c"] | None


class _Reporter:
    """Tells of a step to whoever wants to hear of it now. Compiled programs hold this, and with it no pipeline."""

    call: Callable[[int], None] | None = None

    def __call__(self, step: Any) -> None:
        if self.call is not None:
            self.call(int(step) + 1)


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
        self._blocks = block_names(base.unet)
        if adapter is not None:
            inject(base.unet, adapter)
        self._unet = nnx.split(base.unet)
        options: Any = {"static_argnums": 0, "donate_argnames": "noise", "compiler_options": compiler_options(mesh)}
        self._sample, self._reporter = jax.jit(sample_streams, **options), _Reporter()

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
        config: str | PathLike[str] | None = None,
        lora: lora_files.Files | None = None,
        merge_lora: bool = True,
        quantization: str = "none",
    ) -> "InfiniteIDPipeline":
        """Load an SDXL folder (diffusers' layout), single file (CompVis' layout) or hub id, and an adapter.

        "miniature" is the package's own small model: 128 pixels, drawn people, its own adapter. adapter: a folder of
        ours, or a published IP-Adapter, Plus, Full-Face, FaceID or FaceID-Plus file; without one, text-to-image only.
        mesh: "data=1,fsdp=1,tensor=1", a mapping, a Mesh, or None for one device. image_encoder: the folder of the
        CLIP image encoder if it is not `image_encoder/` in the base. config: a folder with the configurations of a
        single file that are not SDXL 1.0's. lora: a LoRA file for the base, several, or {file: scale}; with
        merge_lora=False it stays beside the weights and `set_lora_scale` changes it. quantization: none, int8 or
        float8, in which the U-Net's transformers then multiply. Raises InputError for what cannot be used.
        """
        conditioning.check_dtype(dtype)
        checked_kind(quantization)
        device_mesh = make_mesh(mesh)
        sharding = None if device_mesh is None else parameter_sharding(device_mesh)
        model = resolve(base if isinstance(base, str) else Path(base))
        settings = None if config is None else Path(config)
        if base == "miniature":
            adapter, faces = adapter or model / "adapter", "miniature" if faces == "auto" else faces
        described = describe_base(model, settings)  # what does not fit is known before anything large is read
        if adapter is not None:
            check_adapter(Path(adapter), described.unet)
        scales = lora_files.checked_loras(lora)
        updates = {file: lora_files.read_lora(Path(file), described) for file in scales}
        loaded = load_base(model, config=settings, dtype=dtype, sharding=sharding)
        for file, update in updates.items():
            if merge_lora:
                loaded = lora_files.merge_lora(loaded, update, scales[file], donate=True)
            else:
                loaded = lora_files.attach_lora(loaded, update, file, scales[file])
        quantize(loaded.unet, quantization)
        vision = Path(image_encoder or image_encoder_beside(model))
        return cls(
            loaded,
            None if adapter is None else load_adapter(Path(adapter), loaded.unet, dtype=dtype, sharding=sharding),
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
            raise InputError(
                "This pipeline has no CLIP image encoder: pass FaceFeatures with all its fields, or load one."
            )
        return self._make_image_encoder()

    def save_adapter(self, folder: str | PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter.safetensors` (PyTorch layout), bit-exact on a round trip."""
        save_adapter(self._require_adapter(), Path(folder))

    def set_lora_scale(self, file: str | PathLike[str], scale: float) -> None:
        """Another strength of a LoRA that was loaded with merge_lora=False; compiles nothing.

        Raises InputError if there is none of that name.
        """
        parts = [self._unet, *self._text_encoders]
        self._unet, *self._text_encoders = set_lora_scale(parts, fspath(file), finite("The LoRA's scale", scale))

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
            return self._identity(source)
        if isinstance(source, ExtractedFace):
            face = source
            if face.recogniser:
                adapter.config.check_recogniser(face.recogniser, len(face.embedding))
        else:
            adapter.config.check_recogniser(self.faces.name, self.faces.embedding_dim)
            face = extract_face(open_photo(source), self.faces, face_index=face_index)
        needs = adapter.config.needs
        if not needs.clip_dim:
            return self._identity(FaceFeatures(face_embedding=face.embedding), face)
        crop = face.arcface_crop if needs.arcface_crop else face.clip_crop
        fitted = resize_and_crop(PILImage.fromarray(crop), self.image_encoder.config.image_size)
        seen = self._see(preprocess(fitted[None]))
        hidden = seen.hidden_states(needs.clip_layer)[0]
        return self._identity(FaceFeatures(hidden, face.embedding, seen.image_embeds[0]), face)

    def mix_identities(self, identities: Sequence[Identity], weights: Sequence[float] | None = None) -> Identity:
        """Several people as one: their tokens side by side, or with weights their weighted sum (A.7)."""
        if not identities:
            raise InputError("There is no identity to mix: give at least one.")
        people = [identity.tokens for identity in identities]
        nobody = [identity.unconditional for identity in identities]
        if weights is not None:
            return Identity(encoder.interpolate(people, weights), encoder.interpolate(nobody, weights))
        return Identity(encoder.mix(people), encoder.mix(nobody))

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
        guidance_range: tuple[int, int | None] = (0, None),
        cache_interval: int = 1,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | Array | None = None,
        scheduler: str = "ddim",
        streams: str = "two",
        style_merge: str = "none",
        attention: str = "mixed",
        cross_merge: bool = True,
        id_scale: float | Mapping[str, Any] = 1.0,
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
        normal. guidance_scale of 1 or less turns guidance off and halves the work, as it is halved in the steps outside
        guidance_range (end exclusive). cache_interval: of how many steps one runs the U-Net's inner levels (DeepCache).
        negative_prompt None is zero embeddings, "" is encoded. step_range and layer_range (end exclusive) bound where
        `attention` applies; see `Switches` for the variants. streams: two is Infinite-ID, one the published
        IP-Adapters' own way of sampling. id_scale: a number, or numbers by block in the form of diffusers'
        `set_ip_adapter_scale`. A prompt of more than 75 tokens is cut, with a CutPromptWarning.
        output: pil, numpy (floats in [0, 1]) or latent (no decoding). progress: called with the number of finished
        steps. Raises InputError for values that cannot be used.
        """
        prompts, people = conditioning.checked_prompts(prompts), checked_people(identities, style_merge)
        negative = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt or ()
        for prompt in dict.fromkeys([*prompts, *negative]):
            if cut := self.cut_words(prompt):
                warnings.warn(CutPromptWarning(prompt, cut), stacklevel=2)
        if not 0 <= finite("guidance_rescale", guidance_rescale) <= 1:
            raise InputError(f"guidance_rescale {guidance_rescale} is out of range: give 0 to 1.")
        switches = Switches(
            streams, attention, style_merge, cross_merge, text_stream, pooled_text, step_range, layer_range
        )
        guided = checked_range("guidance_range", guidance_range)
        check_reach(steps, len(self._blocks), guidance_range=guided, step_range=step_range, layer_range=layer_range)
        if cache_interval < 1:
            raise InputError(f"cache_interval {cache_interval} is too small: give 1 or more.")
        if output not in OUTPUTS:
            raise InputError(f"Unknown output {output!r}: choose from {', '.join(OUTPUTS)}.")
        factor = self.settings.vae.downscale
        shape = conditioning.latent_shape(height, width, latents, self.settings.unet, factor)
        halves = 1 if finite("guidance_scale", guidance_scale) <= 1 else 2
        single, shared = bool(people) and streams == "one", bool(people) and text_stream == "shared"
        layout = Layout(len(prompts), len(people), halves)
        if single or shared:
            layout = Layout(len(prompts) * len(people), 0 if single else 1, halves)
        self._reporter.call = progress
        program = Program(
            unet=self._unet[0],
            switches=switches,
            scheduler=scheduler,
            prediction_type=self.settings.schedule.prediction_type,
            layout=layout,
            guidance_range=guided,
            cache_interval=cache_interval,
            batch=None if self.mesh is None else batch_sharding(self.mesh),
            report=self._reporter if progress is not None else None,
        )
        noise = conditioning.initial_noise(len(prompts), shape, seed, latents)
        with self._on_mesh():
            ended = self._sample(
                program,
                self._unet[1],
                noise=jnp.repeat(noise, len(people), axis=0) if single or shared else noise,
                text=self._encode_prompts(prompts, negative_prompt, halves),
                identity=self._identity_tokens(people, halves),
                time_ids=conditioning.time_ids(shape[0] * factor, shape[1] * factor),
                controls=Controls(
                    np.float32(guidance_scale),
                    np.float32(finite("guidance_rescale", guidance_rescale)),
                    layer_scales(self._blocks, id_scale),
                    np.float32(finite("text_scale", text_scale)),
                ),
                trajectory=trajectory(scheduler, self.settings.schedule, steps),
            )
            if progress is not None:
                jax.effects_barrier()  # a late report would move the next call's bar
            ended = gathered(ended)
            final = ended.identity if people else ended.text
            conditioning.check_finite(final)
            return Output(self._images(final, output), final, ended.text)

    def _require_adapter(self) -> IdentityAdapter:
        if self.adapter is None:
            raise InputError("Identities need an adapter: load one with from_pretrained(base, adapter=PATH).")
        return self.adapter

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Within it kernels are divided over the devices."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _see(self, pixels: Float[Array, "B H W 3"]) -> VisionOutput:
        with self._on_mesh():
            return conditioning.encode_crops(nnx.split(self.image_encoder), pixels)

    def _identity(self, features: FaceFeatures, face: ExtractedFace | None = None) -> Identity:
        """Tokens of a person and the unconditional ones: of zeros, or CLIP's of an image of zeros (decision 11)."""
        needs = self._require_adapter().config.needs
        person = needs.select(features)
        empty = features.empty_clip_hidden_states
        nobody = needs.nobody(person, self._hidden_states_of_zeros if needs.empty_image and empty is None else empty)
        rows = [jax.tree.map(lambda x: jnp.asarray(x[None], self._adapter_dtype), each) for each in (person, nobody)]
        with self._on_mesh():
            return Identity(*(conditioning.map_features(self._split_adapter, row)[0] for row in rows), face=face)

    @cached_property
    def _hidden_states_of_zeros(self) -> np.ndarray:
        """What CLIP says of an image of zeros, which is nobody to some families. Raises InputError without a CLIP."""
        if self._make_image_encoder is None:
            raise InputError(
                "This adapter takes CLIP's answer to an image of zeros for nobody: give FaceFeatures its "
                "empty_clip_hidden_states too, or load a CLIP image encoder."
            )
        size = self.image_encoder.config.image_size
        return np.asarray(self._see(jnp.zeros((1, size, size, 3))).penultimate[0], np.float32)

    @property
    def _adapter_dtype(self) -> Any:
        """One for all identities, whatever they were made of: another would be another program."""
        return self._require_adapter().ip_adapter[0].to_k_ip.kernel.dtype

    @cached_property
    def _split_adapter(self) -> conditioning.Split:
        return nnx.split(self._require_adapter())

    def _identity_tokens(self, people: list[Identity], halves: int) -> Float[Array, "G M K D"]:
        """c_id of each half: nobody's, then the people's."""
        if not people:
            return jnp.zeros((halves, 0, 1, self.settings.unet.cross_attention_dim))
        nobody, tokens = (
            encoder.stack([getattr(person, name) for person in people]) for name in ("unconditional", "tokens")
        )
        return jnp.stack([nobody, tokens][-halves:]).astype(self._adapter_dtype)

    def _encode_prompts(self, prompts: list[str], negative: str | Sequence[str] | None, halves: int) -> TextCondition:
        texts = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
        if len(texts) != len(prompts):
            raise InputError(f"{len(texts)} negative prompts for {len(prompts)} prompts: give one, or one for each.")
        cond = self._encode_text(prompts)
        if halves == 1:
            return jax.tree.map(lambda x: x[None], cond)
        if negative is None and self.settings.zeros_for_no_negative:
            uncond = jax.tree.map(jnp.zeros_like, cond)
        else:
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
        conditioning.check_finite(pixels)
        if output == "numpy":
            return pixels
        return [PILImage.fromarray((image * 255).round().astype(np.uint8)) for image in pixels]
