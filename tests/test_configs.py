"""What an experiment says: values and their bounds, `--set`, files; and what a step of it costs."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import train
from configs.base import SDXL, DataConfig, ModelConfig, RunConfig, TrainConfig, load_config, load_module, load_study
from infinite_id_jax.errors import InputError
from infinite_id_jax.evaluation.study import StudyConfig
from infinite_id_jax.sharding import abstract_mesh
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.training.flops import count_flops, peak_flops, unet_flops
from infinite_id_jax.training.objective import MethodConfig
from infinite_id_jax.training.setup import check_rows
from infinite_id_jax.training.state import OptimizerConfig
from infinite_id_jax.weights.load import abstract

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "configs" / "infinite_id_sdxl.py"


def experiment(*, run: dict | None = None, optimizer: dict | None = None, **data: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path="model"),
        data=DataConfig(**({"path": "data", "batch_size": 4} | data)),
        optimizer=OptimizerConfig(**(optimizer or {})),
        run=RunConfig(**({"steps": 10} | (run or {}))),
    )


# Bounds


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate and eps must be positive"),
        ({"eps": 0.0}, "learning_rate and eps must be positive"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"weight_decay": -0.1}, "weight_decay not negative"),
        ({"accumulate": 0}, "accumulate 1 or more"),
        ({"beta1": 1.0}, "optimizer.beta1 is 1.0"),
        ({"beta2": -0.1}, "optimizer.beta2 is -0.1"),
        ({"ema_decay": 1.0}, "optimizer.ema_decay is 1.0"),
        ({"max_grad_norm": 0.0}, "optimizer.max_grad_norm is 0.0"),
    ],
)
def test_optimiser_bounds(values, says):
    with pytest.raises(InputError, match=says):
        OptimizerConfig(**values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"identity_drop": 1.0}, "method.identity_drop is 1.0"),
        ({"identity_drop": -0.1}, "method.identity_drop is -0.1"),
        ({"min_snr_gamma": 0.0}, "method.min_snr_gamma is 0.0"),
        ({"remat": "some"}, "method.remat 'some': choose from none, dots, blocks, all"),
    ],
)
def test_method_bounds(values, says):
    with pytest.raises(InputError, match=says):
        MethodConfig(**values)


@pytest.mark.parametrize(
    "name", ["steps", "log_every", "checkpoint_every", "keep", "validation_batches", "sample_people"]
)
def test_run_bounds(name):
    with pytest.raises(InputError, match=rf"run.{name} is 0: give 1 or more"):
        experiment(run={name: 0})


@pytest.mark.parametrize(("batch_size", "accumulate"), [(0, 1), (6, 4)])
def test_a_batch_divides_into_its_parts(batch_size, accumulate):
    with pytest.raises(InputError, match=f"data.batch_size {batch_size} must be a positive multiple .* {accumulate}"):
        experiment(batch_size=batch_size, optimizer={"accumulate": accumulate})


# --set


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optimizer.learning_rate=1e-5", 1e-5),
        ("optimizer.learning_rate=1", 1.0),  # an int where a float belongs
        ("optimizer.ema_decay=0.999", 0.999),
        ("optimizer.ema_decay=0", 0.0),
        ("optimizer.max_grad_norm=None", None),
        ("data.batch_size=128", 128),
        ("data.path=runs/1=2/people", "runs/1=2/people"),
        ("data.path=2024", "2024"),  # a name that looks like a number
        ("model.path=None", "None"),  # and one like nothing
        ("model.image_encoder=None", None),
        ("model.image_encoder=1.5", "1.5"),
        ("model.dtype='float32'", "float32"),
        ("model.sharded=True", True),
        ("run.sample_prompts=('a man', 'a dog')", ("a man", "a dog")),
        ("run.sample_prompts=['a man']", ("a man",)),
        ("method.min_snr_gamma=5", 5.0),
        ("model.architecture.norm_num_groups=16", 16),
        ("model.architecture.block_out_channels=(32, 64, 128)", (32, 64, 128)),
        ("model.architecture.transformer_layers_per_block=2", 2),  # int or tuple
        ("model.architecture.transformer_layers_per_block=[1, 1, 2]", (1, 1, 2)),
    ],
)
def test_set_one_value(setting, expected):
    plain, config = load_config(PUBLISHED), load_config(PUBLISHED, [setting])
    path = setting.partition("=")[0].split(".")
    value, changed = config, config
    for name in path:
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)
    for name in path[:-1]:  # everything else is as it was
        changed = getattr(changed, name)
    top, default = getattr(config, path[0]), getattr(plain, path[0])
    assert config == dataclasses.replace(plain, **{path[0]: top})
    names = {
        field.name for field in dataclasses.fields(top) if getattr(top, field.name) != getattr(default, field.name)
    }
    assert names <= {path[1]}


def test_later_settings_win():
    config = load_config(PUBLISHED, ["run.steps=5", "run.seed=3", "run.steps=7"])
    assert (config.run.steps, config.run.seed) == (7, 3)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("run.steps", "--set run.steps is not of the form key=value"),
        ("run.stps=5", "--set run.stps: there is no stps; did you mean steps?"),
        ("optimiser.beta1=0.5", "there is no optimiser; did you mean optimizer?"),
        ("zzz=5", "there is no zzz; choose from model, data, run,"),
        ("=5", "there is no ; choose from model"),
        ("run=5", "--set run: name one value"),
        ("run.steps.more=5", "--set run.steps.more: name one value"),
        ("model.architecture=5", "--set model.architecture: name one value"),
        ("run.steps=many", "--set run.steps=many: the value must be int."),
        ("run.steps=1.5", "--set run.steps=1.5: the value must be int."),
        ("run.steps=", "--set run.steps=: the value must be int."),
        ("run.steps=True", "the value must be int."),
        ("model.sharded=1", "--set model.sharded=1: the value must be bool."),
        ("optimizer.learning_rate=fast", "the value must be float."),
        ("optimizer.ema_decay=none", "the value must be float or NoneType."),
        ("run.sample_prompts=a man", "the value must be tuple"),
        ("run.steps=0", "run.steps is 0: give 1 or more."),
        ("adapter.clip_mapper=conv", "clip_mapper 'conv' is not of mlp, resampler, none"),
        ("adapter.clip_layer=first", "clip_layer 'first' is not of"),
        ("optimizer.accumulate=3", "data.batch_size 64 must be a positive multiple of optimizer.accumulate 3."),
        ("model.architecture.block_out_channels=(32, 64)", "UNetConfig"),
    ],
)
def test_set_refuses(setting, says):
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        load_config(PUBLISHED, [setting])
    assert "\n" not in str(caught.value)


# Files


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("missing.py", None, "does not exist: give a file such as"),
        ("words.txt", "config = 1", "is no Python file: it must end in .py."),
        ("empty.py", "", "must define `config`, a configs.base.TrainConfig."),
        ("number.py", "config = 5", "must define `config`, a configs.base.TrainConfig."),
        ("division.py", "1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("words.py", "to be or", "fails: SyntaxError: invalid syntax"),
        ("bounds.py", "from configs.base import *\nOptimizerConfig(beta1=2.0)", "optimizer.beta1 is 2.0"),
    ],
)
def test_files_that_say_nothing(tmp_path, name, text, says):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=re.escape(says)):
        load_config(path)


def test_the_published_values():
    """Decisions 1, 4, 22, 24: the paper's Sec. 4.1."""
    config = load_config(PUBLISHED)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.warmup_steps) == (
        1e-4,
        0.01,
        0,
    )
    assert (config.data.batch_size, config.run.steps) == (16 * 4, 1_000_000)
    assert (config.adapter.clip_dim, config.adapter.face_dim, config.adapter.face_tokens) == (1664, 512, 1)
    assert config.method == MethodConfig(identity_drop=0.1)
    assert config.optimizer.ema_decay is None


