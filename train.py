"""From photos of people to an adapter: train Infinite-ID's identity encoder over a frozen SDXL."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infinite_id_jax.command_line import exit_code, keep_compiled
from infinite_id_jax.errors import DivergedError, InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from configs.base import TrainConfig
    from data_pipeline.feed import Feeds
    from data_pipeline.loader import Loader
    from infinite_id_jax.training.checkpoint import Checkpoints
    from infinite_id_jax.training.objective import Frozen, Objective
    from infinite_id_jax.training.program import TrainProgram
    from infinite_id_jax.training.signals import StopSignals
    from infinite_id_jax.training.state import TrainState
    from infinite_id_jax.weights.folder import StableDiffusionXL


_SMALLER = "raise optimizer.accumulate, take method.remat=all, or divide the base with model.sharded=True."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when done, 2 for unusable input, 4 if the loss diverged, 130 or 143 if stopped."""
    args = parser().parse_args(argv)
    without = " without --resume none" if args.resume == "none" else ""
    interrupted = f"the same command{without} goes on from the newest checkpoint."
    return exit_code(lambda: run(args), debug=args.debug, interrupted=interrupted, smaller=_SMALLER)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--config", required=True, type=Path, metavar="FILE", help="configs/infinite_id_sdxl.py, ...")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value; repeatable")
    p.add_argument("--output-dir", type=Path, metavar="DIR", help="for checkpoints, metrics.csv and adapter/")
    p.add_argument("--max-steps", type=int, metavar="N", help="instead of run.steps")
    p.add_argument("--resume", default="auto", choices=("auto", "none"), help="none starts anew, the old run put aside")
    p.add_argument("--allow-change", action="store_true", help="resume although model, data or settings changed")
    p.add_argument("--dry-run", action="store_true", help="print parameters, memory and FLOPs; load and write nothing")
    p.add_argument("--profile-steps", type=_range, metavar="A:B", help="trace these steps into DIR/profile")
    p.add_argument("--overfit-batch", action="store_true", help="train on the first batch alone, to see it learned")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    many = p.add_argument_group("several processes")
    many.add_argument("--distributed", action="store_true", help="join them as SLURM, Kubernetes or the TPU pod says")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with the next two")
    many.add_argument("--num-processes", type=int, metavar="N")
    many.add_argument("--process-id", type=int, metavar="I")
    return p


def _range(text: str) -> tuple[int, int]:
    try:
        first, end = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B") from None
    if not 0 <= first < end:
        raise argparse.ArgumentTypeError(f"{text!r} is no range: give 0 <= A < B")
    return first, end


def run(args: argparse.Namespace) -> int:
    """Configuration -> processes -> model and data -> steps -> adapter."""
    from configs.base import load_config

    config = load_config(args.config, args.set)
    if args.max_steps is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=args.max_steps))
    if args.dry_run:
        print(dry_run(config))
        return 0
    if args.output_dir is None:
        raise InputError("A run needs --output-dir DIR for its checkpoints (or --dry-run, which writes nothing).")
    start_processes(args)
    from infinite_id_jax.training.metrics import check_extras
    from infinite_id_jax.training.signals import StopSignals

    check_extras(tensorboard=config.run.tensorboard, wandb=config.run.wandb)

    with StopSignals() as signals:
        return train(prepare(config, args), args, signals)


def start_processes(args: argparse.Namespace) -> None:
    """Join the other processes, and keep compiled programs for a restart."""
    from infinite_id_jax.training.processes import join

    keep_compiled(args.output_dir / "compiled")
    join(automatic=args.distributed, coordinator=args.coordinator, count=args.num_processes, number=args.process_id)


def prepare(config: "TrainConfig", args: argparse.Namespace) -> "TrainConfig":
    """What must lie on the disk before the model and the data are read: made by the first process alone."""
    import jax

    from infinite_id_jax.training.checkpoint import put_aside
    from infinite_id_jax.training.processes import check_shared

    inputs = args.output_dir / "inputs"
    if jax.process_index() == 0:
        if args.resume == "none":
            put_aside(args.output_dir)
        if config.prepare is not None:
            config.prepare(inputs, config)
    check_shared(args.output_dir / "checkpoints")
    return config if config.prepare is None else config.prepare(inputs, config)


