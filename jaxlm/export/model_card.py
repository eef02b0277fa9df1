"""The README.md of an exported model: what it is, and how it is used."""

from jaxlm.export.model import Model

TASKS = {
    "language_model": ("text-generation", "A language model"),
    "translator": ("translation", "A model that writes a text for a text"),
    "classifier": ("text-classification", "A classifier of texts"),
    "encoder": ("feature-extraction", "An encoder of texts"),
}
SNIPPETS = {
    "language_model": (
        "AutoModelForCausalLM",
        'inputs = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n",
    ),
    "translator": (
        "AutoModelForSeq2SeqLM",
        'inputs = tokenizer("{tag}Hello", return_tensors="pt"{options})\n'
        "made = model.generate(**inputs)[0]\n"
        "print(tokenizer.decode(made, skip_special_tokens=True))\n",
    ),
    "classifier": (
        "AutoModelForSequenceClassification",
        'inputs = tokenizer("I like it", return_tensors="pt")\n'
        "shares = model(**inputs).logits[0].softmax(-1).tolist()\n"
        "print(dict(zip(model.config.id2label.values(), shares)))\n",
    ),
    "encoder": (
        "AutoModel",
        'inputs = tokenizer("Once", return_tensors="pt")\n'
        "print(model(**inputs).last_hidden_state)\n",
    ),
}


def model_card(model: Model, architecture: str, dtype: str) -> str:
    """The card of a model in the form of transformers' `architecture`, its weights in `dtype`."""
    c = model.config
    task, what = TASKS[model.use]
    if c.kind == "encoder_decoder":
        layers = f"{c.source_layers} + {c.num_layers} layers"
    else:
        layers = f"{c.num_layers} layers"
    labels = "" if c.labels is None else f" Its labels are {', '.join(map(str, c.labels))}."
    facts = "".join(f"| {name} | {value} |\n" for name, value in model.facts.items())
    auto, snippet = SNIPPETS[model.use]
    tag, options = _control(model)
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- jaxlm\n---\n\n"
        f"# {model.name}\n\n"
        f"{what} trained with jaxlm, in the form of `{architecture}`: {layers}, width {c.d_model}, "
        f"{c.num_heads} heads, vocabulary {c.vocab_size}, texts of up to {c.max_seq_len} tokens, "
        f"weights in {dtype}.{labels}\n\n"
        f"| | |\n|---|---|\n{facts}\n"
        "```python\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        'folder = "."\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(folder)\n"
        f"{snippet.replace('{tag}', tag).replace('{options}', options)}"
        "```\n\n"
        "`verification.json` says how the numbers of these files in transformers compare with "
        "those of the model they were written from.\n"
    )


def _control(model: Model) -> tuple[str, str]:
    """The first tag of a target language, and what makes the tokenizer see it as one."""
    tags = sorted(name for name in model.tokenizer.special_ids if name.startswith(">>"))
    return (tags[0], ", split_special_tokens=False") if tags else ("", "")
