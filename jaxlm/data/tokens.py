"""Token files: the documents of a source as one memory-mapped stream of token ids.

A token file is a folder: `tokens.bin` (every document as BOS, ids, EOS, one after the other),
`offsets.bin` (int64: where each document begins, and the end of the last) and `manifest.json`,
written last.
"""

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError

FORMAT = 1
OFFSET = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


Row = dict[str, np.ndarray]


class TokenFile:
    """A token file, opened for reading.

    Attributes:
        tokens: memory-mapped [num_tokens], uint16 or uint32.
        offsets: memory-mapped [num_documents + 1], int64; document d is
            `tokens[offsets[d]:offsets[d + 1]]`.
        num_tokens, num_documents: with the BOS and EOS of each document.
        num_bytes: UTF-8 bytes of the text.
        num_skipped, first_skipped: documents left out for invalid UTF-8; what is wrong with the
            first of them, None where nobody noted it.
        digest: a hash of all tokens in their order.
        manifest: all that was recorded about how the file came to be.
    """

    def __init__(self, path: str | Path):
        """Raises UserError where the file is incomplete or damaged."""
        self.path = Path(path)
        self.manifest = manifest = open_manifest(self.path, FORMAT, "token file")
        try:
            self.num_tokens: int = manifest["num_tokens"]
            self.num_documents: int = manifest["num_documents"]
            self.num_bytes: int = manifest["num_bytes"]
            self.num_skipped: int = manifest["num_skipped"]
            self.first_skipped: str | None = manifest.get("first_skipped")
            self.digest: str = manifest["digest"]
            dtype = np.dtype(manifest["dtype"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is not a complete token file ({error}): prepare the data again"
            ) from error
        self.tokens = map_array(self.path / "tokens.bin", dtype, self.num_tokens)
        self.offsets = map_array(self.path / "offsets.bin", OFFSET, self.num_documents + 1)
        if self.offsets[-1] != self.num_tokens:
            raise UserError(f"{self.path}/offsets.bin is damaged: prepare the data again")

    def __len__(self) -> int:
        return self.num_documents

    def first(self, count: int) -> "TokenFile":
        """The file as if it ended after that many documents; what it says of bytes stays."""
        part = copy.copy(self)
        part.num_documents = min(count, self.num_documents)
        part.offsets = self.offsets[: part.num_documents + 1]
        part.num_tokens = int(part.offsets[-1])
        part.tokens = self.tokens[: part.num_tokens]
        return part

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}, {self.num_tokens} tokens)"


class TokenWriter:
    """Writes a token file document by document; what it holds in memory does not grow."""

    def __init__(self, path: Path, dtype: np.dtype):
        path.mkdir(parents=True)
        self.path = path
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self._dtype = dtype
        self._tokens = (path / "tokens.bin").open("wb", buffering=1 << 20)
        self._offsets = (path / "offsets.bin").open("wb", buffering=1 << 16)
        self._offsets.write(OFFSET.type(0).tobytes())
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Append a document: its ids [n], BOS and EOS included, and the size of its text."""
        content = tokens.astype(self._dtype, copy=False).tobytes()
        self._tokens.write(content)
        self._digest.update(content)
        self.num_documents += 1
        self.num_tokens += len(tokens)
        self.num_bytes += num_bytes
        self._offsets.write(OFFSET.type(self.num_tokens).tobytes())

    def finish(self, **facts: Any) -> None:
        """Complete the file, with `facts` (`num_skipped` among them) in its manifest."""
        for file in (self._tokens, self._offsets):
            sync(file)
        manifest = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "digest": self._digest.hexdigest(),
            **facts,
        }
        write_manifest(self.path, manifest)

    def close(self) -> None:
        """Let go of the files, whether or not they are finished."""
        self._tokens.close()
        self._offsets.close()


def open_manifest(path: Path, format: int, kind: str) -> dict[str, Any]:
    """What was recorded about a file of a kind. Raises UserError where it is not of `format`."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a complete {kind} ({error}): prepare the data again"
        ) from error
    if found != format:
        raise UserError(
            f"{path} has format {found}, but this version reads {format}: prepare the data again"
        )
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Record what a file is, when all else of it is on the disk."""
    file = (path / "manifest.json").open("wb")
    file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    sync(file)


def sync(file) -> None:
    """Close once the bytes are on the disk, so that what comes later is never there before."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def map_array(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """A file's values [length], memory-mapped. Raises UserError where it has another size."""
    try:
        size = path.stat().st_size
        if size != length * dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes instead of {length * dtype.itemsize}: prepare the data "
                "again"
            )
        # An empty file cannot be mapped.
        return np.memmap(path, dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: prepare the data again") from error
