"""The whole path on a real photograph with random weights: python -m examples.demo [FOLDER]."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import sample
from examples import tiny_sdxl
from infinite_id_jax import InfiniteIDPipeline
from infinite_id_jax.images import labelled_grid

PROMPTS = ("a photo of a woman in the snow", "a comic book drawing of a woman")


def main(folder: Path) -> int:
    """Find the face in NASA's portrait of Eileen Collins, encode it, draw, and show each stage in one picture."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(data.astronaut())
    photo.save(folder / "photo.png")
    tiny_sdxl.write_model(folder / "model")
    tiny_sdxl.write_adapter(folder / "adapter", face_dim=128)
    print("RANDOM WEIGHTS: no trained weights are public yet. The face is really found; the images are noise.")
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    images = folder / "images"
    code = sample.main(
        [
            *("--id-image", str(folder / "photo.png"), "--output-dir", str(images), *prompts),
            *("--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--faces", "offline"),
            *("--steps", "10", "--style-merge", "adain_mean", "--save-aligned", "--overwrite"),
        ]
    )
    if code:
        return code
    pipe = InfiniteIDPipeline.from_pretrained(folder / "model", folder / "adapter", faces="offline")
    tokens = np.asarray(pipe.encode_identity(folder / "photo.png").tokens)
    print(f"Identity tokens c_id: {tokens.shape[0]} x {tokens.shape[1]}, the last one from the face recogniser.")
    drawn = [Image.open(path) for path in sorted(images.glob("prompt*.png"))]
    stages = [photo, Image.open(images / "aligned0-clip.png"), _heatmap(tokens), *drawn]
    overview = labelled_grid([stages], ["photo, aligned face, identity tokens, images drawn with RANDOM WEIGHTS"])
    overview.save(folder / "demo.png")
    print(f"All stages in one picture: {folder / 'demo.png'}")
    return 0


def _heatmap(tokens: np.ndarray) -> Image.Image:
    """Tokens down, channels across; blue is negative, red positive."""
    value = np.clip(tokens / 3, -1, 1)
    red, blue = 1 + np.minimum(value, 0), 1 - np.maximum(value, 0)
    rgb = np.stack([red, np.minimum(red, blue), blue], axis=-1)
    return Image.fromarray((255 * rgb).astype(np.uint8)).resize((256, 256), Image.Resampling.NEAREST)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo")))
