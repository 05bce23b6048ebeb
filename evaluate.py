"""From adapters to measured claims: draw what a study asks for, let judges score it, write tables and a report."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinite_id_jax.command_line import INTERRUPTED, exit_code, keep_compiled
from infinite_id_jax.errors import InputError, NoFaceError

if TYPE_CHECKING:
    import numpy as np

    from infinite_id_jax import Identity, InfiniteIDPipeline
    from infinite_id_jax.evaluation.study import Method, StudyConfig
    from infinite_id_jax.evaluation.world import Person, Prompt, World

INTERPOLATED = 2  # prompts, the first two photographs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when done, 2 for unusable input, 3 for a photo without a face, 130 if interrupted."""
    args = parser().parse_args(argv)
    return exit_code(
        lambda: run(args),
        debug=args.debug,
        interrupted="the same command goes on from here.",
        smaller="take a smaller --group.",
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--config", required=True, type=Path, metavar="FILE", help="configs/miniature.py, ...")
    p.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="for metrics.json, report.html, ...")
    p.add_argument("--identities", type=int, metavar="N", help="people (default: the study's)")
    p.add_argument("--prompts", type=int, metavar="N", help="texts (default: the study's)")
    p.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the study's)")
    p.add_argument("--group", type=int, metavar="N", help="identities that one text row serves (default: the study's)")
    p.add_argument("--methods", nargs="+", metavar="NAME", help="only these of the study's methods, and their claims")
    p.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="draw the I-th of N parts, beside others")
    p.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="another folder for an adapter")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", i from 1 to n."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} is no part: give I/N, such as 1/2 and, in another process, 2/2.")
    return int(number), int(of)


def run(args: argparse.Namespace) -> int:
    """Configuration -> pictures -> scores -> tables -> report."""
    from tqdm import tqdm

    from configs.base import load_study
    from infinite_id_jax.evaluation import figures
    from infinite_id_jax.evaluation.judged import Judged
    from infinite_id_jax.evaluation.study import DRAWN, INTERPOLATION, MIXING, REFERENCE, TEXT_ONLY
    from infinite_id_jax.evaluation.summary import write_results

    figures.check()
    study = changed(load_study(args.config), args)
    check(study)
    world = study.world()
    people, prompts = world.people(study.identities), world.prompts(study.prompts)
    settle(study, world, people, prompts, args.output_dir)
    keep_compiled()
    judged = Judged(world, people, prompts, study.group, args.output_dir, args.part)
    judged.check()
    pipes = Pipelines(study, people)
    for method in tqdm(study.methods, "methods", unit="method"):
        for p, prompt in enumerate(tqdm(prompts, method.name, unit="prompt", leave=False)):
            settings = method.photo if prompt.style == "photo" else method.style
            if settings is not None:
                more = partial(pipes.given, method) if method.shrink > 1 else None
                judged.method(method.name, p, partial(pipes.draw, method, prompt, p, settings), more)
    for p, prompt in enumerate(tqdm(prompts, "bounds", unit="prompt")):
        judged.method(TEXT_ONLY, p, partial(pipes.draw_text, prompt, p))
        judged.method(REFERENCE, p, lambda: judged.photos)
        judged.method(DRAWN, p, partial(judged.drawn, prompt))
    judged.base(study.base_pictures, pipes.draw_base)
    photographs = [p for p, prompt in enumerate(prompts) if prompt.style == "photo"][:INTERPOLATED]
    if photographs and study.interpolation_weights:
        between = partial(pipes.draw_between, prompts)
        judged.between(INTERPOLATION, study.interpolation_weights, between, photographs)
        judged.between(MIXING, [None], between, photographs)
    made_of = settle(study, world, people, prompts, args.output_dir)  # whose files may have been changed meanwhile
    if args.part != (1, 1):
        print(f"Part {args.part[0]} of {args.part[1]} is drawn: when all are, the same command without --part sums up.")
        return 0
    paths = write_results(study, judged.results(), made_of, args.output_dir)
    print(f"Done: {', '.join(map(str, paths))}")
    return 0


