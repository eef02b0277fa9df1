"""`python -m jaxlm.prepare`: tokenise the data now, so that training starts at once."""

from jaxlm.cli import parse_config, run_command
from jaxlm.data.corpus import File, prepare
from jaxlm.data.forms import counted
from jaxlm.tasks.build import check_text_field, make_form, say_what_is_shared


def main(argv: list[str]) -> None:
    """Prepare what the config names and print what it came to. Raises UserError."""
    config, _ = parse_config(
        argv,
        command="jaxlm.prepare",
        description="Train or load the tokenizer and write the token files of data.train and "
        "data.valid, which training then takes from the cache.",
    )
    check_text_field(config)
    say_what_is_shared(config.data, print)
    prepared = prepare(config.data, config.tokenizer, form=make_form(config))
    for name, files in (("train", prepared.train), ("valid", prepared.valid)):
        for file in files:
            print(f"{name}: {_summary(file, prepared.form.item)}")


def _summary(file: File, item: str) -> str:
    skipped = f", {file.num_skipped:,} skipped as bad" if file.num_skipped else ""
    return (
        f"{file.manifest['source']}: {counted(len(file), item)}, {file.num_tokens:,} tokens, "
        f"{file.num_bytes:,} bytes ({file.num_bytes / file.num_tokens:.2f} a token){skipped}"
        f"\n  in {file.path}"
    )


if __name__ == "__main__":
    run_command(main)
