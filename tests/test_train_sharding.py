"""One device, eight, and two processes of four learn the same; a checkpoint of one layout goes on in another."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import train
from benchmarks import kill
from infinite_id_jax.sharding import batch_sharding, make_mesh, rows_of_process, to_devices

ROOT = Path(__file__).parent.parent
STEPS = 12
TOLERANCE = 4e-6  # of losses about 1; measured over all layouts and both processes: 2.4e-7
LAYOUTS = {
    "data": ["--set=run.mesh=data=8"],
    "fsdp": ["--set=run.mesh=fsdp=8", "--set=model.sharded=True"],
    "all": ["--set=run.mesh=data=2,fsdp=2,tensor=2", "--set=model.sharded=True"],
}


@pytest.fixture(scope="module")
def inputs(debug_inputs):
    return debug_inputs


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, inputs):
    return run(tmp_path_factory.mktemp("one"), inputs, STEPS)


def options(inputs, steps, layout):
    rarely = ["--set=run.checkpoint_every=6", "--set=run.validate_every=0"]
    return [*inputs, "--max-steps", str(steps), *rarely, *layout]


def run(folder, inputs, steps, layout=()):
    """The losses of a run in this process, which has 8 devices."""
    command = ["--config", "configs/debug.py", "--output-dir", str(folder), *options(inputs, steps, layout)]
    assert train.main(command) == 0
    return losses(folder)


def losses(folder):
    return np.array([float(loss) for _, loss in kill.learned(folder)[1]])


def start_two(folder, inputs, steps, layout=LAYOUTS["all"], second=()):
    """Two processes of four devices each, which find each other on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"}
    command = kill.training_command(folder, steps, *options(inputs, steps, layout))
    command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    return [
        subprocess.Popen(
            [*command, str(i), *(second if i else ())],
            cwd=ROOT,
            env=os.environ | flags,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def ends(processes):
    """Exit codes and what was said."""
    said = [process.communicate()[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


@pytest.mark.parametrize("layout", ["data", "all"])
def test_eight_devices_learn_as_one(one_device, inputs, tmp_path, layout):
    found = run(tmp_path, inputs, STEPS, LAYOUTS[layout])
    np.testing.assert_allclose(found, one_device, atol=TOLERANCE, rtol=0)


def test_a_checkpoint_goes_on_in_another_layout(one_device, inputs, tmp_path):
    run(tmp_path, inputs, STEPS // 2, LAYOUTS["fsdp"])
    np.testing.assert_allclose(run(tmp_path, inputs, STEPS), one_device, atol=TOLERANCE, rtol=0)


@pytest.mark.alone
def test_two_processes_stop_at_one_step_and_learn_as_one(one_device, inputs, tmp_path):
    """SIGTERM to one of them, as a preemption comes, stops both after the same step."""
    processes = start_two(tmp_path, inputs, 1000)
    while kill.steps_taken(tmp_path) < 3 and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ends(processes)
    assert codes == [128 + signal.SIGTERM] * 2, said
    taken = kill.steps_taken(tmp_path)
    assert said.count(f"Stopped after {taken} steps") == 2
    assert said.count("Devices: 8 of 8; processes: 2.") == 2
    codes, said = ends(start_two(tmp_path, inputs, max(STEPS, taken)))
    assert codes == [0, 0], said
    np.testing.assert_allclose(losses(tmp_path)[:STEPS], one_device, atol=TOLERANCE, rtol=0)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("layout", "second", "says"),
    [
        (["--set=run.mesh=data=1"], [], "takes 1 of 8 devices, none of them of process [1]: give one axis -1"),
        (LAYOUTS["all"], ["--set=optimizer.learning_rate=1"], "The processes differ in optimizer: give all of them"),
    ],
    ids=["mesh", "settings"],
)
def test_processes_that_do_not_fit_together_all_say_so(inputs, tmp_path, layout, second, says):
    codes, said = ends(start_two(tmp_path, inputs, 2, layout, second))
    assert codes == [2, 2], said
    assert said.count(says) == 2


def test_rows_go_to_their_devices():
    sharding = batch_sharding(make_mesh("data=2,fsdp=2,tensor=2"))
    rows = rows_of_process(sharding, 8)
    assert rows == list(range(8))
    placed = to_devices({"x": np.arange(16).reshape(8, 2)}, sharding, 8, rows)["x"]
    np.testing.assert_array_equal(placed, np.arange(16).reshape(8, 2))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
