"""Checkpoints are read without running what is written in them."""
import argparse
import collections
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from nanodisco import unpickle
from nanodisco.errors import InputError


class Planted:
    """Unpickled the ordinary way, this makes a file: the sign that code has run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class ByEval:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)


@pytest.fixture
def foreign(monkeypatch):
    """Classes of a library that is there while the file is written and gone when it is read."""
    library = types.ModuleType("deepspeed_like")
    for name, base in (("Plain", object), ("LikeDict", dict), ("LikeList", list), ("LikeSet", set)):
        cls = type(name, (base,), {"__module__": "deepspeed_like"})
        setattr(library, name, cls)
    monkeypatch.setitem(sys.modules, "deepspeed_like", library)
    return library


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("planted", [
    lambda mark: Planted(mark), lambda mark: ByEval(f"__import__('os').mkdir({str(mark)!r})")])
def test_planted_code_never_runs_and_the_weights_still_load(tmp_path, planted):
    mark = tmp_path / "code-has-run"
    path = saved(tmp_path / "evil.pt", {"module": {"w": torch.arange(3)}, "ds_config": planted(mark)})
    assert torch.equal(unpickle.load(path)["module"]["w"], torch.arange(3))
    assert not mark.exists()
    torch.load(path, weights_only=False)                                 # the same file does run code elsewhere
    assert mark.exists()


def test_foreign_objects_become_inert_stubs(tmp_path, foreign, monkeypatch):
    plain, like_dict, like_list = foreign.Plain(), foreign.LikeDict(a=1), foreign.LikeList([1, 2])
    plain.state = {"scale": 65536}
    path = saved(tmp_path / "x.ckpt", {"module": {"w": torch.ones(2)}, "a": plain, "b": like_dict, "c": like_list,
                                       "d": foreign.LikeSet({3}), foreign.Plain: "a class as key"})
    monkeypatch.delitem(sys.modules, "deepspeed_like")
    content = unpickle.load(path)
    assert torch.equal(content["module"]["w"], torch.ones(2))
    assert all(isinstance(content[key], unpickle.Stub) for key in "abc")


def test_what_lightning_and_deepspeed_leave_in_their_files_loads(tmp_path):
    content = {"state_dict": {"w": torch.ones(2)}, "loss": np.float64(0.5), "array": np.arange(3),
               "args": argparse.Namespace(lr=1e-4), "shapes": [collections.OrderedDict(w=torch.Size([2]))],
               "default": collections.defaultdict(list, a=[1]), "dtype": torch.float16, "device": torch.device("cpu")}
    assert torch.equal(unpickle.load(saved(tmp_path / "x.ckpt", content))["state_dict"]["w"], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64,
                                   torch.bool])
def test_tensors_of_every_kind_and_layout_come_back(tmp_path, dtype):
    base = torch.arange(24).reshape(4, 6).to(dtype)
    content = {"whole": base, "view": base[1:, ::2], "turned": base.T, "scalar": base[0, 1], "empty": base[:0]}
    back = unpickle.load(saved(tmp_path / "x.pt", content))
    for name, tensor in content.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name


def test_a_parameter_comes_back_as_its_values(tmp_path):
    back = unpickle.load(saved(tmp_path / "x.pt", {"p": torch.nn.Parameter(torch.ones(2))}))
    assert torch.equal(back["p"], torch.ones(2))


def test_files_from_before_the_zip_format_load(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(unpickle.load(tmp_path / "old.bin")["w"], torch.ones(2))


def test_an_old_file_with_more_than_tensors_is_refused(tmp_path):
    content = {"w": torch.ones(2), "args": argparse.Namespace()}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="the format of torch before 1.6 and holds more than tensors"):
        unpickle.load(tmp_path / "old.pt")


def test_a_function_reached_through_getattr_is_a_stub_as_well(tmp_path):
    mark = tmp_path / "code-has-run"                                     # getattr(__import__("os"), "mkdir")(mark)
    code = (b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'mkdir'\ntR(V%s\ntR." % str(mark).encode())
    saved(tmp_path / "good.pt", {})
    with zipfile.ZipFile(tmp_path / "good.pt") as archive, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for item in archive.infolist():
            evil.writestr(item.filename, code if item.filename.endswith("data.pkl") else archive.read(item))
    assert isinstance(unpickle.load(tmp_path / "evil.pt"), unpickle.Stub)
    assert not mark.exists()
    pickle.loads(code)                                                   # the same bytes do run code elsewhere
    assert mark.exists()


def test_changing_a_loaded_tensor_does_not_change_the_file(tmp_path):
    path = saved(tmp_path / "x.pt", {"w": torch.ones(2)})
    unpickle.load(path)["w"].zero_()
    assert torch.equal(unpickle.load(path)["w"], torch.ones(2))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_one_clear_line(tmp_path, share):
    path = saved(tmp_path / "x.pt", {"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(InputError, match="is not a whole torch checkpoint") as caught:
        unpickle.load(path)
    assert "\n" not in str(caught.value)


def test_a_zip_file_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(InputError, match="not a torch checkpoint"):
        unpickle.load(tmp_path / "x.pt")


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    good = saved(tmp_path / "good.pt", {"w": torch.ones(4)})
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for item in archive.infolist():
            data = archive.read(item)
            if item.filename.endswith("data.pkl"):
                assert data.count(b"K\x04\x85") == 1                     # the shape, (4,)
                data = data.replace(b"K\x04\x85", b"K\x7f\x85")
            bad.writestr(item.filename, data)
    with pytest.raises(InputError, match="beyond its storage"):
        unpickle.load(tmp_path / "bad.pt")


def test_the_functions_that_read_tensors_cannot_be_changed_from_a_file():
    with pytest.raises(pickle.UnpicklingError):
        unpickle.Allowed(len).function = print
