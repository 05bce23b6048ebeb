"""The benchmark scripts run, and measure what they say they measure."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.__main__
from benchmarks import (
    cold_start,
    compare,
    kernels,
    memory,
    models,
    pod_programs,
    pods,
    sampling,
    shortcuts,
    training_step,
    unet_forward,
    vae_decode,
)
from benchmarks.full_size_unet import main, parameter_shapes, relative_error
from benchmarks.meter import Meter, Phase, in_fresh_process
from infinite_id_jax.stable_diffusion import quantized

ROOT = Path(__file__).parents[1]
MEGABYTE = 2**20


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("full_size_unet")
    done = run(
        "benchmarks.full_size_unet",
        *("--size", "tiny", "--repeats", "3"),
        *("--json", str(folder / "report.json"), "--keep-weights", str(folder)),
    )
    assert done.returncode == 0, done.stderr
    assert "first forward" in done.stdout
    assert (folder / "tiny" / "config.json").exists()
    return json.loads((folder / "report.json").read_text())


def test_unet_agrees_with_diffusers(report: dict):
    error = report["rows"][-1]["error"]
    assert 0 < error <= 2e-5  # measured 1.8e-6; 0 would mean that something was compared with itself
    assert 0.1 < report["output_scale"] < 100


def test_unet_report_has_every_phase_of_both_sides(report: dict):
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["load", "compile", "first forward", "forward"]
    for name, row in rows.items():
        assert row["ours_s"] > 0
        assert row["peak_bytes"] >= row["anonymous_peak_bytes"] > MEGABYTE
        if name == "compile":
            assert row["peer_s"] is row["ratio"] is row["peer_peak_bytes"] is None
        else:
            assert row["ratio"] == pytest.approx(row["ours_s"] / row["peer_s"])
            assert row["peer_peak_bytes"] >= row["peer_anonymous_peak_bytes"] > MEGABYTE
    assert len(rows["forward"]["ours_runs_s"]) == len(rows["forward"]["peer_runs_s"]) == 3
    assert rows["load"]["anonymous_growth_over_weights"] > 0
    assert report["first_output_s"] > rows["compile"]["ours_s"]


def test_meter_sees_a_copy_that_is_gone_at_the_end():
    """In a process of its own: in this one others may give memory back meanwhile."""
    program = """
import time
import numpy as np
from benchmarks.meter import Meter
meter = Meter()
with meter.phase("copy"):
    copy = np.ones(64 * 2**20, np.uint8)
    time.sleep(0.5)
    del copy
phase = meter.phases["copy"]
print(phase.anonymous - phase.anonymous_before, len(phase.seconds))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    grown, runs = map(int, done.stdout.split())
    assert grown > 60 * MEGABYTE
    assert runs == 1


def test_meter_does_not_take_a_mapped_file_for_a_copy(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(64 * MEGABYTE))
    meter = Meter()
    with meter.phase("map"):
        np.memmap(tmp_path / "file", np.uint8, "r").sum()
    phase = meter.phases["map"]
    assert phase.resident - phase.anonymous > 60 * MEGABYTE
    assert phase.anonymous - phase.anonymous_before < 30 * MEGABYTE


def test_phase_gives_the_median():
    assert Phase(seconds=[1.0, 9.0, 2.0]).median == 2.0


def test_relative_error_is_nan_where_an_output_is():
    assert math.isnan(relative_error(np.array([1.0, np.nan]), np.ones(2)))
    assert relative_error(np.array([1.0, 3.0]), np.array([1.0, 4.0])) == 0.25


def test_repeats_below_one_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--repeats", "0"])
    assert stop.value.code == 2
    assert "give 1 or more" in capsys.readouterr().err


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (unet_forward, ["forward, 1 x 128 px", "forward, 2 x 128 px"]),
        (vae_decode, ["decode, 1 x 128 px"]),
        (sampling, ["text-to-image, 2 steps", "two streams, 2 identities"]),
        (training_step, ["step, 2 x 128 px, remat none"]),
    ],
    ids=lambda x: x.__name__.rpartition(".")[2] if hasattr(x, "__name__") else "",
)
def test_both_sides_do_the_same_work(module, names, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "PEOPLE", (2,))
    options = ["--size", "tiny", "--repeats", "2", "--keep-weights", str(weights), "--json", str(tmp_path / "out.json")]
    assert compare.main(module.__name__, module.__doc__, module.cases, options) == 0
    assert names[0] in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["rows"]] == names
    assert report["ceiling_tflops"] > 0
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(row["ours_s"] / row["peer_s"])
        assert row["tflops"] > 0
        assert row["peak_bytes"] > MEGABYTE
        if module is training_step:
            assert row["error"] is None  # each side draws its own noise
        else:
            assert 0 < row["error"] <= 2e-5  # measured: 2.3e-6


