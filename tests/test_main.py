"""The list of commands."""

from pathlib import Path

import jax
import pytest

import jaxlm
from jaxlm.__main__ import COMMANDS, main
from jaxlm.errors import UserError


def test_every_command_has_a_line(capsys):
    package = Path(jaxlm.__file__).parent
    files = [*package.glob("*.py"), *package.glob("*/__main__.py")]
    commands = [f for f in files if "\n    run_command(main)" in f.read_text(encoding="utf-8")]
    names = {f.parent.name if f.stem == "__main__" else f.stem for f in commands}
    assert names - {"jaxlm"} == {*COMMANDS}
    main([])
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip([*COMMANDS, "help"], lines, strict=True):
        assert name in line
    main(["--version"])
    versions = f"jaxlm {jaxlm.__version__}, jax {jax.__version__}, Python 3."
    assert capsys.readouterr().out.startswith(versions)
    with pytest.raises(UserError, match=r"takes no 'train': .* python -m jaxlm\.train$"):
        main(["train"])