def train(config: "TrainConfig", args: argparse.Namespace, signals: "StopSignals") -> int:
    """Everything into place, then step after step, and what happens between them."""
    import jax

    from infinite_id_jax.sharding import make_mesh
    from infinite_id_jax.training.checkpoint import Checkpoints
    from infinite_id_jax.training.flops import peak_flops
    from infinite_id_jax.training.metrics import Logs, Window
    from infinite_id_jax.training.processes import check_agreement
    from infinite_id_jax.training.profile import Profile

    folder, run = args.output_dir, config.run
    mesh = make_mesh(run.mesh)
    feeds = open_data(config, mesh)
    loader = feeds.train.loader
    config = with_recogniser(config, loader.dataset.spec.face_backend)
    model = load_model(config, mesh, on_device=loader.dataset.spec.id_features == "on_device")
    program = model.program
    described = describe_run(config, model, loader, one_batch=args.overfit_batch)
    with (
        closing(Checkpoints(folder / "checkpoints", run.keep, described)) as checkpoints,
        closing(Profile(folder / "profile", args.profile_steps)) as profile,
    ):
        taken = checkpoints.latest() or 0
        check_agreement({"their newest checkpoint": taken, **described})
        state = checkpoints.restore(program.abstract, allow_change=args.allow_change) if taken else program.first()
        window = Window(
            every=run.log_every,
            images=config.data.batch_size,
            devices=mesh.size,
            peak=peak_flops(mesh.devices.flat[0]),
        )
        logs = Logs(folder, taken, run.steps, window, tensorboard=run.tensorboard, wandb=run.wandb)
        print(f"{taken} of {run.steps} steps are taken; the run lies in {folder}.", file=sys.stderr)
        print(f"Devices: {mesh.size} of {jax.device_count()}; processes: {jax.process_count()}.", file=sys.stderr)
        with closing(feeds.train.batches(taken, run.steps, same=args.overfit_batch)) as batches:
            for batch, waited in batches:
                profile.before(taken, state)
                state, metrics = program.step(state, batch)
                taken += 1
                code = signals.exit_code(taken)
                save = code is not None or taken == run.steps or taken % run.checkpoint_every == 0
                # What a stop has time for is the checkpoint alone.
                check, draw = (code is None and _due(every, taken) for every in (run.validate_every, run.sample_every))
                pause = save or check or draw
                held_out = partial(program.validate, state.result, feeds.held_out()) if check else None
                cost = {"waited": waited, "flops": program.flops(batch)}
                failed_at = logs.add(taken, metrics, **cost, now=pause, held_out=held_out)
                if failed_at is not None:
                    culprit = loader.batch(0 if args.overfit_batch else failed_at)
                    raise DivergedError(save_failure(state, checkpoints, culprit, failed_at, folder))
                if save:
                    checkpoints.save(state, taken)
                if draw:
                    draw_samples(config, model, state, feeds, mesh, folder / "samples" / f"{taken:07}.png")
                if code is not None:
                    without = " without --resume none" if args.resume == "none" else ""
                    print(f"Stopped after {taken} steps: the same command{without} goes on.", file=sys.stderr)
                    return code
                if pause:
                    window.resume()
    save_result(model, state, folder / "adapter")
    print(f"{taken} steps are taken: {folder / 'adapter'}")
    return 0


def _due(every: int, taken: int) -> bool:
    return every > 0 and taken % every == 0


class Model(NamedTuple):
    """The frozen base in its places and the compiled functions of the run."""

    folder: Path
    objective: "Objective"
    frozen: "Frozen"
    program: "TrainProgram"
    base: "StableDiffusionXL | None"  # whole, where samples are to be drawn
    vision: Path | None  # where the CLIP image encoder is from, if features are made on the device


