"""Weights on the disk: as the safetensors package has them; and nothing is believed unseen."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlm.errors import UserError
from jaxlm.export.safetensors import INDEX, WEIGHTS, read_tensors, write_tensors

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1.5, -2.0], np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(7.0, np.float32),
}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


def refuses(*words: str):
    return pytest.raises(UserError, match=".*".join(map(re.escape, words)))


def write(folder, dtype=np.float32, file_bytes=10**9):
    write_tensors(folder, SHAPES, TENSORS.items(), np.dtype(dtype), file_bytes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_what_the_package_reads(tmp_path, dtype):
    write(tmp_path, dtype)
    theirs = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    ours = read_tensors(tmp_path)
    assert theirs.keys() == ours.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert ours[name].dtype == dtype and ours[name].shape == tensor.shape
        assert ours[name].tobytes() == theirs[name].tobytes() == tensor.astype(dtype).tobytes()


def test_what_the_package_writes_is_read(tmp_path):
    safetensors.numpy.save_file(TENSORS | {"ids": np.arange(3)}, tmp_path / WEIGHTS)
    ours = read_tensors(tmp_path)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(ours[name], tensor)
    assert ours["ids"].dtype == np.int64


def test_several_files_have_an_index(tmp_path):
    write(tmp_path, file_bytes=50)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert set(index["weight_map"]) == TENSORS.keys()
    assert len(set(index["weight_map"].values())) == 2
    for name, tensor in read_tensors(tmp_path).items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def test_nothing_is_read_before_it_is_used(tmp_path):
    write(tmp_path)
    tensor = read_tensors(tmp_path)["a.weight"]
    assert not tensor.flags.owndata and not tensor.flags.writeable


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..", 7])
def test_an_index_that_leads_away_is_refused(tmp_path, name):
    write(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with refuses("names the file", "not in the folder itself"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b"])
def test_a_tensor_that_is_called_like_a_path_is_refused(tmp_path, name):
    safetensors.numpy.save_file({name: np.zeros(2)}, tmp_path / WEIGHTS)
    with refuses(f"a tensor called {name!r}", "refused"):
        read_tensors(tmp_path)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is damaged"]),
        (b"abc", ["is damaged (3 bytes)"]),
        ((10**12).to_bytes(8, "little"), ["ends inside its header"]),
        (header(b"{nonsense"), ["its header is not what it should be"]),
        (header(b"[1]"), ["its header is not what it should be"]),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}'), ["bytes of its shape"]),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}'), ["of its shape"]),
        (header(b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,-8]}}'), ["of its shape"]),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), ["inside tensor a"]),
        (header(b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'), ["not quantised"]),
        *(
            (header(b'{"a":{"dtype":%b,"shape":%b,"data_offsets":%b}}' % entry), ["its header"])
            for entry in (
                (b'"F32"', b"[2]", b'["zero",8]'),
                (b'"F32"', b"[2]", b"[0,8,8]"),
                (b'"F32"', b"[2]", b"[0]"),
                (b'"F32"', b"[2]", b"8"),
                (b'"F32"', b"[1e999]", b"[0,8]"),
                (b'"F32"', b"[[2]]", b"[0,8]"),
                (b'"F32"', b"[" * 5000 + b"]" * 5000, b"[0,8]"),
            )
        ),
        (header(b'{"a":{"dtype":[],"shape":[2],"data_offsets":[0,8]}}'), ["is of type []"]),
        (header(b"{}") + b"rest", ["longer than its header says"]),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, content, words):
    (tmp_path / WEIGHTS).write_bytes(content)
    with refuses(*words):
        read_tensors(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path):
    write(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for length in range(len(whole)):
        (tmp_path / WEIGHTS).write_bytes(whole[:length])
        with refuses("is damaged"):
            read_tensors(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with refuses("pytorch_model.bin, a pickle", "save_pretrained"):
        read_tensors(tmp_path)


def test_other_folders_are_one_sentence(tmp_path):
    with refuses(f"has no {WEIGHTS}"):
        read_tensors(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with refuses("cannot be read", "weight_map"):
        read_tensors(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with refuses("x.safetensors is missing"):
        read_tensors(tmp_path)
