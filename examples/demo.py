"""People of the miniature's world in other clothes, places, moods and styles: python -m examples.demo [FOLDER]."""

import sys
from functools import partial
from pathlib import Path

from PIL import Image

from infinite_id_jax import InfiniteIDPipeline, save_image
from infinite_id_jax.command_line import exit_code, keep_compiled
from infinite_id_jax.images import labelled_grid

PEOPLE = Path(__file__).parent / "people"  # test people, whom nothing was trained on
PROMPTS = {  # by what the identity takes over of the text's attention
    "none": (
        "a head-and-shoulders photo of a person in a red hoodie, smiling, on a beach",
        "a head-and-shoulders photo of a person in a spacesuit, looking surprised, in outer space",
    ),
    "adain_mean": (
        "a head-and-shoulders sepia poster of a person in a white striped shirt, looking serious, in a desert",
        "a head-and-shoulders pencil sketch of a person in a tuxedo with a white shirt, winking, in a library",
    ),
}


def main(folder: Path) -> int:
    """Each person in each prompt, in one picture."""
    keep_compiled()
    photos = [Image.open(path) for path in sorted(PEOPLE.glob("*.png"))]
    pipe = InfiniteIDPipeline.from_pretrained("miniature")
    people = [pipe.encode_identity(photo) for photo in photos]
    rows, labels = [photos], ["The one photo given of each"]
    for style_merge, prompts in PROMPTS.items():
        out = pipe(prompts, people, seed=0, steps=12, guidance_rescale=0.7, style_merge=style_merge)
        assert isinstance(out.images, list)
        rows += [out.images[i : i + len(people)] for i in range(0, len(out.images), len(people))]
        labels += prompts
    path = folder / "demo.png"
    save_image(labelled_grid(rows, labels, size=160), path, prompt="; ".join(labels[1:]))
    print(f"{len(people)} people, {len(labels) - 1} prompts: {path}")
    return 0


if __name__ == "__main__":
    run = partial(main, Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo"))
    sys.exit(exit_code(run, debug=False, interrupted="nothing was written.", smaller="close other programs."))