def test_every_configuration_loads():
    files = [path for path in (ROOT / "configs").glob("*.py") if path.name not in ("__init__.py", "base.py")]
    for path in files:
        defined = vars(load_module(path))
        assert {"config", "study"} & defined.keys()
        assert "config" not in defined or isinstance(load_config(path), TrainConfig)
        assert "study" not in defined or isinstance(load_study(path), StudyConfig)


# Floating-point operations


def flops(function, *shapes) -> float:
    return count_flops(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def convolve(x, kernel, **options):
    return lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


CASES = {
    "product": (lambda a, b: a @ b, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
    "batched product": (
        lambda a, b: jnp.einsum("bnij,bnkj->bnik", a, b),
        [(2, 4, 3, 5), (2, 4, 6, 5)],
        2 * 8 * 3 * 6 * 5,
    ),
    "two contracted axes": (lambda a, b: jnp.einsum("ijk,jkl->il", a, b), [(2, 3, 4), (3, 4, 5)], 2 * 2 * 3 * 4 * 5),
    "sum": (lambda a, b: a + b, [(9,), (9,)], 0),
    "convolution": (
        lambda x, k: convolve(x, k, window_strides=(1, 1), padding="SAME"),
        [(2, 8, 8, 3), (3, 3, 3, 16)],
        2 * (2 * 8 * 8 * 16) * (3 * 3 * 3),
    ),
    "strided convolution": (
        lambda x, k: convolve(x, k, window_strides=(2, 2), padding="SAME"),
        [(2, 8, 8, 3), (3, 3, 3, 16)],
        2 * (2 * 4 * 4 * 16) * (3 * 3 * 3),
    ),
    "grouped convolution": (
        lambda x, k: convolve(x, k, window_strides=(1, 1), padding="SAME", feature_group_count=2),
        [(1, 8, 8, 4), (3, 3, 2, 16)],
        2 * (8 * 8 * 16) * (3 * 3 * 2),
    ),
    "transposed convolution": (  # one product for each input pixel, kernel element and pair of channels
        lambda x, k: convolve(x, k, window_strides=(1, 1), padding=((1, 2), (1, 2)), lhs_dilation=(2, 2)),
        [(2, 8, 8, 3), (3, 3, 3, 16)],
        2 * (2 * 16 * 16 * 16) * (3 * 3 * 3) // 4,
    ),
    "loop": (
        lambda a, b: lax.scan(lambda x, _: (x @ b, None), a, None, length=6)[0],
        [(3, 5), (5, 5)],
        6 * 2 * 3 * 5 * 5,
    ),
    "loop in a loop": (
        lambda a, b: lax.fori_loop(0, 3, lambda _, x: lax.fori_loop(0, 2, lambda _, y: y @ b, x), a),
        [(3, 5), (5, 5)],
        3 * 2 * 2 * 3 * 5 * 5,
    ),
    "branch": (  # the larger
        lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b @ b, lambda: a @ b),
        [(3, 5), (5, 5)],
        2 * 2 * 3 * 5 * 5,
    ),
    "compiled": (lambda a, b: jax.jit(jnp.dot)(a, b), [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
    "gradient of a frozen layer": (  # forward, and backward to its input alone
        jax.grad(lambda a, b: jnp.sum(jnp.square(a @ b))),
        [(3, 5), (5, 7)],
        2 * 2 * 3 * 5 * 7,
    ),
    "gradient of a layer that learns": (
        jax.grad(lambda a, b: jnp.sum(jnp.square(a @ b)), argnums=(0, 1)),
        [(3, 5), (5, 7)],
        3 * 2 * 3 * 5 * 7,
    ),
    "what is computed again": (  # counts twice: only what is asked of the device decides
        jax.grad(lambda a, b: jnp.sum(jnp.square(jax.checkpoint(lambda a: jnp.sin(a @ b))(a)))),
        [(3, 5), (5, 7)],
        3 * 2 * 3 * 5 * 7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operations_by_hand(name):
    function, shapes, expected = CASES[name]
    assert flops(function, *shapes) == expected


def test_gradient_of_a_strided_convolution():
    """Forward, and the transposed convolution to its input: the same products."""
    shapes = [(2, 8, 8, 3), (3, 3, 3, 16)]
    forward = lambda x, k: convolve(x, k, window_strides=(2, 2), padding="SAME")  # noqa: E731
    assert flops(jax.grad(lambda x, k: jnp.sum(jnp.square(forward(x, k)))), *shapes) == 2 * flops(forward, *shapes)


@pytest.mark.parametrize(("pixels", "tflop"), [(1024, 6.761), (512, 1.59)])
def test_operations_of_sdxl(pixels, tflop):
    """Those of SDXL 1.0."""
    graph, state = nnx.split(abstract(lambda rngs: UNet2DConditionModel(SDXL, rngs=rngs)))
    assert unet_flops(graph, state, 1, pixels // 8, pixels // 8) == pytest.approx(tflop * 1e12, rel=0.002)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("TPU v5 lite", 197), ("TPU v5p", 459), ("cpu", None)],
)
def test_peaks(kind, tflops):
    class Device:
        device_kind = kind

    assert peak_flops(Device()) == (None if tflops is None else tflops * 1e12)


# A dry run


def figure(report: str, name: str) -> float:
    (line,) = [line for line in report.splitlines() if line.startswith(name)]
    return float(line.removeprefix(name).split()[0].replace(",", ""))


def test_a_dry_run_says_how_it_counts_devices_that_are_not_named(capsys):
    assert train.main(["--config", "configs/debug.py", "--dry-run", "--set", "run.mesh=data=-1"]) == 0
    assert "tensor 1\n-1 is counted as one device" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["miniature", "~/one.safetensors"])
def test_a_dry_run_takes_the_paths_that_a_run_takes(path, tmp_path, monkeypatch, capsys):
    """The package's own model, and a single file in somebody's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one.safetensors").write_bytes(b"cut short")
    code = train.main(["--config", "configs/miniature.py", "--dry-run", "--set", f"model.path={path}"])
    said = capsys.readouterr()
    if path == "miniature":
        assert code == 0
        assert said.out.startswith("U-Net of miniature; ")
    else:
        assert code == 2
        assert "one.safetensors" in said.err


@pytest.mark.parametrize(
    ("mesh", "accumulate", "says"),
    [
        ("data=3", 1, "does not divide over 3 devices with optimizer.accumulate 1: give a multiple of 3."),
        ("data=2,fsdp=2", 4, "data.batch_size 8 does not divide over 4 devices with optimizer.accumulate 4: give a"),
        ("data=2,tensor=4", 8, "over 2 devices with optimizer.accumulate 8: give a multiple of 16."),
    ],
)
def test_each_part_of_a_batch_has_rows_of_every_device(mesh, accumulate, says, capsys):
    settings = ["--set", f"run.mesh={mesh}", "--set", f"optimizer.accumulate={accumulate}"]
    assert train.main(["--config", "configs/debug.py", "--dry-run", *settings]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    check_rows(8, 4, abstract_mesh("data=2,tensor=4"))


def test_the_published_step_without_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(PUBLISHED), "--dry-run", "--set", "run.mesh=data=2,fsdp=8"]) == 0
    report = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "64 rows of 1024 px on data 2, fsdp 8, tensor 1\n" in report
    assert figure(report, "base parameters") == 2_567_463_684
    layers = 10 * 640 + 60 * 1280  # cross-attentions at each width
    mappers = (1664 + 1) * 1664 + (1664 + 1) * 2048 + (512 + 1) * 1024 + (1024 + 1) * 2048 + 4 * 2048
    adapter = 2 * 2048 * layers + mappers
    assert figure(report, "adapter parameters") == adapter
    assert figure(report, "a step, as two forwards of the U-Net") == pytest.approx(2 * 64 * 6.761, rel=0.002)
    assert figure(report, "a step, every product counted") > 2 * 64 * 6.761
    assert figure(report, "frozen models, each device") == pytest.approx(2 * 2_567_463_684 / 2**30, abs=5e-4)
    for name, arrays in (("adapter (fp32)", 1), ("gradient (fp32)", 1), ("optimiser", 2)):
        share = 4 * arrays * adapter / 8 / 2**30  # of the axis fsdp alone; biases are whole, and small
        assert figure(report, f"{name}, each device") == pytest.approx(share, abs=1e-3)