def test_all_go_on_where_they_were_and_end_in_tables(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(ROOT)
    options = ["--output-dir", str(tmp_path), "--size", "tiny", "--repeats", "1", "vae_decode"]
    assert benchmarks.__main__.main(options) == 0
    figures = tmp_path / "cpu-tiny" / "vae_decode.json"
    before = figures.stat().st_mtime_ns
    (row,) = json.loads(figures.read_text())["rows"]
    (tmp_path / "cpu-tiny" / "tables.md").unlink()
    assert benchmarks.__main__.main(options) == 0
    assert figures.stat().st_mtime_ns == before
    assert f"| decode, 1 x 128 px | {row['ours_s']:.4g} s |" in (tmp_path / "cpu-tiny" / "tables.md").read_text()
    assert {path.name for path in figures.parent.iterdir()} == {"vae_decode.json", "tables.md"}  # no weights

    assert benchmarks.__main__.main([*options, "--device", "gpu"]) == 1
    said = capfd.readouterr().err
    assert "JAX sees no GPU" in said
    assert "Failed, as said above: vae_decode." in said


def test_on_a_gpu_calls_are_queued_and_none_of_the_first_counts(monkeypatch):
    """A clock that moves by an eighth of a second with each call, and by nothing for waiting."""
    called, waited = [0, 0], []

    def call(side):
        called[side] += 1
        return np.ones(1)

    monkeypatch.setattr(compare, "wait", waited.append)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: sum(called) / 8)
    row = compare.measure_case(compare.Case("queued", lambda: call(0), lambda: call(1)), 3, 1.0, "gpu")
    assert called == [3 + 3 * 4] * 2  # compared, warmed up twice, and three times as many calls as 0.4 s take
    assert len(waited) == 2 * (3 + 3)
    assert row["ours_runs_s"] == [0.125] * 3


def test_a_row_that_fails_is_named_and_what_was_measured_stays(tmp_path, capsys):
    def cases(run):
        yield compare.Case("good", lambda: np.ones(3), lambda: np.full(3, 2.0))
        yield compare.Case("bad", lambda: np.ones(3), lambda: 1 // 0)
        yield compare.Case("short", lambda: np.ones(3), lambda: np.ones(3))
        raise RuntimeError("out of memory")

    file = tmp_path / "out.json"
    options = ["--size", "tiny", "--repeats", "3", "--keep-weights", str(tmp_path), "--json", str(file)]
    assert compare.main("benchmarks.none", "", cases, options) == 1
    report = json.loads(file.read_text())
    good, bad, short, last = report["rows"]
    assert len(good["ours_runs_s"]) == len(short["peer_runs_s"]) == 3
    assert good["error"] == 0.5
    assert bad == {"name": "bad", "failed": "ZeroDivisionError: integer division or modulo by zero"}
    assert last == {"name": "the next", "failed": "RuntimeError: out of memory"}
    assert not report["complete"]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_memory_of_both_sides_is_read(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "PEOPLE", ())
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *inputs: function(*inputs))  # as tested above
    file = tmp_path / "out.json"
    peaks = iter((2.0, 4.0, 9.0, 3.0))
    monkeypatch.setattr(memory, "_peak_of_process", lambda: next(peaks))
    assert memory.main(["--size", "tiny", "--keep-weights", str(weights), "--json", str(file)]) == 0
    rows, printed = json.loads(file.read_text())["rows"], capsys.readouterr().out
    assert [row["name"] for row in rows] == ["text-to-image, 2 steps", memory.TRAINING]
    assert [row["ratio"] for row in rows] == [0.5, 3.0]
    assert all(row["name"] in printed for row in rows)


def test_every_shortcut_changes_the_picture(weights, tmp_path, monkeypatch):
    monkeypatch.delitem(quantized.KINDS, "float8")  # as tests/test_quantized.py has it
    options = ["--size", "tiny", "--repeats", "1", "--keep-weights", str(weights), "--json", str(tmp_path / "out.json")]
    assert compare.main("benchmarks.shortcuts", "", shortcuts.cases, options) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 4
    assert len({row["error"] for row in rows[:2]}) == 2  # of two steps, every second is every third
    assert all(row["error"] > 1e-3 for row in rows)


def test_every_layer_is_compared_in_both_forms_and_directions(weights, tmp_path):
    options = ["--size", "tiny", "--repeats", "1", "--keep-weights", str(weights), "--json", str(tmp_path / "out.json")]
    assert compare.main("benchmarks.kernels", "", kernels.cases, options) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    forms = ["", ", XLA's", " and gradient", " and gradient, XLA's"]
    layers = ("attention 1x16x16, 2 heads", "convolution 1x4x4, 16 to 32")
    layers += ("doubling and convolution 1x4x4x16", "GroupNorm 1x4x4x32")
    assert [row["name"] for row in rows] == [layer + form for layer in layers for form in forms]
    assert all(0 <= row["error"] < 1e-5 for row in rows)  # measured: 8.4e-7


