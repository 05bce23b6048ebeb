"""The reader of pickled weights: bit-equal to torch.load, and deaf to everything else that a pickle can ask for."""

import collections
import functools
import importlib
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infinite_id_jax.errors import InputError
from infinite_id_jax.weights.load import Tensor, open_tensors
from infinite_id_jax.weights.pickles import open_pickle


def flat(tree: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix[:-1]: tree}
    items = tree.items() if isinstance(tree, dict) else ()
    return {name: tensor for key, value in items for name, tensor in flat(value, f"{prefix}{key}.").items()}


def whole(tensor: Tensor) -> np.ndarray:
    return tensor.read(tuple(slice(None) for _ in tensor.shape))


def assert_as_torch_loads(path: Path, **options: Any) -> None:
    """Bit for bit, shapes and dtypes too."""
    ours, theirs = open_pickle(path), flat(torch.load(path, **({"weights_only": True} | options)))
    assert ours.keys() == theirs.keys()
    assert theirs
    for key, tensor in theirs.items():
        array = whole(ours[key])
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
        assert ours[key].shape == array.shape == tuple(tensor.shape)
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
        assert array.tobytes() == bits.numpy().tobytes(), key


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def state_dicts() -> dict[str, Any]:
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    return {
        "dtypes": {str(dtype): (10 * x).to(dtype) for dtype in DTYPES},
        "a module's": module.state_dict(),  # an OrderedDict with _metadata
        "parameters": {"p": torch.nn.Parameter(x), "frozen": torch.nn.Parameter(x.bfloat16(), requires_grad=False)},
        "views": {"t": x.transpose(0, 2), "part": x[2:4, 1:, ::2], "row": x[3], "one": x[5, 4, 3], "all": x},
        "small": {"scalar": torch.tensor(3.5), "empty": torch.empty(0), "no rows": torch.empty(0, 7)},
        "nested": {"image_proj": {"proj.weight": x}, "ip_adapter": {"1": {"to_k": x[0]}, "3": {"to_k": x[1]}}},
        "beside": {
            "state_dict": {"x": x},
            "epoch": 3,
            "lr": 1e-4,
            "note": "αβ",
            "steps": [1, 2],
            "none": None,
            7: x[0],
        },
    }


@pytest.mark.parametrize("name", state_dicts())
def test_equal_to_torch_load(tmp_path, name):
    torch.save(state_dicts()[name], tmp_path / "x.bin")
    assert_as_torch_loads(tmp_path / "x.bin")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path, protocol):
    torch.save(state_dicts()["a module's"], tmp_path / "x.pt", pickle_protocol=protocol)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        # torch's own restricted reader knows no protocol above 3.
        assert_as_torch_loads(tmp_path / "x.pt", weights_only=protocol < 4)


def test_parts_are_read_alone(tmp_path):
    x = torch.randn(8, 6)
    torch.save({"x": x.T}, tmp_path / "x.bin")
    part = open_pickle(tmp_path / "x.bin")["x"].read((slice(1, 3), slice(4, 8)))
    np.testing.assert_array_equal(part, x.T[1:3, 4:8])
    part[:] = 0  # a copy: the file stays as it is
    assert_as_torch_loads(tmp_path / "x.bin")


def test_written_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state_dicts()["views"], tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_as_torch_loads(tmp_path / "x.bin")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_opened_as_weights(tmp_path, suffix):
    """Under today's names, like any other file of weights."""
    path = tmp_path / f"model{suffix}"
    x = torch.randn(3, 2)
    torch.save({"text_model.a.weight": x, "text_model.embeddings.position_ids": torch.arange(3)}, path)
    with ExitStack() as stack:
        tensors = open_tensors(path, stack)
        assert tensors.keys() == {"a.weight"}
        np.testing.assert_array_equal(whole(tensors["a.weight"]), x)


# Pickles that ask for more


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class Dict(collections.OrderedDict):
    """A subclass of what is allowed."""


def gadgets(marker: Path) -> dict[str, tuple[Any, str]]:
    """{kind: (object, the name it is refused by)}; where the object calls something, that makes `marker`."""
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Calls(os.system, f"touch {marker}"), "posix.system"),
        "eval": (Calls(eval, write), "builtins.eval"),
        "exec": (Calls(exec, write), "builtins.exec"),
        "open": (Calls(open, str(marker), "w"), "io.open"),
        "method": (Calls(marker.touch), "builtins.getattr"),
        "import": (Calls(importlib.import_module, "this"), "importlib.import_module"),
        "partial": (Calls(functools.partial, exec, write), "functools.partial"),
        "torch.load": (Calls(torch.load, str(marker)), "torch.serialization.load"),
        "subclass": (Dict(a=1), "tests.test_pickles.Dict"),
        "numpy": (np.float32(1), "numpy._core.multiarray.scalar"),
        "device": (torch.device("cpu"), "torch.device"),
        "inside": ({"x": 1.5, "y": [({"z": Calls(exec, write)},)]}, "builtins.exec"),
        "in a key": ({("a", Calls(exec, write)): 1}, "builtins.exec"),
        "as state": (Calls(collections.OrderedDict, state={"x": Calls(exec, write)}), "builtins.exec"),
    }


