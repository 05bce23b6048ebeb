"""PyTorch's pickled weights (`.bin`, `.pt`, `.pth`, `.ckpt`), without PyTorch and without running the pickle.

A pickle is a program that may call anything importable. Here it is not run but read, as a language too small for
harm: dicts, lists and tuples of strings and numbers, and the few names that a state dict consists of. Nothing is
imported and nothing is called, so a file that asks for more is refused by the name it asks for.

Limits: torch's zip format (PyTorch 1.6 and newer), little-endian, entries stored and not compressed; a pickle of at
most 4 MiB; dicts nested at most 16 deep, of at most 100,000 entries; tensors no larger than their storage.
Numbers, strings and lists beside the tensors are passed over.
"""

import math
import mmap
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np

from infinite_id_jax.errors import InputError, shown

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# Far above what models need (SDXL whole has 2,515 tensors in half a megabyte of pickle), and harmless to read.
_MAX_PICKLE = 4 * 2**20
_MAX_ENTRIES = 100_000
_MAX_DEPTH = 16
_MAX_KEY = 1000

_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_NAMES = {_ORDERED_DICT, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in [*_DTYPES, *_DTYPES.values()])}


class _Name(NamedTuple):
    """Stands for a global of the pickle; it is never looked up."""

    name: str


class _Storage(NamedTuple):
    """The `size` numbers of the archive's entry data/`key`."""

    key: str
    dtype: np.dtype
    size: int


class PickledTensor:
    """A tensor of a mapped file: its shape, and parts of it on demand."""

    def __init__(self, archive: "_Archive", entry: str, array: np.ndarray):
        self._archive, self._entry, self._array = archive, entry, array
        self.shape: tuple[int, ...] = array.shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of one part. Raises InputError if its storage is damaged."""
        self._archive.check(self._entry)
        return np.array(self._array[index])


def open_pickle(path: Path) -> dict[str, PickledTensor]:
    """{key: tensor} of a file that `torch.save` wrote; keys of nested dicts are joined with ".".

    Raises InputError for a damaged file, for one beyond the limits above and for one that could run code.
    """
    try:
        archive = _Archive(path)
        return _flatten(_Reader(path, archive).read(archive.pickle()))
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is not a whole PyTorch file ({shown(error)}): fetch it again.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the file.") from None
    except Exception as error:  # damaged bytes surface wherever the reading happens to stumble
        raise InputError(f"{path} holds no plain state dict ({shown(error)}): get the safetensors version.") from None


class _Archive:
    """The entries of torch's zip file, mapped into memory."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                raise _not_a_zip(path, file.read(_MAX_PICKLE))
            try:
                with zipfile.ZipFile(file) as directory:
                    self._entries = {info.filename: info for info in directory.infolist()}
            except Exception as error:  # zipfile raises its own zoo of exceptions on damaged bytes
                raise zipfile.BadZipFile(str(error) or type(error).__name__) from None
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._whole: set[str] = set()
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path} is a zip file but none that torch.save wrote: get the safetensors version.")
        self._root = pickles[0].removesuffix("data.pkl")

    def pickle(self) -> bytes:
        """The instructions. Raises InputError if the storages are not little-endian."""
        if f"{self._root}byteorder" in self._entries and bytes(self._content("byteorder")) != b"little":
            raise InputError(f"{self.path} was written on a big-endian machine: get the safetensors version.")
        content = self._content("data.pkl")
        if len(content) > _MAX_PICKLE:
            raise ValueError(f"its pickle has {len(content)} bytes")
        self.check("data.pkl")
        return bytes(content)

    def tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> PickledTensor:
        """A view of a storage, all in elements. Raises ValueError if it reaches beyond."""
        entry, item = f"data/{storage.key}", storage.dtype.itemsize
        content = self._content(entry)
        if storage.size * item > len(content):
            raise ValueError(f"{entry} has {len(content)} bytes instead of {storage.size * item}")
        if math.prod(shape) > storage.size:
            raise ValueError(f"a tensor of shape {list(shape)} has a storage of {storage.size} numbers")
        content = content[: storage.size * item]
        array = np.ndarray(shape, storage.dtype, content, offset * item, tuple(stride * item for stride in strides))
        return PickledTensor(self, entry, array)

    def check(self, entry: str) -> None:
        """Compare the checksum of an entry when it is first read."""
        expected = self._entries[self._root + entry].CRC  # 0 where torch was told to compute none
        if entry in self._whole or expected == 0:
            return
        if zlib.crc32(self._content(entry)) != expected:
            raise InputError(f"{self.path} is damaged: {shown(entry)} does not have its checksum: fetch it again.")
        self._whole.add(entry)

    def _content(self, entry: str) -> memoryview:
        """The bytes where they lie. An entry's data follow its local header, whose lengths are its own."""
        info = self._entries.get(self._root + entry)
        if info is None:
            raise ValueError(f"{entry} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{entry} is compressed, which torch.save never does")
        header = self._bytes[info.header_offset : info.header_offset + 30]
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{entry} is not where the zip directory says")
        name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        start = info.header_offset + 30 + name + extra
        if start + info.file_size > len(self._bytes):
            raise ValueError(f"{entry} reaches beyond the end of the file")
        return memoryview(self._bytes)[start : start + info.file_size]


