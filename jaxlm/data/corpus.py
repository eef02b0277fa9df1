"""Preparing a corpus: from `DataConfig` and `TokenizerConfig` to a tokenizer and token files.

What was prepared before, from the same sources with the same settings, is taken from the cache.
"""

import hashlib
import heapq
import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.data.cache import Report, cache_folder, cache_key, cached
from jaxlm.data.examples import ExampleFile
from jaxlm.data.files import source_fingerprint
from jaxlm.data.forms import Documents, Encoded, Form, Origin
from jaxlm.data.progress import progress
from jaxlm.data.records import Counts
from jaxlm.data.tokens import TokenFile
from jaxlm.data_config import DataConfig, TokenizerConfig
from jaxlm.errors import UserError
from jaxlm.processes import Group
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer_training import train_tokenizer

CHUNK_CHARACTERS = 1 << 20
EXCERPT_CHARACTERS = 1 << 14

File = TokenFile | ExampleFile


@dataclass(frozen=True)
class Prepared:
    """A corpus that is ready to train on."""

    form: Form
    """What it is a corpus of; its `names` are the labels or languages that the task has."""
    tokenizer: Tokenizer
    train: tuple[File, ...]
    """One for each source in `data.train`, none empty."""
    valid: tuple[File, ...]
    """One for each source in `data.valid`, or what was held out; none empty, at least one."""
    weights: tuple[float, ...] | None
    """`data.weights`: one for each of `train`, or None for weights by size."""


def prepare(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    report: Report = print,
    form: Form | None = None,
) -> Prepared:
    """Train or load the tokenizer and tokenise every source; `report` gets a line now and then.

    `form` is what a task makes of its sources; None: documents, for language modelling. Without
    `data.valid`, the items whose hash falls below `data.valid_fraction` are held out, so that
    copies of a document, or of a source sentence, are on the same side; at least one is. The files
    do not depend on `data.workers`.

    Raises UserError for sources and tokenizers that cannot be read, and for no text on one side.
    """
    return _Preparation(data, tokenizer_config, form or Documents(data), report).run()


def prepare_together(
    group: Group,
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    report: Report,
    form: Form | None = None,
) -> Prepared:
    """`prepare` in every process of a group: the first makes what is not there, then the others.

    Where they share a cache these find it done; where each machine has its own, they do it again.
    Raises UserError also where they come to different data.
    """
    prepared = prepare(data, tokenizer_config, report, form) if group.is_first else None
    group.barrier(seconds=math.inf)
    if prepared is None:
        prepared = prepare(data, tokenizer_config, lambda line: None, form)
    group.check_same(
        {
            "the tokenizer": prepared.tokenizer.fingerprint,
            "the training tokens": [file.digest for file in prepared.train],
            "the validation tokens": [file.digest for file in prepared.valid],
        }
    )
    return prepared