def open_data(config: "TrainConfig", mesh: "Mesh") -> "Feeds":
    """The dataset's splits. Raises InputError if its features are not those the adapter takes, or if the devices do not
    divide a batch.
    """
    from data_pipeline.feed import open_feeds
    from data_pipeline.loader import LoaderConfig
    from infinite_id_jax.sharding import batch_sharding
    from infinite_id_jax.training.setup import check_rows
    from infinite_id_jax.weights.folder import load_tokenizers, read_settings, resolve

    data, adapter, model = config.data, config.adapter, resolve(config.model.path)
    check_rows(data.batch_size, config.optimizer.accumulate, mesh)
    feeds = open_feeds(
        Path(data.path),
        LoaderConfig(
            batch_size=data.batch_size,
            seed=config.run.seed,
            photos_per_person_cap=data.photos_per_person_cap,
            captions=config.method.entangled,
            workers=data.workers,
            prefetch=data.prefetch,
        ),
        batch_sharding(mesh),
        validation_batches=config.run.validation_batches if config.run.validate_every else 0,
        tokenizers=load_tokenizers(model) if config.method.entangled else None,
    )
    spec = feeds.train.loader.dataset.spec
    for name in ("clip_dim", "clip_layer", "face_dim"):
        if getattr(spec, name) != getattr(adapter, name):
            raise InputError(
                f"The dataset {data.path} has {name} {getattr(spec, name)} and the adapter {getattr(adapter, name)}: "
                f"set adapter.{name}={getattr(spec, name)}, or make the dataset with other encoders."
            )
    if spec.latent_channels != (channels := read_settings(model).unet.in_channels):
        raise InputError(
            f"{data.path} has latents of {spec.latent_channels} channels, {model} of {channels}: make them anew."
        )
    return feeds


def with_recogniser(config: "TrainConfig", name: str) -> "TrainConfig":
    """The adapter told whose face embeddings it learns from. Raises InputError if it names another's."""
    named = config.adapter.recogniser
    if named not in (None, name):
        raise InputError(
            f"The dataset {config.data.path} has face embeddings of {name} and adapter.recogniser is {named}: leave "
            "that out, or make the dataset with that face backend."
        )
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, recogniser=name))


def load_model(config: "TrainConfig", mesh: "Mesh", on_device: bool) -> Model:
    """The U-Net, and the encoders that this run needs beside it."""
    from infinite_id_jax.training.program import TrainProgram
    from infinite_id_jax.training.setup import base_sharding, make_objective
    from infinite_id_jax.weights import folder as files

    folder = files.resolve(config.model.path)
    settings = files.read_settings(folder)
    config.adapter.check_fits(settings.unet.cross_attention_dim)
    where: dict[str, Any] = {"dtype": config.model.dtype, "sharding": base_sharding(mesh, config.model.sharded)}
    base = files.load_base(folder, **where) if config.run.sample_every else None
    text = None
    if config.method.entangled:
        text = base.text_encoders if base else files.load_text_encoders(folder, settings, **where)
    vision = Path(config.model.image_encoder or files.image_encoder_beside(folder))
    objective, frozen = make_objective(
        config.method,
        config.adapter,
        settings.schedule,
        settings.vae.scaling_factor,
        base.unet if base else files.load_unet(folder, settings, **where),
        vision=files.load_image_encoder(vision, **where) if on_device else None,
        text=text,
    )
    program = TrainProgram(objective, config.adapter, config.optimizer, frozen, mesh, config.run.seed)
    return Model(folder, objective, frozen, program, base, vision if on_device else None)


def describe_run(config: "TrainConfig", model: Model, loader: "Loader", *, one_batch: bool = False) -> dict[str, Any]:
    """What a checkpoint must agree with: all that changes what is learned."""
    from infinite_id_jax.files import fingerprint

    method = {name: value for name, value in dataclasses.asdict(config.method).items() if name != "remat"}
    more: dict[str, Any] = {"one_batch": True} if one_batch else {}
    more |= {"image_encoder": fingerprint(model.vision)} if model.vision else {}
    texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2") if config.method.entangled else ()
    parts = ("unet", "scheduler", "vae/config.json", *texts) if model.folder.is_dir() else ("",)  # of one file, all
    return {
        "model": {part: fingerprint(model.folder / part) for part in parts},
        "dtype": config.model.dtype,
        "adapter": config.adapter.to_dict(),
        "method": method,
        "optimizer": dataclasses.asdict(config.optimizer),
        "data": loader.identity(),
        **more,
    }


