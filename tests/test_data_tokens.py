"""Token files: what is written is read back, and damage is noticed."""

import json

import numpy as np
import pytest

from jaxlm.data.tokens import TokenFile, TokenWriter, token_dtype
from jaxlm.errors import UserError

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [1, 65535, 2]]


@pytest.fixture
def folder(tmp_path):
    writer = TokenWriter(tmp_path / "file", token_dtype(65536))
    for ids in DOCUMENTS:
        writer.add(np.array(ids), num_bytes=10)
    writer.finish(num_skipped=4, source="here")
    return tmp_path / "file"


def test_what_is_written_is_read_back(folder):
    file = TokenFile(folder)
    assert (file.num_tokens, file.num_documents, file.num_bytes, file.num_skipped) == (9, 3, 30, 4)
    assert isinstance(file.tokens, np.memmap)
    assert (file.tokens.dtype, file.offsets.dtype) == (np.uint16, np.int64)
    offsets = file.offsets
    read = [file.tokens[offsets[d] : offsets[d + 1]].tolist() for d in range(3)]
    assert read == DOCUMENTS
    assert file.manifest["source"] == "here"


def test_large_vocabularies_take_four_bytes(tmp_path):
    writer = TokenWriter(tmp_path / "file", token_dtype(65537))
    writer.add(np.array([65536]), num_bytes=1)
    writer.finish(num_skipped=0)
    assert TokenFile(tmp_path / "file").tokens.tolist() == [65536]


def test_no_documents(tmp_path):
    TokenWriter(tmp_path / "file", token_dtype(300)).finish(num_skipped=0)
    file = TokenFile(tmp_path / "file")
    assert (file.num_documents, len(file.tokens), file.offsets.tolist()) == (0, 0, [0])


def test_an_unfinished_file_is_not_opened(tmp_path):
    writer = TokenWriter(tmp_path / "file", token_dtype(300))
    writer.add(np.array([1, 2]), num_bytes=0)
    writer.close()
    with pytest.raises(UserError, match=r"file is not a complete token file .*prepare the data"):
        TokenFile(tmp_path / "file")


def damage(folder, what):
    if what == "offsets changed":
        content = bytearray((folder / "offsets.bin").read_bytes())
        content[-8] ^= 1
        (folder / "offsets.bin").write_bytes(content)
    elif what == "other format":
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    elif what == "manifest cut":
        (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:40])
    elif what == "tokens cut":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])
    elif what == "tokens gone":
        (folder / "tokens.bin").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("offsets changed", r"offsets\.bin is damaged"),
        ("other format", "has format 0, but this version reads 1"),
        ("manifest cut", "is not a complete token file"),
        ("tokens cut", r"tokens\.bin has 17 bytes instead of 18"),
        ("tokens gone", r"cannot read .*tokens\.bin: No such file"),
    ],
)
def test_damage_is_named(folder, what, message):
    damage(folder, what)
    with pytest.raises(UserError, match=message):
        TokenFile(folder)
