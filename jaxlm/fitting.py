"""A run that counts and has no gradients: the N-gram model's way through the train command."""

import time
from collections.abc import Callable
from pathlib import Path

from jaxlm.api import LanguageModel
from jaxlm.checkpoint import latest_sound, save_arrays, step_folder
from jaxlm.cli import dump_config, flatten
from jaxlm.config import Config
from jaxlm.data.corpus import Prepared, prepare
from jaxlm.decode_ngram import NgramProgram
from jaxlm.errors import UserError
from jaxlm.models.ngram import Ngram
from jaxlm.models.ngram_fit import fit
from jaxlm.monitor import MetricsLog
from jaxlm.processes import Group
from jaxlm.run_folder import claim_together, held, with_found
from jaxlm.tasks.language_modelling import compressed_bits, loss_metrics
from jaxlm.texts import generate
from jaxlm.validation import OPENING, prompt_option, sample_command

STEP = 1  # the one update there is


def fit_run(config: Config, group: Group, say: Callable[[str], None]) -> int:
    """Fit the N-gram model that `config` asks for, unless its run has it; returns the exit code."""
    if group.count > 1:
        raise UserError(
            f"model.kind=ngram is counted by one process, but there are {group.count}: start one"
        )
    run = Path(config.out)
    with held(run, config, group):
        if latest_sound(run, say) is not None:
            say(f"{run} is fitted already: give another --out to fit again")
            return 0
        prepared = prepare(config.data, config.tokenizer, say)
        config = with_found(config, prepared)
        claim_together(run, config, prepared, group)
        _fit(config, prepared, run, say)
    return 0


def _fit(config: Config, prepared: Prepared, run: Path, say: Callable[[str], None]) -> None:
    start = time.monotonic()
    tokens = sum(file.num_tokens for file in prepared.train)
    say(f"fitting: {config.model.order}-grams of {tokens:,} tokens of text, run folder {run}")
    ngram = fit(prepared.train, config.model.order, config.model.vocab_size, say)
    seconds = time.monotonic() - start
    say(f"fitted in {seconds:.1f} s, {tokens / seconds:,.0f} tok/s")
    text = b"".join(prepared.tokenizer.decode_bytes(file.tokens) for file in prepared.valid)
    nats, targets = ngram.nats(prepared.valid)
    metrics = {
        "step": STEP,
        "tokens": tokens,
        **loss_metrics(nats, targets, len(text)),
    }
    log = MetricsLog(run, 0, config.log.wandb_project, flatten(config))
    log.write(metrics | {"step_seconds": seconds, "tokens_per_second": tokens / seconds})
    log.close()
    say(
        f"validation loss {metrics['valid_loss']:.4f} nats/token, perplexity "
        f"{metrics['valid_perplexity']:.2f}, {metrics['valid_bits_per_byte']:.4f} bits/byte"
    )
    save_arrays(
        run,
        STEP,
        ngram.arrays(),
        config_text=dump_config(config),
        tokenizer=prepared.tokenizer,
        metrics=metrics,
    )
    _sample(config, prepared, ngram, run, say)
    others = ", ".join(f"{name} {bits:.3f}" for name, bits in compressed_bits(text).items())
    say(
        f"bits/byte on {len(text):,} bytes of validation text: model "
        f"{metrics['valid_bits_per_byte']:.3f}, {others}"
    )
    option = prompt_option(_prompt(config, prepared))
    say(f"done: saved in {run}; try {sample_command(run, option)}")


def _prompt(config: Config, prepared: Prepared) -> str:
    """The config's prompt of the sample or, left open, how the validation text begins."""
    if config.train.sample_prompt is not None:
        return config.train.sample_prompt
    return prepared.tokenizer.decode(prepared.valid[0].tokens[:OPENING].tolist())


def _sample(
    config: Config, prepared: Prepared, ngram: Ngram, run: Path, say: Callable[[str], None]
) -> None:
    prompt = _prompt(config, prepared)
    if not prompt:
        return
    tokenizer = prepared.tokenizer
    model = LanguageModel(
        config,
        tokenizer,
        NgramProgram(config.model.max_seq_len),
        ngram,
        (tokenizer.bos_id,),
        step_folder(run, STEP),
    )
    options = {"temperature": 0.8, "seed": config.seed, "say": lambda line: None}
    made = generate(model, prompt, config.train.sample_tokens, **options)
    say(f"  sample: {prompt + made!r}")
