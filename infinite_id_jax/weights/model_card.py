"""The README.md of an exported folder: what it is, what it was made of, how it is used, whose licences it carries."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from infinite_id_jax.identity.config import AdapterConfig, EncoderConfig
from infinite_id_jax.identity.face_id_plus import FaceIDPlusConfig
from infinite_id_jax.identity.published import PublishedConfig

CONSENT = (
    "Only for people who have agreed to it. Images made with it are AI-made and must not be passed off as photographs."
)
ADAPTER_TAGS = ("stable-diffusion-xl", "identity-preservation", "infinite-id", "ip-adapter")
BASE_TAGS = ("stable-diffusion-xl", "text-to-image")


class Facts(NamedTuple):
    """What is known of the weights; None is said to be unknown, not left out."""

    what: str  # one sentence
    whole_base: bool = False  # or an adapter
    base_model: str | None = None
    licence: str | None = None
    step: int | None = None
    run: Mapping[str, Any] | None = None  # as training wrote it down
    metrics: Mapping[str, str] | None = None  # the newest of each column
    data: Mapping[str, Any] | None = None  # photos, people, licences, sources


def model_card(facts: Facts, files: Mapping[str, str], usage: str) -> str:
    """Markdown with the header that model hubs read; `files` says of each what it is, `usage` is Markdown."""
    sections = {
        "Files": _table(files),
        "Use": usage if facts.whole_base else f"{usage}\n\n{CONSENT}",
        "Training": _training(facts),
        "Data": _data(facts),
        "Metrics": _table(facts.metrics) if facts.metrics else "None were recorded with these weights.",
        "Licence": _licence(facts),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return "\n".join(["---", *_header(facts), "---", "", f"# {_escaped(facts.what)}", "", body, ""])


def _header(facts: Facts) -> list[str]:
    """YAML, of which JSON's strings are a part."""
    lines = ["license: other"]
    # Hubs want an identifier here, such as my-license-1.0; the words themselves stand under "Licence".
    name = re.sub(r"[^a-z0-9.]+", "-", (facts.licence or "").lower()).strip("-.")
    if name:
        lines.append(f"license_name: {json.dumps(name)}")
    lines.append(f"tags: [{', '.join(BASE_TAGS if facts.whole_base else ADAPTER_TAGS)}]")
    if facts.base_model:
        lines.append(f"base_model: {json.dumps(_line(facts.base_model), ensure_ascii=False)}")
    return lines


def _training(facts: Facts) -> str:
    if facts.run is None:
        return "How these weights were trained is not recorded in the files they came from."
    return f"{facts.step:,} steps.\n\n{_table(dict(_flat(facts.run)))}"


def _data(facts: Facts) -> str:
    known = dict(facts.data or {})
    if facts.run is not None:
        known |= {"fingerprint of the dataset": facts.run["data"]["dataset"]}
    if facts.data is None:
        known["photos, people and their licences"] = "not given at export (--data names the dataset's folder)"
    return _table(known)


def _licence(facts: Facts) -> str:
    own = f"{_escaped(facts.licence).rstrip('.')}. " if facts.licence else ""
    if facts.whole_base:
        base = f"{_escaped(facts.base_model)} and its licence" if facts.base_model else "the model they were made from"
        return f"{own}These weights inherit the terms of {base}, and of whatever they were trained on since."
    base = _escaped(facts.base_model or "the base model they were trained over")
    return (
        f"{own}These weights work on {base} and inherit the terms of its licence; they also carry the terms of the "
        "photos they were trained on and of the face recogniser and CLIP whose features they read."
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return flat


def _table(rows: Mapping[str, Any]) -> str:
    cells = [(_escaped(str(key)), _escaped(str(value))) for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)])


def _escaped(text: str) -> str:
    """One line without what Markdown takes for code, links, tables or tags."""
    return re.sub(r"([\\`*\[\]<>|~&])", r"\\\1", _line(text))