def test_both_sides_of_a_layer_give_all_gradients(weights):
    """What a program does not give, XLA does not compute."""
    run = compare.Run("cpu", "tiny", weights, compile_peer=False)
    moving = {"attention": 3, "convolution": 1, "doubling": 1, "GroupNorm": 1}
    for case in kernels.cases(run):
        if "gradient" in case.name:
            inputs = moving[case.name.split()[0]]
            assert (len(case.ours()), len(case.peer())) == (inputs + 1, inputs)  # ours and the value


def test_the_clock_stops_when_a_gpu_is_done(monkeypatch):
    class Remote(torch.Tensor):
        is_cuda = True

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    compare.wait((torch.zeros(1), np.zeros(1)))
    assert not waited
    compare.wait((torch.zeros(1), torch.zeros(1).as_subclass(Remote)))
    assert waited == [True]


def test_a_compiled_peer_is_compiled_for_each_shape_by_itself(weights):
    seen = []

    def backend(graph, inputs):
        seen.append([x if isinstance(x, torch.SymInt) else tuple(x.shape) for x in inputs])
        return graph.forward

    peer = torch.compile(lambda x: x + 1, backend=backend)

    def cases(run):
        for n in (3, 5, 7):
            yield compare.Case(str(n), lambda n=n: np.ones(n), lambda n=n: peer(torch.zeros(n)))

    compare.measure(compare.Run("cpu", "tiny", weights, compile_peer=True), cases, 1)
    assert seen == [[(3,)], [(5,)], [(7,)]]


