"""Reading a torch checkpoint without running anything that is written in it.

A `.pt`, `.ckpt` or `.bin` file is a pickle: a small program that builds objects by calling whatever
it names. Here it may name only what tensors are made of. Every other class (of DeepSpeed, Lightning,
numpy, or of an attacker) becomes a `Stub`, an object that swallows all that is done to it. So the
official checkpoints load without the libraries that wrote them, and none of their code runs.
`torch.load(weights_only=True)` is as safe but refuses some of these files instead.

The tensors are mapped from the file, not read: a 4 GB checkpoint costs memory only where it is used.
"""
import collections
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from nanodisco.errors import InputError

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool, "UntypedStorage": torch.uint8}


class Stub(dict):
    """Stands for an object of a class that is not ours to run."""

    def __new__(cls, *args, **kwargs):
        return dict.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return Stub()

    def __setstate__(self, state):
        pass

    __hash__ = object.__hash__
    append = extend = add = __setstate__


class Allowed:
    """A function that the pickle may call. It cannot be changed from there."""
    __slots__ = ("function",)

    def __init__(self, function):
        object.__setattr__(self, "function", function)

    def __call__(self, *args):
        return self.function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("a checkpoint may not change the functions that read it")


class Unpickler(pickle.Unpickler):
    """`storage(key, dtype)` gives the bytes of a storage as a one-dimensional tensor."""

    def __init__(self, file, storage):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return Allowed(_rebuild_tensor)
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return Allowed(lambda data, *rest: data)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return type(name, (Stub,), {"__module__": module})

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown storage {getattr(dtype, '__name__', kind)}")
        return self.storage(key, dtype, count)


def _rebuild_tensor(storage: Tensor, offset: int, size, stride, requires_grad=False, hooks=None,
                    dtype: torch.dtype | None = None, metadata=None) -> Tensor:
    if isinstance(dtype, torch.dtype):                                   # version 3 says the type here
        storage = storage.view(dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if 0 not in size else offset - 1
    if min((offset, *size, *stride)) < 0 or last >= len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def load(path: str | Path):
    """The object in a checkpoint: tensors on the CPU, containers, numbers, strings, and stubs."""
    path = Path(path)
    try:
        if not zipfile.is_zipfile(path):
            return _load_old(path)
        with zipfile.ZipFile(path) as archive:
            return _load_zip(path, archive)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is not there") from None
    except Exception as error:                     # a damaged pickle can fail in any way: it is one thing to the user
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise InputError(f"{path} is not a whole torch checkpoint, or not one of weights ({path.stat().st_size:,} "
                         f"bytes; {reason}); download or copy it again") from None


def _load_old(path: Path):
    """The format of torch before 1.6, without a zip file around it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise InputError(f"{path} has the format of torch before 1.6 and holds more than tensors; load it with "
                             "the program that wrote it and save the tensors alone") from None
        raise pickle.UnpicklingError("no torch format") from None


def _load_zip(path: Path, archive: zipfile.ZipFile):
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path} is a zip file but not a torch checkpoint (no data.pkl in it)")
    folder = pickles[0].removesuffix("data.pkl")
    whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)    # private: never written back

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        record = archive.getinfo(f"{folder}data/{key}")
        size = count * dtype.itemsize
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != size:
            raise pickle.UnpicklingError(f"storage {key} has {record.file_size} bytes, not {size}")
        with path.open("rb") as file:                                    # the local header says where its bytes start
            file.seek(record.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        start = record.header_offset + 30 + name + extra
        return torch.empty(0, dtype=dtype).set_(whole[start:start + size])

    with archive.open(pickles[0]) as file:
        return Unpickler(file, storage).load()