def changed(study: "StudyConfig", args: argparse.Namespace) -> "StudyConfig":
    """The study with what the command line says instead. Raises InputError for what it does not know."""
    given = {name: getattr(args, name) for name in ("identities", "prompts", "group", "steps")}
    for name, value in given.items():
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}: give 1 or more.")
    steps = given.pop("steps")
    study = dataclasses.replace(study, **{name: value for name, value in given.items() if value is not None})
    if steps is not None:
        study = dataclasses.replace(study, sampling={**study.sampling, "steps": steps})
    if args.methods:
        from infinite_id_jax.evaluation.study import DRAWN, REFERENCE, TEXT_ONLY

        known = {method.name for method in study.methods}
        if unknown := sorted(set(args.methods) - known):
            raise InputError(f"--methods {', '.join(unknown)}: choose from {', '.join(sorted(known))}.")
        kept = {*args.methods, TEXT_ONLY, REFERENCE, DRAWN}
        methods = tuple(method for method in study.methods if method.name in kept)
        claims = tuple(claim for claim in study.claims if {claim.first, claim.second} <= kept)
        study = dataclasses.replace(study, methods=methods, claims=claims)
    adapters = dict(study.adapters)
    for setting in args.adapter:
        name, equals, folder = setting.partition("=")
        if not equals or name not in adapters:
            raise InputError(f"--adapter {setting} is not of the form NAME=DIR with a NAME of {', '.join(adapters)}.")
        adapters[name] = folder
    used = {method.adapter for method in study.methods}
    return dataclasses.replace(study, adapters={name: path for name, path in adapters.items() if name in used})


def check(study: "StudyConfig") -> None:
    """Raises InputError for a model or an adapter that cannot be used, before hours are spent on another one."""
    from infinite_id_jax.stable_diffusion.quantized import checked_kind
    from infinite_id_jax.weights.adapter import check_adapter
    from infinite_id_jax.weights.folder import describe_base, resolve

    for method in study.methods:
        checked_kind(method.quantization)
    unet = describe_base(resolve(study.model)).unet
    for path in study.adapters.values():
        check_adapter(Path(path), unet)


def settle(
    study: "StudyConfig", world: "World", people: "Sequence[Person]", prompts: "Sequence[Prompt]", folder: Path
) -> dict[str, Any]:
    """Note what is measured in DIR/study.json; the fingerprints of its weights.

    Raises InputError where the folder holds scores of another study.
    """
    from infinite_id_jax.files import fingerprint, save_json
    from infinite_id_jax.weights.folder import resolve

    made_of = {
        "model": fingerprint(resolve(study.model)),
        "adapters": {name: fingerprint(Path(path)) for name, path in sorted(study.adapters.items())},
        "world": world.name,
    }
    content = made_of | {
        "identities": [person.name for person in people],
        "prompts": [prompt.text for prompt in prompts],
        "group": study.group,
        "sampling": dict(study.sampling),
        "faces": study.faces if isinstance(study.faces, str) else study.faces.name,
        "interpolation_weights": study.interpolation_weights,
        "base_prompts": [prompt.text for prompt in world.random_prompts(study.base_pictures)],
        "methods": {
            m.name: [m.adapter, _plain(m.photo), _plain(m.style), m.shrink, m.quantization] for m in study.methods
        },
    }
    path = folder / "study.json"
    scored = path.is_file() and (folder / "scores").is_dir()
    if scored and json.loads(path.read_text()) != json.loads(json.dumps(content)):
        raise InputError(f"{folder} holds another study's scores: choose another --output-dir, or delete it.")
    save_json(content, path)
    return made_of


