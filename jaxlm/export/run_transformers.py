"""Runs a model folder in transformers, on the CPU in float32; `verify` starts it as a process."""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
import transformers

# Nothing is fetched, and no code that a folder brings is run or asked about.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def main(request: dict) -> None:
    """Answer a request: logits, greedy continuations, ids of texts, what did not load."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **LOCAL,
    )
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"], **LOCAL)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    answer = {"versions": json.dumps(versions)}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            answer["problem"] = f"transformers found {kind}: {sorted(map(str, info[kind]))[:4]}"
    # The model's own settings may ask for sampling or penalties.
    count = request["new_tokens"]
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
    )
    with torch.no_grad():
        for i, prompt in enumerate(request["prompts"]):
            tokens = torch.tensor([prompt])
            answer[f"logits_{i}"] = model(tokens).logits[0].float().numpy()
            made = model.generate(tokens, attention_mask=torch.ones_like(tokens))
            answer[f"greedy_{i}"] = made[0, len(prompt) :].numpy()
    for i, text in enumerate(request["texts"]):
        ids = tokenizer(text, **request["tokenizing"]).input_ids
        answer[f"ids_{i}"] = np.array(ids, np.int64)
    np.savez(request["out"], **answer)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
