"""The model that a run's adapters were trained on: where it is, and that it is still the same."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.export.huggingface import is_model_folder
from jaxlm.manifest import MANIFEST, sha256

BASE = "base.json"


class Base(NamedTuple):
    """A model's folder as `loading.find_model` gives it, and the fingerprint of its weights."""

    folder: str
    fingerprint: str

    def describe(self, step_folder: Path) -> str:
        """What a checkpoint in `step_folder` keeps of it: both ways to it, and the fingerprint."""
        folder = Path(self.folder).resolve()
        return json.dumps(
            {
                "path": str(folder),
                "relative": os.path.relpath(folder, step_folder.resolve()),
                "fingerprint": self.fingerprint,
            },
            indent=1,
        )


def find_base(folder: Path) -> Base:
    """The base that a model's folder is. Raises UserError for a checkpoint without a manifest."""
    if is_model_folder(folder):
        digests = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    else:
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is no complete checkpoint ({error}): restore it") from None
        weights = (name for name in sorted(files) if name == BASE or name.startswith("state/"))
        digests = {name: files[name]["sha256"] for name in weights}
    text = json.dumps(digests, sort_keys=True)
    return Base(str(folder), hashlib.sha256(text.encode()).hexdigest()[:16])


def read_base(step_folder: Path) -> Base:
    """The base of a checkpoint of adapters.

    Raises UserError where it is neither at its path nor where it was seen from the checkpoint, and
    where its weights are others.
    """
    noted = json.loads((step_folder / BASE).read_text(encoding="utf-8"))
    places = Path(noted["path"]), step_folder.resolve() / noted["relative"]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{step_folder} holds adapters alone, and the model they were trained on, "
            f"{noted['path']}, is not there: put it, or a link to it, back"
        )
    base = find_base(folder)
    if base.fingerprint != noted["fingerprint"]:
        raise UserError(
            f"{folder}, the model that the adapters in {step_folder} were trained on, has other "
            f"weights now (fingerprint {base.fingerprint} instead of {noted['fingerprint']}): "
            "restore it"
        )
    return base