def save_failure(
    state: "TrainState", checkpoints: "Checkpoints", batch: dict[str, Any], failed_at: int, folder: Path
) -> str:
    """Keep this process's rows of the batch whose loss was not finite, and the state before it; returns what to tell
    the user.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from infinite_id_jax.files import replacing

    part = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = folder / f"failed_step_{failed_at}{part}.npz"
    arrays: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in batch.items()}  # npz has no bfloat16
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)
    checkpoints.save(dataclasses.replace(state, failed_at=jnp.full_like(state.failed_at, -1)), failed_at)
    checkpoints.wait()
    return (
        f"The loss of step {failed_at} was not finite: its batch is in {path} and the state before it in the newest "
        "checkpoint; look there for bad data, or lower optimizer.learning_rate and go on with --allow-change."
    )


def save_result(model: Model, state: "TrainState", folder: Path) -> None:
    """The adapter folder that sample.py takes: the average where one is kept."""
    import jax

    from infinite_id_jax.sharding import gathered
    from infinite_id_jax.weights.adapter import save_adapter

    arrays = gathered(state.result)
    if jax.process_index() == 0:
        adapter = model.objective.adapter(arrays)
        save_adapter(adapter, folder)


def draw_samples(
    config: "TrainConfig", model: Model, state: "TrainState", feeds: "Feeds", mesh: "Mesh", path: Path
) -> None:
    """A grid of held-out people (without a validation split, of the training's) x prompts with today's adapter."""
    import jax
    import numpy as np

    from infinite_id_jax import FaceFeatures
    from infinite_id_jax.images import save_png
    from infinite_id_jax.previews import preview
    from infinite_id_jax.sharding import gathered
    from infinite_id_jax.training.objective import hidden_states

    dataset = (feeds.validation or feeds.train).loader.dataset
    first = {person: i for i, person in reversed(list(enumerate(dataset.people)))}
    records = [dataset[i] for i in sorted(first.values())[: config.run.sample_people]]
    cached = dataset.spec.id_features == "cached"
    feature = "clip_hidden_states" if cached else "clip_crop"
    stacked = {feature: jax.numpy.asarray(np.stack([getattr(record, feature) for record in records]))}
    hidden = gathered(hidden_states(model.objective, model.frozen, stacked))
    people = [FaceFeatures(states, record.face_embedding) for states, record in zip(hidden, records, strict=True)]
    adapter = model.objective.adapter(gathered(state.result))
    crops, prompts = [record.clip_crop for record in records], config.run.sample_prompts
    if model.base is None:
        raise ValueError("Samples need the whole base.")
    grid = preview(model.base, adapter, people, crops, prompts, steps=config.run.sample_steps, mesh=mesh)
    if jax.process_index() == 0:
        save_png(grid, path, {})


def dry_run(config: "TrainConfig") -> str:
    """The budget of an identity-enhanced step on the configured mesh, from the shapes of `model.path` or, where that is
    not at hand, of `model.architecture`.
    """
    from infinite_id_jax.sharding import abstract_mesh
    from infinite_id_jax.training.budget import make_budget
    from infinite_id_jax.training.setup import abstract_inputs, check_rows
    from infinite_id_jax.weights.folder import read_settings, resolve

    path = config.model.path
    here = path == "miniature" or (path and Path(path).expanduser().exists())  # the hub is not asked
    architecture = read_settings(resolve(path)).unet if here else config.model.architecture
    mesh = abstract_mesh(config.run.mesh)
    check_rows(config.data.batch_size, config.optimizer.accumulate, mesh)
    inputs = abstract_inputs(
        architecture,
        config.adapter,
        dataclasses.replace(config.method, entangled=False),
        config.optimizer,
        mesh,
        rows=config.data.batch_size,
        resolution=config.data.resolution,
        dtype=config.model.dtype,
        sharded=config.model.sharded,
    )
    budget = make_budget(*inputs, mesh, config.optimizer.accumulate)
    source = path if here else f"the configuration's shapes ({path or 'no path'} is not here)"
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = f"{config.data.batch_size} rows of {config.data.resolution} px"
    note = "\n-1 is counted as one device: give the sizes in run.mesh." if "-1" in config.run.mesh else ""
    return f"U-Net of {source}; {rows} on {sizes}{note}\n{budget.text}"


if __name__ == "__main__":
    sys.exit(main())
