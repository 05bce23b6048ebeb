"""train.py from end to end on the debug configuration: resume, refusal, stop, divergence, pictures."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import export
import train
from benchmarks import kill
from configs import debug
from configs.base import load_config
from data_pipeline.records import PhotoDataset
from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.sharding import make_mesh
from infinite_id_jax.training import processes
from infinite_id_jax.training.state import TrainState

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs(debug_inputs):
    return debug_inputs


def run(folder, inputs, *options):
    return train.main(["--config", "configs/debug.py", "--output-dir", str(folder), *inputs, *options])


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def edited(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inputs):
    """Four steps at a stretch."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, inputs, "--max-steps", "4", "--set=run.validate_every=2") == 0
    return folder


def test_two_steps_resume_to_four_as_if_never_stopped(whole, inputs, tmp_path):
    options = ("--set=run.validate_every=2",)
    assert run(tmp_path, inputs, "--max-steps", "2", *options) == 0
    assert len(rows(tmp_path)) == 2
    assert run(tmp_path, inputs, "--max-steps", "4", *options) == 0
    assert kill.learned(tmp_path) == kill.learned(whole)
    names = [name for name in rows(whole)[0] if name.startswith(("loss", "validation", "grad"))]
    assert [[row[name] for name in names] for row in rows(tmp_path)] == [
        [row[name] for name in names] for row in rows(whole)
    ]
    before = edited(tmp_path / "checkpoints")
    assert run(tmp_path, inputs, "--max-steps", "4", *options) == 0  # nothing is left to do
    assert edited(tmp_path / "checkpoints") == before
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 3, 4]  # the newest three


def test_metrics_say_what_was_asked(whole):
    table = rows(whole)
    assert [int(row["step"]) for row in table] == [1, 2, 3, 4]
    for row in table:
        bins = [float(row[f"loss_t{i}"]) for i in range(10) if row[f"loss_t{i}"]]
        assert bins
        assert min(bins) <= float(row["loss"]) <= max(bins)
        if row["step"] == "1":  # which starts the clock
            assert row["images_per_second"] == row["tflops"] == row["data_wait"] == ""
        else:
            assert float(row["images_per_second"]) > 0
            assert 0 <= float(row["data_wait"]) <= 1
        assert bool(row["validation_loss"]) == (int(row["step"]) % 2 == 0)


def test_the_adapter_names_the_recogniser_of_its_records(whole, inputs):
    said = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert said["recogniser"] == PhotoDataset(Path(inputs[1].partition("path=")[2]), "train").spec.face_backend != ""