class _Reader:
    """Reads the pickle's instructions one by one; its stack holds plain data, `_Name`s, storages and tensors."""

    def __init__(self, path: Path, archive: _Archive | None):
        self._path, self._archive = path, archive
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, pickle: bytes) -> Any:
        """What the pickle stands for. Raises InputError for a forbidden name, any other exception for damage."""
        for opcode, argument, _ in pickletools.genops(pickle):
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode == "APPEND" else self._since_mark()
                _of(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if opcode == "SETITEM" else self._since_mark()
                keys = map(_key, items[::2])
                _of(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL" | "STACK_GLOBAL" | "INST":
                stack.append(self._global(argument))
                if opcode == "INST":
                    raise ValueError("it makes an object")
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(self._build(_of(_Name, name).name, _of(tuple, arguments)))
            case "BUILD":  # an OrderedDict's `_metadata`: versions of torch's modules
                stack.pop()
                _of(dict, stack[-1])
            case _:
                raise ValueError(f"its pickle uses {opcode}")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _global(self, argument: str | None) -> _Name:
        if argument is None:  # both parts are on the stack
            attribute, module = self._stack.pop(), self._stack.pop()
            name = f"{_of(str, module)}.{_of(str, attribute)}"
        else:
            name = argument.replace(" ", ".")
        if name not in _NAMES:
            raise InputError(
                f"{self._path} asks for {shown(name)}, which no plain state dict needs: a pickle can run code, "
                "so it was not loaded; get the safetensors version."
            )
        return _Name(name)

    def _build(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == _ORDERED_DICT and not arguments:
            return {}
        if name == _PARAMETER:
            return _of(PickledTensor, arguments[0])
        if name != _TENSOR or self._archive is None:
            raise ValueError(f"it calls {name}")
        storage, offset, shape, strides = arguments[:4]
        numbers = (offset, *_of(tuple, shape), *_of(tuple, strides))
        if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor's shape is damaged")
        return self._archive.tensor(_of(_Storage, storage), offset, shape, strides)


def _storage(persistent: Any) -> _Storage:
    kind, storage, key, _, size = _of(tuple, persistent)
    name = _of(_Name, storage).name.removeprefix("torch.")
    if kind != "storage" or name not in _DTYPES or type(size) is not int or size < 0:
        raise ValueError("a storage is damaged")
    return _Storage(_of(str, key), np.dtype(_DTYPES[name]), size)


def _key(value: Any) -> int | str:
    if type(value) is not int and len(_of(str, value)) > _MAX_KEY:
        raise ValueError(f"a key has {len(value)} letters")
    return value


def _of(kind: type, value: Any) -> Any:
    """`value` if it is exactly of this type: True is no number, and subclasses do not occur."""
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} where {kind.__name__} belongs")
    return value


def _flatten(content: Any) -> dict[str, PickledTensor]:
    """Nested dicts as one. Counts entries, because dicts that hold each other twice grow without bound."""
    tensors: dict[str, PickledTensor] = {}
    seen = 0

    def walk(node: dict[Any, Any], prefix: str, depth: int) -> None:
        nonlocal seen
        for key, value in node.items():
            seen += 1
            if seen > _MAX_ENTRIES or depth > _MAX_DEPTH:
                raise ValueError("its dicts are nested without end")
            if type(value) is dict:
                walk(value, f"{prefix}{key}.", depth + 1)
            elif type(value) is PickledTensor:
                if f"{prefix}{key}" in tensors:
                    raise ValueError(f"{prefix}{key} occurs twice")
                tensors[f"{prefix}{key}"] = value

    walk(_of(dict, content), "", 1)
    return tensors


def _not_a_zip(path: Path, start: bytes) -> InputError:
    """Why a file that is no zip is refused: by the name it asks for if it is a pickle that could run code."""
    try:
        _Reader(path, None).read(start)
    except InputError as error:
        return error
    except Exception:  # no pickle at all, or one of torch's old format
        pass
    if start[:1] != b"\x80":
        return InputError(f"{path} is no PyTorch file: check the path, or fetch it again.")
    return InputError(f"{path} is a bare pickle, as torch.save wrote before PyTorch 1.6: get the safetensors version.")