def _line(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


# How the files are used. SDXL, FOLDER and the features are names that the reader fills in; tests/test_export.py runs
# this Python for every kind of input that an adapter has.


def adapter_usage(form: str, config: EncoderConfig, published: str | None) -> str:
    """Markdown for the formats of export.py; `published` names a file under a published family's keys."""
    names = "`SDXL` is the base, a folder or an id of the hub, and `FOLDER` is this folder."
    if form == "infinite_id":
        return f"{names}\n\n{_python(_OURS)}"
    features = dict(config.needs.fields)
    if config.needs.empty_image:
        features["empty_clip_hidden_states"] = features["clip_hidden_states"]
    said = [names, _features(config, features)]
    if form == "diffusers":
        given = ", ".join(f"{name}={name}" for name in features)
        said += ["In two streams, by the code in this folder:", _python(_RUNTIME.format(given=given))]
    if published:
        said += _comfyui(config, published) if form == "comfyui" else []
        said += ["In one stream, by diffusers as it is:", _python(_load_ip_adapter(config, published))]
        if isinstance(config, PublishedConfig) and config.lora_rank:
            said.append("diffusers leaves the LoRA in the file out where PEFT is not installed (`pip install peft`).")
    return "\n\n".join(said)


def base_usage(dtype: str, single_file: str | None) -> str:
    """Markdown for a whole base: a folder in diffusers' layout, or a single file of this name."""
    if single_file is None:
        return f"`FOLDER` is this folder.\n\n{_python(_BASE.format(dtype=dtype))}"
    return (
        f"Put `{_line(single_file)}` into ComfyUI's `models/checkpoints`, or name it to sample.py as `--model`. "
        "diffusers reads the file too, with `StableDiffusionXLPipeline.from_single_file`. The file was not tried in "
        "ComfyUI."
    )


_OURS = """
from infinite_id_jax import InfiniteIDPipeline

pipe = InfiniteIDPipeline.from_pretrained(SDXL, adapter=FOLDER)
person = pipe.encode_identity("person.jpg")
image = pipe("a photo of a person in the snow", person, steps=30).images[0]
"""

_RUNTIME = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(SDXL, custom_pipeline=FOLDER, trust_remote_code=True)
pipe.load_infinite_id(FOLDER)
person = pipe.encode_identity({given})
image = pipe.sample("a photo of a person in the snow", person, steps=30).images[0]
"""

_BASE = """
import torch
from diffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER, torch_dtype=torch.{dtype})
image = pipe("a photo of a person in the snow", num_inference_steps=30).images[0]
"""

_FEATURES = {
    "clip_hidden_states": "the {layer} hidden states of CLIP's image encoder",
    "clip_pooled": "CLIP's projected image embedding",
    "face_embedding": "the face recogniser's embedding, of length 1",
    "empty_clip_hidden_states": "the same as clip_hidden_states of an image of zeros, which stands for nobody",
}


def _features(config: EncoderConfig, fields: Mapping[str, tuple[str | int, ...]]) -> str:
    """What the names in the code stand for."""
    lines = [
        f"- `{name}` [{', '.join(map(str, shape))}]: {_FEATURES[name].format(layer=config.needs.clip_layer)}"
        for name, shape in fields.items()
    ]
    return "\n".join(["What it sees of a face, as tensors of PyTorch in the dtype of the base:", "", *lines])


def _load_ip_adapter(config: EncoderConfig, name: str) -> str:
    """Nobody and the person are rows of each input (diffusers' pipeline: negative first)."""
    needs = config.needs
    hidden = "empty_clip_hidden_states" if needs.empty_image else "torch.zeros_like(clip_hidden_states)"
    lines = [
        "import torch",
        "from diffusers import StableDiffusionXLPipeline",
        "",
        "pipe = StableDiffusionXLPipeline.from_pretrained(SDXL)",
        f'pipe.load_ip_adapter(FOLDER, subfolder="", weight_name="{name}", image_encoder_folder=None)',
    ]
    if isinstance(config, FaceIDPlusConfig):
        lines.append("projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]")
        if config.shortcut_scale is not None:
            lines.append(f"projection.shortcut, projection.shortcut_scale = True, {config.shortcut_scale}")
        lines.append(f"projection.clip_embeds = torch.stack([{hidden}, clip_hidden_states])[:, None]")
    seen = "face_embedding" if needs.face_dim else "clip_pooled" if needs.clip_layer == "pooled" else None
    nobody, person = (f"torch.zeros_like({seen})", seen) if seen else (hidden, "clip_hidden_states")
    lines += [
        f"pair = torch.stack([{nobody}, {person}])[:, None]",
        'prompt = "a photo of a person in the snow"',
        "image = pipe(prompt, ip_adapter_image_embeds=[pair], num_inference_steps=30).images[0]",
    ]
    return "\n".join(lines)


def _comfyui(config: EncoderConfig, name: str) -> list[str]:
    said = [
        f"Put `{name}` into ComfyUI's `models/ipadapter` and load it with a node of `ComfyUI_IPAdapter_plus`: names "
        "and sizes are those that its source reads. It was not run in ComfyUI."
    ]
    if isinstance(config, PublishedConfig) and config.lora_rank:
        said.append("The LoRA in the file is not used there: FaceID's own LoRA file goes into `models/loras`.")
    if isinstance(config, AdapterConfig) and config.needs.clip_dim:
        said.append("ComfyUI takes CLIP's answer to a black image for nobody; this adapter was trained with zeros.")
    return said


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"