@pytest.mark.parametrize("how", ["zip", "plain", "protocol 5"])
@pytest.mark.parametrize("kind", gadgets(Path("unused")))
def test_code_is_not_run(tmp_path, kind, how):
    marker, path = tmp_path / "ran", tmp_path / "weights.bin"
    harmful, name = gadgets(marker)[kind]
    if how == "zip":
        torch.save(harmful, path)
    else:
        path.write_bytes(pickle.dumps(harmful, 2 if how == "plain" else int(how[-1])))
    with pytest.raises(InputError) as error:
        open_pickle(path)
    assert not marker.exists()
    said = str(error.value).replace("__builtin__", "builtins")  # Python 2's name, which protocols up to 2 write
    assert said.startswith(f"{path} asks for {name}, ")


def test_a_forbidden_name_is_shown_without_harm(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x80\x04\x8c\x02os\x8c\x09\x1b[31msys\n" + b"\x93.")
    with pytest.raises(InputError, match=r"asks for os\.\\x1b\[31msys\\n,"):
        open_pickle(path)


def test_the_oldest_protocol(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "weights.bin"
    path.write_bytes(f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(InputError, match=r"asks for posix\.system"):
        open_pickle(path)
    assert not marker.exists()


def test_the_gadgets_would_run(tmp_path):
    """What the test above proves is worth something only if pickle itself would run them."""
    for kind in ("os.system", "eval", "exec", "method", "inside", "as state"):
        marker = tmp_path / kind
        pickle.loads(pickle.dumps(gadgets(marker)[kind][0]))
        assert marker.exists(), kind


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        open_pickle(tmp_path / "x.pt")


# Pickles and archives that no torch.save writes


def rewrite(
    source: Path, out: Path, *, drop: str = "", compression: int = zipfile.ZIP_STORED, **entries: bytes
) -> Path:
    """The archive again with some entries ("data_pkl" is data.pkl) of another content, all checksums right."""
    changed = {name.replace("_", "."): content for name, content in entries.items()}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            short = name.partition("/")[2]
            if short != drop:
                new.writestr(name, changed.get(short, old.read(name)))
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "weights.bin"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.ones(4).bfloat16()}}, path)
    return path


OPEN_DICT, TENSOR = b"\x80\x02}", b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
"""A storage that claims %c numbers."""


def tensor_of(size: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """{"x": a tensor} as torch would write it, of whatever numbers."""
    numbers = [pickle.dumps(part, 2)[2:-1] for part in (offset, shape, strides)]
    call = b"(" + STORAGE % size + b"".join(numbers) + b"\x89}tR"
    return OPEN_DICT + b"X\x01\x00\x00\x00x" + TENSOR + call + b"s."


def test_the_hand_made_tensor_is_one(saved, tmp_path):
    path = rewrite(saved, tmp_path / "x.bin", data_pkl=tensor_of(6, 1, (2, 2), (2, 1)))
    np.testing.assert_array_equal(whole(open_pickle(path)["x"]), [[1, 2], [3, 4]])


def eight_times(memo: int) -> bytes:
    """{"a": d, ..., "h": d} of the dict d in `memo`, kept in the next."""
    items = b"".join(b"X\x01\x00\x00\x00" + bytes([key, 0x68, memo]) for key in b"abcdefgh")
    return b"}q" + bytes([memo + 1]) + b"(" + items + b"u"


HOSTILE = {
    "beyond its storage": tensor_of(6, 1, (2, 3), (3, 1)),
    "a stride beyond": tensor_of(6, 0, (2, 2), (100, 1)),
    "negative": tensor_of(6, 4, (2,), (-1,)),
    "negative offset": tensor_of(6, -1, (2,), (1,)),
    "a storage that claims more": tensor_of(200, 0, (200,), (1,)),
    "terabytes of one number": tensor_of(6, 0, (2**40,), (0,)),
    "more than numpy counts": tensor_of(6, 0, (2**70, 0), (1, 1)),
    "unequal lengths": tensor_of(6, 0, (2, 3), (1,)),
    "numbers that are none": tensor_of(6, 0, (True, True), (1, 1)),
    "a storage without a tensor's shape": OPEN_DICT + b"X\x01\x00\x00\x00x" + TENSOR + b"(" + STORAGE % 6 + b"tRs.",
    "no storage": OPEN_DICT + TENSOR + b"(K\x00K\x00))tR.",
    "a persistent id in one": OPEN_DICT + b"(" + STORAGE % 6 + b"tQ.",
    "a text persistent id": b"Pstorage\n.",
    "a memo never put": b"\x80\x02h\x05.",
    "a name as the content": b"\x80\x02ccollections\nOrderedDict\n.",
    "a name with state": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "OrderedDict of items": b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
    "an instance": b"(icollections\nOrderedDict\n.",
    "an object": b"\x80\x02(ccollections\nOrderedDict\no.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a deep key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",  # overflows the C stack when hashed
    "a long key": b"\x80\x02}X" + struct.pack("<I", 2000) + b"x" * 2000 + b"K\x01s.",
    "a dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00s.",
    "dicts without end": b"\x80\x02}q\x00" + b"".join(map(eight_times, range(14))) + b".",
    "a list": b"\x80\x02].",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "nothing on the stack": b".",
    "a cut text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a huge number": b"I" + b"9" * 10_000 + b"\n.",
    "large": b"\x80\x02}" + b"]" * (4 * 2**20) + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles(saved, tmp_path, kind):
    path = rewrite(saved, tmp_path / "x.bin", data_pkl=HOSTILE[kind])
    with pytest.raises(InputError) as error:
        open_pickle(path)
    assert str(path) in str(error.value)
    assert "get the safetensors version" in str(error.value)


def test_a_huge_memo_costs_nothing(saved, tmp_path):
    """pickle's own reader would make room for four thousand million entries."""
    path = rewrite(saved, tmp_path / "x.bin", data_pkl=b"\x80\x02}r\xff\xff\xff\xff.")
    assert open_pickle(path) == {}


def read_all(path: Path) -> list[np.ndarray]:
    return [whole(tensor) for tensor in open_pickle(path).values()]


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_all(path)
    assert str(path) in str(error.value)


def test_archives_of_another_kind(saved, tmp_path):
    x = tmp_path / "x.bin"
    refused(rewrite(saved, x, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(rewrite(saved, x, drop="data/1"), "data/1 is missing")
    refused(rewrite(saved, x, drop="data.pkl"), "none that torch.save wrote")
    refused(rewrite(saved, x, byteorder=b"big"), "big-endian")
    torch.save({"a": torch.ones(2)}, x, _use_new_zipfile_serialization=False)
    refused(x, "before PyTorch 1.6")
    for content in (b"", b"PK", b"\x93NUMPY", b"<html>not found</html>", b"PK\x03\x04"):
        x.write_bytes(content)
        refused(x, "no PyTorch file|not a whole PyTorch file")
    refused(tmp_path / "absent.bin", "cannot be read")


def test_damage_is_found(saved, tmp_path):
    """A flipped bit of a weight changes its checksum; a cut file has no directory."""
    content, x = bytearray(saved.read_bytes()), tmp_path / "x.bin"
    x.write_bytes(content[:-30])
    refused(x, "not a whole PyTorch file")
    at = content.index(np.arange(6, dtype="<f4").tobytes())
    content[at + 5] ^= 1
    x.write_bytes(content)
    refused(x, "data/0 does not have its checksum")


def test_sizes_that_lie(saved, tmp_path):
    """The directory claims a gigabyte, or another place, for an entry of 24 bytes."""
    content, x = saved.read_bytes(), tmp_path / "x.bin"
    at = content.rindex(b"data/0") - content[content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0")) :].index(
        b"data/0"
    )
    for field, value in ((20, 2**30), (24, 2**30), (42, 7), (42, 2**31)):
        lying = bytearray(content)
        struct.pack_into("<I", lying, at + field, value)
        if field == 20:
            struct.pack_into("<I", lying, at + 24, value)
        x.write_bytes(lying)
        refused(x, "get the safetensors version|fetch it again")


def test_random_damage_never_escapes(saved, tmp_path):
    """An InputError or arrays, whatever bytes are changed: in the file, and in the pickle behind its checksum."""
    rng, path = random.Random(0), tmp_path / "x.bin"
    with zipfile.ZipFile(saved) as archive:
        instructions = archive.read("weights/data.pkl")
    outcomes: collections.Counter[str] = collections.Counter()
    for turn in range(600):
        damaged = bytearray(instructions if turn % 2 else saved.read_bytes())
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if turn % 10 < 2:
            del damaged[rng.randrange(len(damaged)) :]
        if turn % 2:
            rewrite(saved, path, data_pkl=bytes(damaged))
        else:
            path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickletools, over escapes in texts
            try:
                read_all(path)
                outcomes["read"] += 1
            except InputError:
                outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 30