class _Preparation:
    """One run of `prepare`: what its parts share."""

    def __init__(
        self, data: DataConfig, tokenizer_config: TokenizerConfig, form: Form, report: Report
    ):
        self.data = data
        self.tokenizer_config = tokenizer_config
        self.form = form
        self.report = report
        self.cache = cache_folder(data.cache)
        self.train, self.valid = form.origins("train"), form.origins("valid")
        specs = {origin.spec for origin in (*self.train, *self.valid)}
        self.prints = {spec: source_fingerprint(spec) for spec in specs}
        self.below = 0 if data.valid else self._held_out_below()
        """Hold out the training items whose digest is below this number."""

    def run(self) -> Prepared:
        if self.form.names is None:
            found = self._name_counts()
            self.form = self.form.with_names(found)
            self.report(self.form.names_line(found))
        tokenizer = self.form.tokenizer(self._tokenizer())
        dropout = self.tokenizer_config.dropout
        train = [self._files(origin, self.below, tokenizer, dropout) for origin in self.train]
        for origin, (kept, held_out) in zip(self.train, train, strict=True):
            if not len(kept):
                raise self._nothing("train", origin, kept, len(held_out))
        same = {} if dropout else dict(zip(self.train, train, strict=True))
        valid = [(same.get(o) or self._files(o, 0, tokenizer))[0] for o in self.valid]
        for origin, file in zip(self.valid, valid, strict=True):
            if not len(file):
                raise self._nothing("valid", origin, file)
        held_out = [file for _, file in train if len(file)]
        return Prepared(
            self.form,
            tokenizer,
            tuple(kept for kept, _ in train),
            tuple(valid or held_out),
            self.data.weights,
        )

    def _held_out_below(self) -> int:
        """The number that stands for `data.valid_fraction`.

        In a corpus so small that this is no item, it is the one with the lowest digest.
        """
        below = int(self.data.valid_fraction * 2**64)
        digests: set[int] = set()
        left_out = Counts()
        for origin in self.train:
            for item in self.form.items(origin, left_out):
                digest = _held_out_digest(self.form.key(item))
                if digest < below:
                    return below
                digests = {min(digests | {digest}), max(digests | {digest})}
        if len(digests) == 1:
            bad = f" ({left_out.skipped} skipped as {self.form.bad})" if left_out.skipped else ""
            raise UserError(
                f"data.train has one {self.form.item} and no other, too short to cut{bad}: nothing "
                "can be held out, so name validation text in data.valid"
            )
        # With no item at all, the source is reported when it is tokenised.
        return min(digests, default=-1) + 1

    def _facts(self, origins: Sequence[Origin]) -> dict[str, Any]:
        """What the items of several sources depend on."""
        each = [self.form.origin_facts(origin) for origin in origins]
        return {
            "format": self.form.format,
            "sources": [self.prints[origin.spec] for origin in origins],
            "on_bad": self.data.on_bad,
            **self.form.facts(),
            **{name: [facts[name] for facts in each] for name in each[0]},
        }

    def _name_counts(self) -> dict[str, int]:
        """How many items have each name."""

        def make(folder: Path) -> None:
            counts = Counter()
            for origin in self.train:
                left_out, before = Counts(), counts.total()
                counts.update(map(self.form.name_of, self.form.items(origin, left_out)))
                if counts.total() == before:
                    raise self._nothing("train", origin, left_out)
            (folder / "names.json").write_text(json.dumps(counts, sort_keys=True))

        def opened(folder: Path) -> dict[str, int]:
            try:
                return json.loads((folder / "names.json").read_bytes())
            except (OSError, ValueError) as error:
                raise UserError(f"{folder}/names.json is damaged: remove it") from error

        key = cache_key("name-counts", self._facts(self.train))
        return cached(self.cache / key, opened, make, self.report)

    def _tokenizer(self) -> Tokenizer:
        config = self.tokenizer_config
        if config.kind == "file":
            return load_tokenizer(config.path)
        controls = self.form.controls
        facts = self._facts(self.train) | {
            "held_out_below": self.below,
            "kind": config.kind,
            "vocab_size": config.vocab_size,
            "training_mb": config.training_mb,
        }
        if controls:
            facts["controls"] = controls

        def make(folder: Path) -> None:
            start = time.monotonic()
            with progress("reading text for the tokenizer", self.report) as advance:
                sample = _sample(self._kept_texts(advance), config.training_mb * 10**6)
            train_tokenizer(iter(sample), config, controls).save(folder)
            seconds = time.monotonic() - start
            self.report(f"tokenizer: {config.vocab_size} tokens in {seconds:.1f} s")

        key = cache_key("tokenizer", facts)
        return cached(self.cache / key, load_tokenizer, make, self.report)

    def _kept_texts(self, advance: Callable[[int], None]) -> Iterator[str]:
        """The training text.

        Raises UserError for a source without any, before there is too little.
        """
        for origin in self.train:
            counts, sides = Counts(), [0, 0]
            for item in self.form.items(origin, counts):
                is_kept = _held_out_digest(self.form.key(item)) >= self.below
                sides[is_kept] += 1
                for text in self.form.texts(item):
                    advance(len(text.encode()))
                    if is_kept:
                        yield text
            num_held_out, num_kept = sides
            if not num_kept:
                raise self._nothing("train", origin, counts, num_held_out)

    def _files(
        self, origin: Origin, below: int, tokenizer: Tokenizer, dropout: float = 0.0
    ) -> tuple[File, File]:
        """The items of a source that are kept, cut at random with `dropout`, and those held out."""
        form, report = self.form, self.report
        facts = {
            "format": form.format,
            "source_fingerprint": self.prints[origin.spec],
            "on_bad": self.data.on_bad,
            "held_out_below": below,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            **form.facts(),
            **form.origin_facts(origin),
            **form.encoding_facts(tokenizer),
        }
        cuts = self.tokenizer_config.dropout_cuts
        if dropout:
            facts |= {"dropout": dropout, "dropout_cuts": cuts}
        how = "from the cache"

        def make(folder: Path) -> None:
            nonlocal how
            start = time.monotonic()
            kept, held_out = writers = [form.writer(path, tokenizer) for path in _parts(folder)]
            try:
                with progress(f"tokenizing {origin.spec}", report) as advance:
                    for encoder, sides in self._passes(tokenizer, dropout):
                        # Each pass meets the same bad records.
                        counts = Counts()
                        chunks = _chunks(form, form.items(origin, counts))
                        encode = partial(_encode, form, encoder, below)
                        for item, is_held_out in _parallel(encode, chunks, self.data.workers):
                            if is_held_out in sides:
                                writers[is_held_out].add(item.content, item.num_bytes)
                                advance(item.num_bytes)
                kept.finish(**counts.facts, source=origin.spec, **facts)
                held_out.finish(**Counts().facts, source=origin.spec, **facts)
            finally:
                for writer in writers:
                    writer.close()
            how = f"in {time.monotonic() - start:.1f} s"

        def opened(folder: Path) -> tuple[File, File]:
            kept, held_out = map(form.open, _parts(folder))
            # The same files may have been prepared under another name.
            kept.manifest["source"] = held_out.manifest["source"] = origin.spec
            return kept, held_out

        key = cache_key(form.kind, facts)
        kept, held_out = cached(self.cache / key, opened, make, report)
        cut = f", each text to train on in pieces {cuts} times" if dropout else ""
        report(f"{origin.spec}: {form.summary(kept, held_out, how)}{cut}")
        return kept, held_out

    def _passes(
        self, tokenizer: Tokenizer, dropout: float
    ) -> Iterator[tuple[Tokenizer, tuple[bool, ...]]]:
        """What encodes a source, and which sides are written of it.

        Sides are False for what is kept and True for what is held out, and never cut at random.
        """
        if not dropout:
            yield tokenizer, (False, True)
            return
        yield tokenizer, (True,)
        for seed in range(self.tokenizer_config.dropout_cuts):
            yield tokenizer.with_dropout(dropout, seed), (False,)

    def _nothing(
        self, field: str, origin: Origin, found: Counts | File, num_held_out: int = 0
    ) -> UserError:
        skipped, remedy = getattr(found, "num_skipped", 0), "give it more text"
        if isinstance(found, Counts):
            skipped = found.skipped
            remedy = (not num_held_out and found.first) or remedy
        elif skipped and not (num_held_out or getattr(found, "num_dropped", 0)):
            remedy = "data.on_bad=error says where the first is"
        causes = []
        if skipped:
            causes.append(f"{skipped} skipped as {self.form.bad}")
        if dropped := getattr(found, "num_dropped", 0):
            causes.append(f"{dropped} too long")
        if num_held_out:
            causes.append(f"all {num_held_out} held out for validation")
        return UserError(
            f"data source {origin.spec!r} in data.{field} has no {self.form.item} with text left"
            f" ({', '.join(causes) or 'all it has is empty or white space'}): {remedy}"
        )


def _digest(text: bytes, purpose: bytes) -> int:
    """A uniform number below 2**64 that is a function of the text."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=purpose).digest(), "big")


def _held_out_digest(text: str) -> int:
    return _digest(text.encode(), b"held out")


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


def _parts(folder: Path) -> tuple[Path, Path]:
    return folder / "kept", folder / "held_out"


def _encode(
    form: Form, tokenizer: Tokenizer, below: int, items: list[Any]
) -> list[tuple[Encoded, bool]]:
    """Each item for its writer, and whether it is held out."""
    held_out = [_held_out_digest(form.key(item)) < below for item in items]
    return list(zip(form.encode(tokenizer, items), held_out, strict=True))


def _chunks(form: Form, items: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of items with about `CHUNK_CHARACTERS` of text in all."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += sum(map(len, form.texts(item)))
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _parallel(
    encode: Callable[[list[Any]], list[tuple[Encoded, bool]]],
    chunks: Iterable[list[Any]],
    workers: int,
) -> Iterator[tuple[Encoded, bool]]:
    """`encode` the chunks in threads, a few of them ahead; the items come out in order.

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
