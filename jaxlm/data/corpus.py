"""Preparing a corpus: from `DataConfig` and `TokenizerConfig` to a tokenizer and token files.

What was prepared before, from the same sources with the same settings, is taken from the cache.
"""

import hashlib
import heapq
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data.cache import Report, cache_folder, cache_key, cached
from jaxlm.data.sources import Counts, max_document_bytes, read_documents, source_fingerprint
from jaxlm.data.tokens import FORMAT, TokenFile, TokenWriter, token_dtype
from jaxlm.errors import UserError
from jaxlm.processes import Group
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer_training import train_tokenizer

CHUNK_CHARACTERS = 1 << 20
EXCERPT_CHARACTERS = 1 << 14
SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class Prepared:
    """A corpus that is ready to train on."""

    tokenizer: Tokenizer
    train: tuple[TokenFile, ...]
    """One for each source in `data.train`, none empty."""
    valid: tuple[TokenFile, ...]
    """One for each source in `data.valid`, or what was held out; none empty, at least one."""
    weights: tuple[float, ...] | None
    """`data.weights`: one for each of `train`, or None for weights by size."""


def prepare(
    data: DataConfig, tokenizer_config: TokenizerConfig, report: Report = print
) -> Prepared:
    """Train or load the tokenizer and tokenise every source; `report` gets a line now and then.

    Without `data.valid`, the documents whose hash falls below `data.valid_fraction` are held out,
    so that copies of a document are on the same side; at least one is. The token files do not
    depend on `data.workers`.

    Raises UserError for sources and tokenizers that cannot be read, and for no text on one side.
    """
    cache = cache_folder(data.cache)
    prints = {spec: source_fingerprint(spec) for spec in (*data.train, *data.valid)}
    below = 0 if data.valid else _held_out_below(data)
    tokenizer = _get_tokenizer(cache, prints, below, data, tokenizer_config, report)
    token_files = partial(_get_token_files, cache, prints, tokenizer=tokenizer, data=data)
    train = [token_files(spec, below=below, report=report) for spec in data.train]
    for spec, (kept, held_out) in zip(data.train, train, strict=True):
        if not kept.num_documents:
            raise _no_documents("train", spec, kept.num_skipped, held_out.num_documents)
    valid = [token_files(spec, below=0, report=report)[0] for spec in data.valid]
    for spec, file in zip(data.valid, valid, strict=True):
        if not file.num_documents:
            raise _no_documents("valid", spec, file.num_skipped)
    held_out = [file for _, file in train if file.num_documents]
    return Prepared(
        tokenizer, tuple(kept for kept, _ in train), tuple(valid or held_out), data.weights
    )


def prepare_together(
    group: Group, data: DataConfig, tokenizer_config: TokenizerConfig, report: Report
) -> Prepared:
    """`prepare` in every process of a group: the first makes what is not there, then the others.

    Where they share a cache these find it done; where each machine has its own, they do it again.
    Raises UserError also where they come to different data.
    """
    prepared = prepare(data, tokenizer_config, report) if group.is_first else None
    group.barrier(seconds=math.inf)
    if prepared is None:
        prepared = prepare(data, tokenizer_config, lambda line: None)
    group.check_same(
        {
            "the tokenizer": prepared.tokenizer.fingerprint,
            "the training tokens": [file.digest for file in prepared.train],
            "the validation tokens": [file.digest for file in prepared.valid],
        }
    )
    return prepared


def _no_documents(field: str, spec: str, num_skipped: int, num_held_out: int = 0) -> UserError:
    causes = []
    if num_skipped:
        causes.append(f"{num_skipped} skipped as invalid UTF-8 or null")
    if num_held_out:
        causes.append(f"all {num_held_out} held out for validation")
    return UserError(
        f"data source {spec!r} in data.{field} has no document with text left"
        f" ({', '.join(causes) or 'all it has is empty'}): give it more text"
    )


def _digest(text: bytes, purpose: bytes) -> int:
    """A uniform number below 2**64 that is a function of the text."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=purpose).digest(), "big")


def _held_out_digest(text: bytes) -> int:
    return _digest(text, b"held out")


def _held_out_below(data: DataConfig) -> int:
    """Hold out the training documents whose digest is below this number.

    It stands for `data.valid_fraction`, or, in a corpus so small that this is no document, for the
    one document with the lowest digest.
    """
    below = int(data.valid_fraction * 2**64)
    digests: set[int] = set()
    for spec in data.train:
        for text in read_documents(spec, data, Counts()):
            digest = _held_out_digest(text.encode())
            if digest < below:
                return below
            digests = {min(digests | {digest}), max(digests | {digest})}
    if len(digests) == 1:
        raise UserError(
            "data.train is a single document too short to cut, of which nothing can be held out: "
            "name validation text in data.valid"
        )
    # With no document at all, the source is reported when it is tokenised.
    return min(digests, default=-1) + 1


def _get_tokenizer(
    cache: Path,
    prints: dict[str, str],
    below: int,
    data: DataConfig,
    config: TokenizerConfig,
    report: Report,
) -> Tokenizer:
    if config.kind == "file":
        return load_tokenizer(config.path)
    facts = {
        "format": FORMAT,
        "sources": [prints[spec] for spec in data.train],
        "text_field": data.text_field,
        "on_bad": data.on_bad,
        "max_document_bytes": [max_document_bytes(spec, data) for spec in data.train],
        "held_out_below": below,
        "kind": config.kind,
        "vocab_size": config.vocab_size,
        "training_mb": config.training_mb,
    }

    def make(folder: Path) -> None:
        start = time.monotonic()
        with _progress("reading text for the tokenizer", report) as advance:
            sample = _sample(_kept_documents(data, below, advance), config.training_mb * 10**6)
        train_tokenizer(iter(sample), config).save(folder)
        report(f"tokenizer: {config.vocab_size} tokens in {time.monotonic() - start:.1f} s")

    return cached(cache / cache_key("tokenizer", facts), load_tokenizer, make, report)


def _kept_documents(data: DataConfig, below: int, advance: Callable[[int], None]) -> Iterator[str]:
    """The training text. Raises UserError for a source without any, before there is too little."""
    for spec in data.train:
        counts, sides = Counts(), [0, 0]
        for text in read_documents(spec, data, counts):
            encoded = text.encode()
            advance(len(encoded))
            is_kept = _held_out_digest(encoded) >= below
            sides[is_kept] += 1
            if is_kept:
                yield text
        num_held_out, num_kept = sides
        if not num_kept:
            raise _no_documents("train", spec, counts.skipped, num_held_out)


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Excerpts spread evenly over `texts`, in their order: those with the lowest digests."""
    heap: list[tuple[int, int, str]] = []
    excerpts = (
        text[start : start + EXCERPT_CHARACTERS]
        for text in texts
        for start in range(0, len(text), EXCERPT_CHARACTERS)
    )
    size = 0
    for number, excerpt in enumerate(excerpts):
        encoded = excerpt.encode()
        heapq.heappush(heap, (-_digest(encoded, b"sample"), number, excerpt))
        size += len(encoded)
        while size > max_bytes:
            size -= len(heapq.heappop(heap)[2].encode())
    return [excerpt for _, _, excerpt in sorted(heap, key=lambda entry: entry[1])]