def test_the_training_peer_computes_transformer_blocks_again_and_nothing_else(weights, monkeypatch):
    again, checkpoint = [], torch.utils.checkpoint.checkpoint

    def noting(module, *inputs, **options):
        again.append(type(module).__name__)
        return checkpoint(module, *inputs, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", noting)
    monkeypatch.setitem(training_step.REMAT, "tiny", "blocks")
    run = compare.Run("cpu", "tiny", weights, compile_peer=False)
    assert training_step.peer_step(run, training_step.make_batch(run, 128))() > 0
    config = models.SIZES["tiny"].settings.unet
    down = config.transformer_layers_per_block[1:]  # SDXL's first level has none
    layers = config.layers_per_block
    blocks = layers * sum(down) + (layers + 1) * sum(down) + down[-1]
    assert again == ["BasicTransformerBlock"] * blocks


@pytest.mark.alone
def test_each_process_loads_its_own_part(tmp_path):
    done = run("benchmarks.sharded_load", "--size", "tiny", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["process 0", "process 1"]
    shapes = parameter_shapes(models.SIZES["tiny"].settings.unet).values()
    weights = sum(2 * math.prod(shape) for shape in shapes)
    for row in report["rows"]:
        assert weights / 2 < row["held_bytes"] < 0.6 * weights  # vectors, which all devices have whole, are few
        assert row["growth_bytes"] > row["held_bytes"]


def test_a_new_process_draws_the_peers_image_and_keeps_its_programs(weights, tmp_path):
    run = compare.Run("cpu", "tiny", weights, compile_peer=False)
    ours = in_fresh_process(cold_start.first_image, run, tmp_path / "kept")
    assert any((tmp_path / "kept").iterdir())
    assert ours.shape == (1, 128, 128, 3)
    assert 0 < compare.relative_error(ours, cold_start.first_image_of_peer(run)) < 5e-5  # measured: 3.6e-6


def test_weights_whose_writing_was_stopped_are_finished(tmp_path):
    run = compare.Run("cpu", "tiny", tmp_path, compile_peer=False)
    folder = models.write(run)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    (folder / "adapter" / "adapter.safetensors").unlink()
    assert models.write(run) == folder
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


def test_a_missing_peer_names_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert compare.main("benchmarks.unet_forward", "", unet_forward.cases, []) == 2
    assert "needs the extra `test`" in capsys.readouterr().err


def test_a_missing_gpu_is_one_sentence(capsys):
    assert compare.main("benchmarks.unet_forward", "", unet_forward.cases, ["--device", "gpu"]) == 2
    assert capsys.readouterr().err == "JAX sees no GPU: install the extra cuda, or take --device cpu.\n"


def test_traffic_is_read_off_a_compiled_program():
    """Of 8 chips: rings send (n - 1) / n of the whole array, an all-reduce twice that."""
    lines = {
        "%a = bf16[1024,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}": 3 / 4 * 16384,
        "%b = f32[128,8]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}": 7 / 8 * 32768,
        "%c = (f32[1024]{0}, f32[]) all-reduce(%x, %y), to_apply=%add": 2 * 7 / 8 * 4100,
        "%d = (f32[64]{0}, f32[512]{0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}": 7 / 8 * 2048,
        "%e = u32[16]{0} collective-permute(%x), source_target_pairs={{0,1}}": 64,
        "%g = ((f32[8]{0}, f32[16]{0}), (f32[64]{0}, f32[128]{0})) all-gather-start(%x, %y)": 7 / 8 * 768,
        "%h = (f32[1024]{0}, f32[512]{0}) all-reduce-start(%x, %y), to_apply=%add": 2 * 7 / 8 * 6144,
        "%i = ((bf16[1024,8]), bf16[256,8]) reduce-scatter-start(%x), "
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add": 3 / 4 * 16384,
        "%f = f32[4096]{0} fusion(%a), calls=%all-gather-like": 0,
        "%j = f8e4m3fn[4096]{0} all-to-all(%x), replica_groups=[2,4]<=[8]": 3 / 4 * 4096,
    }
    for line, expected in lines.items():
        assert pods.traffic(line, 8).bytes_sent == pytest.approx(expected)
    total = pods.traffic("\n".join(lines), 8)
    assert total.bytes_sent == pytest.approx(sum(lines.values()))
    assert total.counts == {
        "all-gather": 3,
        "reduce-scatter": 2,
        "all-reduce": 2,
        "collective-permute": 1,
        "all-to-all": 1,
    }


def test_an_all_reduce_of_which_each_chip_keeps_its_part_is_a_reduce_scatter():
    """As libtpu writes it: a fusion of its own kind."""
    text = """
%all-reduce-scatter.3 (param_0.1: f32[1024,8]) -> f32[128,8] {
  %all-reduce.7 = f32[1024,8]{1,0} all-reduce(%param_0.1), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main.9 (param: f32[1024,8]) -> f32[128,8] {
  %fusion.2 = f32[128,8]{1,0} fusion(%param), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    assert pods.traffic(text, 8) == (7 / 8 * 32768, 0, {"reduce-scatter": 1})
    assert pods.traffic(text.replace("{{0,1,2,3,4,5,6,7}}", "{{0,1},{2,3},{4,5},{6,7}}"), 8).between_pairs == 16384


def test_a_pod_too_small_is_a_row_that_says_so(monkeypatch, tmp_path, capsys):
    def full(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G hbm.\nLargest buffers: ...")

    monkeypatch.setattr(pods, "find_compiler", lambda platform: None)
    monkeypatch.setattr(pods, "make_mesh", lambda *_: None)
    monkeypatch.setattr(pods, "compile_training", full)
    options = ["--target", "v5e-16", "--layout", "fsdp", "--json", str(tmp_path / "pods.json")]
    assert pods.main(options) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("blocks  RESOURCE_EXHAUSTED: 20G of 16G hbm.")
    assert pods.main([*options, "--plot", str(tmp_path / "pods.png")]) == 2
    assert "There is nothing to plot" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "pods.json").read_text())["rows"]
    assert row["chips"] == 16


def test_pods_that_a_file_knows_are_not_compiled_again(tmp_path, capsys):
    """Nor is a compiler of theirs asked for, which this machine need not have."""
    row = {"program": "train", "layout": "fsdp", "size": "full", "rows": 4.0, "resolution": 1024, "remat": "blocks"}
    row |= {"memory_bytes": 3 * 2**30, "held_bytes": 2**30, "memory_free_share": 0.8, "tflop_per_chip": 79.0}
    row |= {"bytes_sent_per_chip": 1e10, "collectives": {"all-gather": 388}, "steps": 1}
    row |= {"step_s_overlapped": 0.7, "step_s_in_turn": 0.8}
    rows = [row | {"name": f"v5e-{chips}", "chips": chips, "images": 4 * chips} for chips in (16, 256)]
    file, picture = tmp_path / "pods.json", tmp_path / "pods.png"
    file.write_text(json.dumps({"rows": rows}))
    options = ["--target", "v5e-16", "v5e-256", "--layout", "fsdp", "--json", str(file), "--plot", str(picture)]
    assert pods.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [[f"v5e-{n}", "train", "fsdp"] for n in (16, 256)]
    assert "0.70 to 0.80      80.0" in lines[1]
    with Image.open(picture) as image:
        assert image.size[0] > 1000


def test_pods_name_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(pod_programs.os, "environ", {})
    assert pods.main(["--target", "v5e-16"]) == 2
    assert "pip install libtpu" in capsys.readouterr().err
    assert pods.main(["--target", "h100-8"]) == 2
    assert "install the extra cuda" in capsys.readouterr().err
