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
CLASSES = {
    "language_model": "AutoModelForCausalLM",
    "translator": "AutoModelForSeq2SeqLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}


def main(request: dict) -> None:
    """Answer a request: what it makes of prompts, ids of texts, what did not load."""
    model, info = getattr(transformers, CLASSES[request["use"]]).from_pretrained(
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
    with torch.no_grad():
        for i, prompt in enumerate(request["prompts"]):
            source = torch.tensor([request["sources"][i]]) if request["sources"] else None
            found = run(model, request, torch.tensor([prompt]), source)
            answer |= {f"{name}_{i}": values for name, values in found.items()}
    for i, text in enumerate(request["texts"]):
        ids = tokenizer(text, **request["tokenizing"]).input_ids
        answer[f"ids_{i}"] = np.array(ids, np.int64)
    np.savez(request["out"], **answer)


def run(model, request: dict, tokens, source) -> dict:
    """What the model makes of a prompt [1, T]; `source` [1, S] is what its encoder reads."""
    if request["use"] == "encoder":
        return {"logits": model(tokens).last_hidden_state[0].float().numpy()}
    if request["use"] == "classifier":
        return {"logits": model(tokens).logits.float().numpy()}
    count, start = request["new_tokens"], int(tokens[0, 0])
    reads = {"input_ids": tokens if source is None else source}
    reads["attention_mask"] = torch.ones_like(reads["input_ids"])
    target = {} if source is None else {"decoder_input_ids": tokens}

    def generate(inputs: dict, **options):
        # The model's own settings may ask for sampling or penalties.
        options |= {} if source is None else {"decoder_start_token_id": start}
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=count, pad_token_id=0, **options
        )
        return model.generate(**inputs, return_dict_in_generate=True, output_scores=True)

    made = generate(reads | target, min_new_tokens=count)
    answer = {
        "logits": model(**reads, **target).logits[0].float().numpy(),
        "greedy": made.sequences[0, tokens.shape[1] :].numpy(),
    }
    if source is not None:
        made = generate(reads, num_beams=request["num_beams"], eos_token_id=request["end"])
        text = [*made.sequences[0, 1:].tolist(), request["end"]]
        answer["beams"] = np.array(text[: text.index(request["end"])], np.int64)
        answer["beams_score"] = made.sequences_scores[0].numpy()
    return answer


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
