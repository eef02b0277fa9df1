"""The peer of a translation: Marian of transformers, trained by PyTorch. Run without jaxlm.

    python run_marian.py REQUEST.json

The request names the files, the SentencePiece model that both sides share, the sizes, and the
number of tokens (of source and target, without padding) to train on. The answer has the time the
updates took and the translations of the validation sources.
"""

import json
import random
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from transformers import MarianConfig, MarianMTModel

PADDED_TOKENS = 2048  # of one side, in a batch
EVAL_ROWS = 32


def main(path: str) -> None:
    """Train, translate, and write the answer beside the request."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=request["tokenizer"])
    pad = len(vocabulary)
    train = _pairs(vocabulary, request["train"], request["longest"])
    model = MarianMTModel(_config(request, pad)).train()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"marian: {size:,} parameters, {len(train):,} pairs", flush=True)
    seconds, updates, tokens = _train(model, train, pad, request)
    sources = [s for s, _ in _pairs(vocabulary, request["valid"], request["longest"], keep=True)]
    answer = {"parameters": size, "seconds": seconds, "updates": updates, "tokens": tokens}
    for beams in request["beams"]:
        ids = _translate(model.eval(), sources[: request["limit"]], pad, beams, request)
        answer[f"beam{beams}"] = [vocabulary.decode(row) for row in ids]
    Path(request["answer"]).write_text(json.dumps(answer, ensure_ascii=False), encoding="utf-8")


def _config(request: dict, pad: int) -> MarianConfig:
    return MarianConfig(
        vocab_size=pad + 1,
        d_model=request["d_model"],
        encoder_layers=request["layers"],
        decoder_layers=request["layers"],
        encoder_attention_heads=request["heads"],
        decoder_attention_heads=request["heads"],
        encoder_ffn_dim=request["d_ff"],
        decoder_ffn_dim=request["d_ff"],
        max_position_embeddings=request["longest"] + 2,
        activation_function="relu",
        dropout=request["dropout"],
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        pad_token_id=pad,
        eos_token_id=2,
        bos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )


def _pairs(vocabulary, path: str, longest: int, keep: bool = False) -> list:
    """(source ids, target ids), each with its end; pairs too long are left out or, kept, cut."""
    pairs = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        texts = line.split("\t")[:2]
        source, target = ([*ids, 2] for ids in vocabulary.encode(texts))
        if keep or max(len(source), len(target)) <= longest:
            pairs.append((source[:longest], target))
    return pairs


def _batches(pairs: list, rng: random.Random):
    """Endless batches of pairs of like length, in an order that changes with each pass."""
    while True:
        order = sorted(pairs, key=lambda pair: (max(map(len, pair)), rng.random()))
        batches, batch = [], []
        for pair in order:
            if (len(batch) + 1) * max(map(len, pair)) > PADDED_TOKENS and batch:
                batches.append(batch)
                batch = []
            batch.append(pair)
        batches.append(batch)
        rng.shuffle(batches)
        yield from batches


def _padded(rows: list, value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def _train(model, pairs: list, pad: int, request: dict) -> tuple[float, int, int]:
    """Train on as many tokens as are asked for; (seconds, updates, tokens)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    warmup, peak = request["warmup_steps"], request["learning_rate"]
    loss_fn = torch.nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1)
    done = updates = 0
    started = said = time.monotonic()
    for batch in _batches(pairs, random.Random(0)):
        if done >= request["tokens"]:
            break
        sources, targets = zip(*batch, strict=True)
        inputs = _padded(list(sources), pad)
        labels = _padded(list(targets), -100)
        decoder_inputs = _padded([[1, *row[:-1]] for row in targets], pad)
        rate = peak * min((updates + 1) / warmup, (warmup / (updates + 1)) ** 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(
            input_ids=inputs,
            attention_mask=(inputs != pad).long(),
            decoder_input_ids=decoder_inputs,
        ).logits
        loss = loss_fn(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += sum(map(len, sources)) + sum(map(len, targets))
        updates += 1
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(
                f"marian: {done:,} of {request['tokens']:,} tokens, "
                f"{done / (said - started):,.0f} tok/s, loss {loss.item():.3f}",
                flush=True,
            )
    return time.monotonic() - started, updates, done


@torch.no_grad()
def _translate(model, sources: list, pad: int, beams: int, request: dict) -> list:
    """Ids of the translations, in the order of the sources."""
    out = [None] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for start in range(0, len(order), EVAL_ROWS):
        rows = order[start : start + EVAL_ROWS]
        inputs = _padded([sources[i] for i in rows], pad)
        made = model.generate(
            input_ids=inputs,
            attention_mask=(inputs != pad).long(),
            num_beams=beams,
            max_new_tokens=request["longest"],
            length_penalty=0.6,
            do_sample=False,
        )
        for i, ids in zip(rows, made.tolist(), strict=True):
            out[i] = [token for token in ids[1:] if 2 < token < pad]
    return out


if __name__ == "__main__":
    main(sys.argv[1])
