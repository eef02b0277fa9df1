"""Folders of safetensors files, read lazily and written one tensor at a time.

The format: eight bytes with the length of a JSON header, the header (each tensor's type, shape and
place), the values. A large model has several files and `model.safetensors.index.json`, which says
where each tensor is. Nothing here unpickles.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    # Masks and counters that some checkpoints carry beside their weights.
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
# What reading JSON raises that is none, is nested too deep, or says something else.
NOT_AS_EXPECTED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder by name: views of mapped files, read from the disk as they are used.

    Raises UserError where there are none, or other formats only; for an index or a tensor that
    names a place outside of the folder; and for a file that is cut short or otherwise damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    for name in _files(folder):
        for tensor, view in _read_file(folder / name).items():
            if tensor in tensors:
                raise UserError(f"tensor {tensor} is in two files of {folder}: remove one of them")
            tensors[tensor] = view
    return tensors


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype,
    file_bytes: int,
    file_name: str = WEIGHTS,
) -> None:
    """Write `tensors`, which come in the order of `shapes`, cast to `dtype`.

    A file holds `file_bytes` at most, unless a tensor alone is larger; several get an index.
    """
    files = _split(shapes, dtype, file_bytes)
    names = [file_name]
    if len(files) > 1:
        stem = file_name.removesuffix(".safetensors")
        total = len(files)
        names = [f"{stem}-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
        index = {
            "metadata": {"total_size": sum(_size(shape, dtype) for shape in shapes.values())},
            "weight_map": {
                tensor: name for name, file in zip(names, files, strict=True) for tensor in file
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    source = iter(tensors)
    for name, wanted in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header({tensor: shapes[tensor] for tensor in wanted}, dtype))
            for tensor in wanted:
                got, values = next(source)
                if (got, values.shape) != (tensor, shapes[tensor]):
                    raise ValueError(f"{got} {values.shape} came where {tensor} was announced")
                file.write(np.ascontiguousarray(values.astype(dtype)).view(np.uint8).data)


def _files(folder: Path) -> list[str]:
    """The files that hold a folder's tensors."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (OSError, *NOT_AS_EXPECTED):
            raise UserError(
                f"{folder / INDEX} cannot be read: it should be a JSON object with a weight_map"
            ) from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise UserError(
                    f"{folder / INDEX} names the file {name!r}, which is not in the folder itself: "
                    "refused; its files must be plain names"
                )
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, but {INDEX} names it: download it")
        return names
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(kind))]
    if pickles:
        raise UserError(
            f"{folder} has its weights as {pickles[0]}, a pickle, which can run any code when it "
            "is read: convert it where you trust it, by transformers' AutoModelForCausalLM"
            f".from_pretrained({str(folder)!r}).save_pretrained('converted')"
        )
    raise UserError(f"{folder} has no {WEIGHTS} (and no {INDEX})")


def _read_file(path: Path) -> dict[str, np.ndarray]:
    def damaged(what: str) -> UserError:
        return UserError(f"{path} is damaged ({what}): copy or download it again")

    try:
        content = np.memmap(path, mode="r", dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise damaged(str(error)) from None
    if content.size < 8:
        raise damaged(f"{content.size} bytes")
    length = int(content[:8].view("<u8")[0])
    if length > min(MAX_HEADER, content.size - 8):
        raise damaged("it ends inside its header")
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        entries = {str(name): _entry(entry) for name, entry in header.items()}
    except (*NOT_AS_EXPECTED, OverflowError):
        raise damaged("its header is not what it should be") from None
    values = content[8 + length :]
    tensors = {}
    for name, (kind, shape, start, end) in entries.items():
        if ".." in name or name.startswith(("/", "\\")):
            raise UserError(f"{path} has a tensor called {name!r}: that is a path, refused")
        if kind not in TYPES:
            raise UserError(
                f"tensor {name} of {path} is of type {kind}, but jaxlm reads {', '.join(TYPES)}: "
                "use a checkpoint that is not quantised"
            )
        if (
            not 0 <= start <= end
            or end - start != _size(shape, TYPES[kind])
            or min(shape, default=0) < 0
        ):
            raise damaged(f"{name} does not have the bytes of its shape")
        if end > values.size:
            raise damaged(f"it ends inside tensor {name}")
        tensors[name] = values[start:end].view(TYPES[kind]).reshape(shape)
    if max((end for *_, end in entries.values()), default=0) != values.size:
        raise damaged("it is longer than its header says")
    return tensors


def _entry(entry: Mapping) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first byte and the one behind the last of a tensor in a header."""
    start, end = map(int, entry["data_offsets"])
    return str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end


def _split(
    shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, file_bytes: int
) -> list[list[str]]:
    """The names of the tensors in each file."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = _size(shape, dtype)
        if files[-1] and used + size > file_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + _size(shape, dtype)
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