def _plain(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if settings is None else dict(settings)


class Pipelines:
    """The model with one adapter and precision at a time, everybody as that adapter sees them, and what is drawn."""

    def __init__(self, study: "StudyConfig", people: "Sequence[Person]") -> None:
        self._study, self._people = study, people
        self._loaded: dict[tuple[str, str], tuple[InfiniteIDPipeline, dict[int, list[Identity]]]] = {}
        # XLA does not come back before a picture ends; in a thread of its own it lets this one hear Ctrl-C.
        self._worker = ThreadPoolExecutor(1)

    def draw(self, method: "Method", prompt: "Prompt", p: int, settings: Mapping[str, Any]) -> "np.ndarray":
        """Everybody in one prompt."""
        import numpy as np

        which = method.adapter, method.quantization
        identities = self._load(*which)[1][method.shrink]
        size = min(self._study.group, len(identities))
        found = []
        for g, start in enumerate(range(0, len(identities), size)):
            some = identities[start : start + size]
            padded = some + some[-1:] * (size - len(some))  # one shape, one program
            images = self._call(which, prompt.text, padded, seed=seed(p, g), **settings)
            found.append(images[: len(some)])
        return np.concatenate(found)

    def given(self, method: "Method") -> list[dict[str, float]]:
        """Whether a face was found in each person's photo, of a method that makes it smaller."""
        identities = self._load(method.adapter, method.quantization)[1][method.shrink]
        return [{"photo_face": float(identity.face is not None)} for identity in identities]

    def draw_text(self, prompt: "Prompt", p: int) -> "np.ndarray":
        """The text stream's own pictures, one for each group, shown to all of its people."""
        import numpy as np

        size = min(self._study.group, len(self._people))
        groups = range(-(-len(self._people) // size))
        texts = [prompt.text] * len(groups)
        images = self._call(self._for_text(), texts, None, seed=[seed(p, g) for g in groups])
        return np.repeat(images, size, axis=0)[: len(self._people)]

    def draw_base(self, prompts: "Sequence[Prompt]", start: int) -> "np.ndarray":
        """A picture of each prompt, by the text alone."""
        seeds = [10**6 + start + i for i in range(len(prompts))]
        return self._call(self._for_text(), [prompt.text for prompt in prompts], None, seed=seeds)

    def draw_between(
        self, prompts: "Sequence[Prompt]", first: int, weights: Sequence[float | None], p: int
    ) -> "np.ndarray":
        """Pictures on the way from one person's tokens to the next's (Fig. 14); None: both side by side (Fig. 13)."""
        method = self._study.methods[0]
        which = method.adapter, method.quantization
        pipe, identities = self._load(*which)
        both = identities[1][first : first + 2]
        mixed = [pipe.mix_identities(both, None if weight is None else [1 - weight, weight]) for weight in weights]
        return self._call(which, prompts[p].text, mixed, seed=seed(p, first // 2), **(method.photo or {}))

    def _for_text(self) -> tuple[str, str]:
        """For text alone, of which every adapter draws the same: one that is loaded, in full precision."""
        full = [which for which in self._loaded if which[1] == "none"]
        return next(iter(full), (next(iter(self._study.adapters)), "none"))

    def _call(self, which: tuple[str, str], *args: Any, **settings: Any) -> "np.ndarray":
        import numpy as np

        pipe, _ = self._load(*which)
        every = {**self._study.sampling, **settings, "output": "numpy"}
        images = self._worker.submit(pipe, *args, **every).result().images
        assert isinstance(images, np.ndarray)
        return np.rint(images * 255).astype(np.uint8)

    def _load(self, adapter: str, quantization: str) -> "tuple[InfiniteIDPipeline, dict[int, list[Identity]]]":
        """The pipeline and {how much smaller the photos were made: everybody}, encoded before anything is drawn."""
        from infinite_id_jax import InfiniteIDPipeline

        which = adapter, quantization
        if which not in self._loaded:
            self._loaded.clear()
            path = self._study.adapters[adapter]
            pipe = InfiniteIDPipeline.from_pretrained(
                self._study.model, path, faces=self._study.faces, quantization=quantization
            )
            whole = [encoded(pipe, person) for person in self._people]
            identities = {1: whole}
            for by in {method.shrink for method in self._study.methods if method.adapter == adapter} - {1}:
                both = zip(self._people, whole, strict=True)
                identities[by] = [encoded_smaller(pipe, person, by, identity) for person, identity in both]
            self._loaded[which] = pipe, identities
        return self._loaded[which]


def encoded(pipe: "InfiniteIDPipeline", person: "Person") -> "Identity":
    """Somebody as the adapter sees them. Raises NoFaceError, with their name, for a photo without a face."""
    try:
        return pipe.encode_identity(person.photo)
    except NoFaceError:
        raise NoFaceError(f"No face was found in the photo of {person.name}: take --identities before them.") from None


def encoded_smaller(pipe: "InfiniteIDPipeline", person: "Person", by: int, whole: "Identity") -> "Identity":
    """The same of a smaller photo; nobody, whom no face belongs to, where that shows none."""
    from infinite_id_jax.images import shrunk

    try:
        return pipe.encode_identity(shrunk(person.photo, by))
    except NoFaceError:
        return dataclasses.replace(whole, tokens=whole.unconditional, face=None)


def seed(p: int, group: int) -> int:
    """Of the noise of a prompt that a group of people, or a pair, shares."""
    return 1000 * p + group


if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        os._exit(code)  # without waiting for the pictures that were interrupted
    sys.exit(code)