def _get_token_files(
    cache: Path,
    prints: dict[str, str],
    spec: str,
    *,
    below: int,
    tokenizer: Tokenizer,
    data: DataConfig,
    report: Report,
) -> tuple[TokenFile, TokenFile]:
    """The documents of a source that are kept, and those held out."""
    facts = {
        "format": FORMAT,
        "source_fingerprint": prints[spec],
        "text_field": data.text_field,
        "on_bad": data.on_bad,
        "max_document_bytes": max_document_bytes(spec, data),
        "held_out_below": below,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }
    how = "from the cache"

    def make(folder: Path) -> None:
        nonlocal how
        start = time.monotonic()
        counts = Counts()
        dtype = token_dtype(tokenizer.vocab_size)
        kept, held_out = writers = [TokenWriter(path, dtype) for path in _parts(folder)]
        encode = partial(_encode, tokenizer, dtype, below)
        try:
            with _progress(f"tokenizing {spec}", report) as advance:
                documents = read_documents(spec, data, counts)
                for document in _parallel(encode, _chunks(documents), data.workers):
                    (held_out if document.held_out else kept).add(document.ids, document.num_bytes)
                    advance(document.num_bytes)
            kept.finish(num_skipped=counts.skipped, source=spec, **facts)
            held_out.finish(num_skipped=0, source=spec, **facts)
        finally:
            for writer in writers:
                writer.close()
        how = f"in {time.monotonic() - start:.1f} s"

    def opened(folder: Path) -> tuple[TokenFile, TokenFile]:
        kept, held_out = map(TokenFile, _parts(folder))
        # The same files may have been prepared under another name.
        kept.manifest["source"] = held_out.manifest["source"] = spec
        return kept, held_out

    kept, held_out = cached(cache / cache_key("tokens", facts), opened, make, report)
    report(f"{spec}: {_summary(kept, held_out, how)}")
    return kept, held_out


def _summary(kept: TokenFile, held_out: TokenFile, how: str) -> str:
    summary = f"{kept.num_tokens + held_out.num_tokens:,} tokens {how}"
    if held_out.num_documents:
        summary += (
            f", {_documents(held_out.num_documents)} ({held_out.num_tokens:,} tokens) held out"
        )
    if kept.num_skipped:
        summary += f", {_documents(kept.num_skipped)} skipped as invalid UTF-8 or null"
    return summary


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _parts(folder: Path) -> tuple[Path, Path]:
    return folder / "kept", folder / "held_out"


@dataclass(frozen=True)
class _Document:
    ids: np.ndarray
    num_bytes: int
    held_out: bool


def _encode(tokenizer: Tokenizer, dtype: np.dtype, below: int, texts: list[str]) -> list[_Document]:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        encoded = text.encode()
        ids = np.array([tokenizer.bos_id, *ids, *end], dtype)
        documents.append(_Document(ids, len(encoded), _held_out_digest(encoded) < below))
    return documents


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts with about `CHUNK_CHARACTERS` in all."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _parallel(
    encode: Callable[[list[str]], list[_Document]], chunks: Iterable[list[str]], workers: int
) -> Iterator[_Document]:
    """`encode` the chunks in threads, a few of them ahead; the documents come out in order.

    Threads do what processes would, because both tokenizer libraries compute outside Python's lock;
    and they are safe in a process that has started JAX.
    """
    workers = workers or os.cpu_count() or 1
    ahead: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        for chunk in chunks:
            ahead.append(pool.submit(encode, chunk))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


@contextmanager
def _progress(label: str, report: Report) -> Iterator[Callable[[int], None]]:
    """Show how many bytes were passed to the function this yields: a bar, or sparse lines."""
    if sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda num_bytes: bar.advance(task, num_bytes)
        return
    start = last = time.monotonic()
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done, last
        done += num_bytes
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            report(f"{label}: {done / 1e6:.0f} MB, {done / 1e6 / (now - start):.1f} MB/s")

    yield advance