def test_the_adapter_at_the_end_is_what_its_checkpoint_is_exported_as(whole, tmp_path):
    """The average, where one is kept (tests/test_export.py)."""
    assert debug.config.optimizer.ema_decay is not None
    assert export.main(["--checkpoint", str(whole / "checkpoints" / "4"), "--output", str(tmp_path / "out")]) == 0
    files = [load_file(folder / "adapter.safetensors") for folder in (whole / "adapter", tmp_path / "out")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        np.testing.assert_array_equal(value, files[1][key])


def test_the_adapter_goes_into_sampling(whole, inputs):
    model = inputs[0].partition("path=")[2]
    pipe = InfiniteIDPipeline.from_pretrained(model, whole / "adapter")
    rng = np.random.default_rng(0)
    face = FaceFeatures(rng.normal(size=(257, 32)).astype(np.float32), rng.normal(size=32).astype(np.float32))
    out = pipe("a man", pipe.encode_identity(face), steps=1, height=64, width=64, output="latent")
    assert np.isfinite(out.latents).all()


def test_killed_processes_end_as_if_they_had_not_been(inputs, tmp_path):
    """The script that does it twenty times: `python -m benchmarks.kill training`."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill.run_to_end(kill.training_command(whole, 16, *inputs))
    assert kill.kill_training(killed, 2, 16, 3, *inputs) == 2
    assert kill.learned(killed) == kill.learned(whole)


def test_sigterm_saves_and_the_same_command_goes_on(inputs, tmp_path):
    command = kill.training_command(tmp_path, 1000, *inputs, "--set=run.checkpoint_every=1000")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while kill.steps_taken(tmp_path) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    taken = kill.steps_taken(tmp_path)
    assert f"Stopped after {taken} steps: the same command goes on." in said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(taken)]
    assert not (tmp_path / "adapter").exists()
    options = ("--set=run.checkpoint_every=1000", "--max-steps", str(taken + 1))
    assert run(tmp_path, inputs, *options) == 0
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, taken + 2))


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path, capsys):
    options = ("--set=optimizer.learning_rate=1e30", "--max-steps", "8", "--set=run.log_every=4")
    options += ("--set=run.checkpoint_every=100",)
    assert run(tmp_path, inputs, *options) == 4
    said = capsys.readouterr().err
    (saved,) = tmp_path.glob("failed_step_*.npz")
    step = int(saved.stem.rpartition("_")[2])
    assert f"The loss of step {step} was not finite" in said
    assert str(saved) in said
    with np.load(saved) as batch:
        assert batch["latent_mean"].shape == (8, 8, 8, 4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("processes", "name"), [(1, "failed_step_3.npz"), (2, "failed_step_3.process_1.npz")])
def test_each_process_keeps_its_rows_of_a_batch_that_failed(tmp_path, monkeypatch, processes, name):
    class Checkpoints:
        def save(self, state, step):
            assert (int(state.failed_at), step) == (-1, 3)

        def wait(self):
            pass

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "process_index", lambda: processes - 1)
    state = TrainState(step=jnp.int32(3), adapter={}, ema=None, optimizer=None, failed_at=jnp.int32(3))
    said = train.save_failure(state, Checkpoints(), {"latent_mean": np.ones((2, 3))}, 3, tmp_path)
    assert f"its batch is in {tmp_path / name}" in said
    with np.load(tmp_path / name) as batch:
        assert batch["latent_mean"].shape == (2, 3)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate was 0.001 and is 0.1"),
        ("data.batch_size=4", "data.batch_size was 8 and is 4"),
        ("method.identity_drop=0.5", "method.identity_drop was 0.1 and is 0.5"),
        ("run.seed=3", "data.seed was 0 and is 3"),
        ("adapter.face_tokens=2", "adapter.face_tokens was 1 and is 2"),
    ],
)
def test_another_run_is_refused(whole, inputs, option, says, capsys):
    before = edited(whole)
    assert run(whole, inputs, "--max-steps", "6", f"--set={option}") == 2
    said = capsys.readouterr().err
    assert says in said
    assert "--allow-change" in said
    assert edited(whole) == before


def test_a_changed_dataset_is_refused(whole, inputs, tmp_path, capsys):
    from data_pipeline.generated import write_generated

    model = inputs[0].partition("path=")[2]
    write_generated(tmp_path / "data", Path(model), people=4, photos=2, size=64, seed=1)
    assert run(whole, [inputs[0], f"--set=data.path={tmp_path / 'data'}"], "--max-steps", "6") == 2
    assert "data.dataset was" in capsys.readouterr().err


@pytest.fixture
def going_on(whole, tmp_path):
    """A run of four steps, of which 2, 3 and 4 are kept, to do with as one likes."""
    return shutil.copytree(whole, tmp_path / "run")


def test_a_change_that_is_allowed(inputs, going_on, capsys):
    assert run(going_on, inputs, "--max-steps", "5", "--allow-change", "--set=optimizer.learning_rate=1e-4") == 0
    said = capsys.readouterr().err
    assert "warning: The run goes on although optimizer.learning_rate was 0.001 and is 0.0001." in said
    assert said.count("Devices: 1 of 8; processes: 1.\n") == 1


def test_a_change_of_the_states_shape_costs_no_checkpoint(going_on, inputs, capsys):
    assert run(going_on, inputs, "--max-steps", "6", "--allow-change", "--set=optimizer.warmup_steps=2") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "optimizer.warmup_steps was 0 and is 2" in said
    assert "give the old ones" in said
    assert "move" not in said


def test_resume_none_starts_anew_and_loses_nothing(inputs, going_on):
    losses = [row["loss"] for row in rows(going_on)]
    assert run(going_on, inputs, "--max-steps", "2", "--resume", "none") == 0
    assert [row["loss"] for row in rows(going_on)] == losses[:2]
    assert {"2", "3", "4"} <= {path.name for path in (going_on / "checkpoints.1").iterdir()}
    assert (going_on / "metrics.csv.1").is_file()


def test_a_run_over_a_single_file_base_knows_which(inputs, tmp_path):
    config = load_config(ROOT / "configs" / "debug.py", [each.removeprefix("--set=") for each in inputs])
    loader = train.open_data(config, make_mesh("data=1")).train.loader
    said, file = [], tmp_path / "base.safetensors"
    for content in (b"one", b"one", b"another"):
        file.write_bytes(content)
        said.append(train.describe_run(config, train.Model(file, None, None, None, None, None), loader)["model"])
    assert said[0] == said[1] != said[2]


def test_a_damaged_checkpoint_is_named(inputs, going_on, capsys):
    for path in (going_on / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(going_on, inputs, "--max-steps", "5") == 2
    assert f"The checkpoint {going_on}/checkpoints/4 cannot be read" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(inputs, going_on):
    limit = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", limit, *kill.training_command(going_on, 6, *inputs)[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: Checkpoints cannot be written" in done.stderr  # Orbax's threads may print beside it
    kept = (path.name for path in (going_on / "checkpoints").iterdir())
    assert max(int(name) for name in kept if name.isdigit()) == 4
    assert run(going_on, inputs, "--max-steps", "5") == 0


def test_overfit_batch_repeats_the_first_batch(whole, inputs, tmp_path, capsys):
    assert run(tmp_path, inputs, "--max-steps", "2", "--overfit-batch") == 0
    same, usual = rows(tmp_path), rows(whole)
    assert same[0]["loss"] == usual[0]["loss"]
    assert same[1]["loss"] != usual[1]["loss"]
    assert run(tmp_path, inputs, "--max-steps", "3") == 2  # or the rest would go on from what one batch taught
    assert "one_batch" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "none", [], "--dry-run") == 0
    said = capsys.readouterr().out
    assert "a step, as two forwards of the U-Net" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("setting", "module", "extra"),
    [("run.wandb=project", "wandb", "wandb"), ("run.tensorboard=True", "tensorboardX", "tensorboard")],
)
def test_a_missing_extra_is_known_before_anything_is_made(tmp_path, monkeypatch, capsys, setting, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(tmp_path, [], "--set", setting) == 2
    assert f".[{extra}]" in capsys.readouterr().err
    assert not (tmp_path / "inputs").exists()


def test_the_ablation_in_half_precision_with_all_that_is_optional(inputs, tmp_path):
    options = ["model.dtype=bfloat16", "method.entangled=True", "method.min_snr_gamma=5", "method.remat=all"]
    options += ["optimizer.accumulate=2", "optimizer.warmup_steps=2", "optimizer.max_grad_norm=1"]
    options += ["data.workers=1", "run.tensorboard=True", "run.log_every=2"]
    assert run(tmp_path, inputs, "--max-steps", "2", *(f"--set={option}" for option in options)) == 0
    assert all(0.5 < float(row["loss"]) < 2 for row in rows(tmp_path))
    assert next((tmp_path / "tensorboard").glob("events.out.tfevents.*")).stat().st_size > 500


def test_pictures_and_traces(inputs, tmp_path):
    options = ("--set=run.sample_every=3", "--set=run.sample_people=2", "--set=run.sample_steps=2")
    # The trace ends before the picture, whose compilation it would hold too, and be long in writing.
    assert run(tmp_path, inputs, "--max-steps", "3", *options, "--profile-steps", "1:2") == 0
    with Image.open(tmp_path / "samples" / "0000003.png") as grid:
        assert grid.size == (256 + 2 * 260, 132 + 2 * 260)  # two people across, two prompts down
        assert grid.info["AI-generated"] == "true"
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--config", "configs/none.py"], "configs/none.py does not exist"),
        (["--set=optimizer.learning_rat=1"], "did you mean learning_rate"),
        (["--set=model.path=/nowhere"], "/nowhere does not exist"),
        (["--set=data.path=/nowhere"], "/nowhere"),
        (["--set=run.mesh=data=3"], "does not divide"),
        (
            ["--set=run.mesh=data=4", "--set=optimizer.accumulate=4"],
            "with optimizer.accumulate 4: give a multiple of 16",
        ),
        (["--set=adapter.face_dim=64"], "has face_dim 32 and the adapter 64"),
        (["--set=adapter.recogniser=insightface"], "adapter.recogniser is insightface: leave that out"),
    ],
)
def test_what_a_user_gets_wrong(inputs, tmp_path, options, says, capsys):
    assert run(tmp_path, inputs, "--max-steps", "1", *options) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


SLURM = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, []),
        (SLURM | {"SLURM_NTASKS": "16"}, None),  # a task for each GPU
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_a_task_a_node_takes_all_of_its_gpus(monkeypatch, environment, expected):
    for name in (*SLURM, "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.local_devices() == expected


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        (["--num-processes", "4", "--process-id", "2"], {}, "need --coordinator HOST:PORT"),
        ([], {"SLURM_STEP_NUM_TASKS": "4"}, "add --distributed"),
    ],
)
def test_copies_of_the_program_do_not_each_train_for_themselves(
    inputs, tmp_path, monkeypatch, capsys, options, environment, says
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(tmp_path, inputs, *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_a_meeting_that_cannot_be_is_one_sentence():
    """In a process of its own: where JAX has been used, nothing can be joined."""
    program = """
from infinite_id_jax.errors import InputError
from infinite_id_jax.training.processes import join
for coordinator, count, number in (("here:1", None, None), ("here:1", 2, 2), ("here", 2, 1)):
    try:
        join(automatic=False, coordinator=coordinator, count=count, number=number)
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    says = "is to be HOST:PORT, with --num-processes N and, in each process another, --process-id from 0 to N - 1."
    expected = [f"--coordinator {place} {says}" for place in ("here:1", "here:1", "here")]
    assert done.stdout.splitlines() == expected, done.stderr


def test_slurm_does_not_restrict_jax_to_one_gpu(tmp_path):
    """By JAX itself a task of SLURM would see the GPU of its number within the node alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    task |= {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": str(port)}
    program = (
        "import sys, train; train.start_processes(train.parser().parse_args(sys.argv[1:])); import jax; "
        "print(jax.config._read('jax_cuda_visible_devices'), jax.process_count(), jax.device_count())"
    )
    options = ["--config", "configs/debug.py", "--output-dir", str(tmp_path), "--distributed"]
    command = [sys.executable, "-c", program, *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | task, capture_output=True, text=True)
    assert done.stdout.split() == ["all", "1", "8"], done.stderr


def test_no_output_folder(capsys):
    assert train.main(["--config", "configs/debug.py"]) == 2
    assert "--output-dir" in capsys.readouterr().err
