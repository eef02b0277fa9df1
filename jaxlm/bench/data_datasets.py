"""The peer of preparing: `datasets.map` with a fast tokenizer. Run without jaxlm:

    python data_datasets.py REQUEST.json

The request names a file of JSON lines with `text`, a tokenizer's folder, the tokens in a row, and
where to write. The last line printed has the tokens and the time.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import datasets
import transformers


def main(path: str) -> None:
    """Tokenise every text, with the tokens around it, and cut all of them into rows."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["tokenizer"])
    begin, end, length = [tokenizer.bos_token_id], [tokenizer.eos_token_id], request["seq_len"]

    def tokenise(batch):
        rows = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [begin + row + end for row in rows]}

    def group(batch):
        flat = list(itertools.chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [flat[i : i + length] for i in range(0, len(flat), length)]}

    started = time.monotonic()
    data = datasets.load_dataset(
        "json", data_files=request["texts"], split="train", cache_dir=request["out"]
    )
    options = {"batched": True, "num_proc": os.cpu_count()}
    data = data.map(tokenise, remove_columns=data.column_names, **options)
    data = data.map(group, **options)
    seconds = time.monotonic() - started
    tokens = sum(len(row) for row in data.with_format("numpy")["input_ids"])
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
