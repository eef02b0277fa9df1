"""Exports and imports, whole: written, run in the other stack, compared, moved into place."""

import dataclasses
import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_arguments

import jaxlm
from jaxlm import train
from jaxlm.errors import UserError
from jaxlm.export import __main__ as command
from jaxlm.export import exporter, huggingface, verify
from jaxlm.export.llama import LLAMA
from jaxlm.export.safetensors import INDEX, WEIGHTS, read_tensors
from jaxlm.loading import find_model, load_params, read_model
from jaxlm.mesh import make_mesh
from jaxlm.models.build import make_model
from jaxlm.monitor import read_metrics
from jaxlm.sharding import by_path

SIZES = {
    "vocab_size": 320,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def refuses(*words: str):
    return pytest.raises(UserError, match=".*".join(map(re.escape, words)))


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> Path:
    """The run as transformers' folder; do not write into it."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    report = jaxlm.export_checkpoint(trained_run, to="hf", out=out)
    assert report.verified, report.reason
    return out


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_an_export_says_how_it_compares(exported):
    report = json.loads((exported / verify.REPORT).read_text())
    assert report["verified"] and report["versions"]["transformers"] == transformers.__version__
    assert report["texts_with_equal_ids"] == len(verify.TEXTS)
    for prompt in report["prompts"]:
        assert len(prompt["tokens"]) > 1
        assert prompt["difference"] <= report["largest_difference"] < report["tolerance"]
        assert prompt["greedy"] == "equal" or prompt["greedy"].startswith("a near tie")


def test_transformers_loads_it_without_a_warning(exported, caplog, capfd):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "newly initialized" not in caplog.text + capfd.readouterr().err
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2


def test_transformers_continues_as_generate_does(exported, trained_run):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    for prompt in ("abc", "é you 😀", ""):
        inputs = tokenizer(prompt, return_tensors="pt")
        ours = jaxlm.load(trained_run)
        assert inputs.input_ids[0].tolist() == [*ours.prefix, *ours.tokenizer.encode(prompt)]
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
        theirs = ours.tokenizer.decode_bytes(made[0, inputs.input_ids.shape[1] :].tolist())
        text = jaxlm.generate(ours, prompt, max_new_tokens=12, temperature=0)
        assert text == theirs.decode(errors="replace")


def test_it_is_a_torch_state_dict(exported):
    """What the README shows: the safetensors are the weights, under torch's names."""
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(exported)
    model = transformers.LlamaForCausalLM(config)
    state = load_file(exported / WEIGHTS)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied


def test_back_again_the_parameters_are_identical(exported, trained_run):
    ours = read_model(find_model(trained_run))
    again = read_model(exported)
    jax.tree.map(np.testing.assert_array_equal, ours.params, again.params)
    assert again.config.max_seq_len == ours.config.max_seq_len
    assert (again.prefix, again.tokenizer.vocab_size) == ([1], ours.tokenizer.vocab_size)


def test_matrices_are_cast_as_they_are_read(exported):
    half = jaxlm.load(exported, dtype="bfloat16")
    model, mesh = make_model(half.config.model), make_mesh("dp1")
    whole = load_params(exported, model, mesh)
    params = load_params(exported, model, mesh, dtype=model.dtype)
    for path, leaf in by_path(params).items():
        matrix = path.endswith(("kernel", "embedding"))
        assert leaf.dtype == (jnp.bfloat16 if matrix else jnp.float32), path
    cast = jax.tree.map(lambda x, like: x.astype(like.dtype), whole, params)
    jax.tree.map(np.testing.assert_array_equal, params, cast)
    for path, leaf in by_path(half.program.prepare(whole)).items():
        np.testing.assert_array_equal(by_path(half.params)[path], leaf)


@pytest.mark.slow
def test_an_export_is_loaded_like_a_run(exported, trained_run):
    for mesh in (None, "dp2,tp2"):
        model = jaxlm.load(exported, mesh=mesh)
        assert model.step == 0
        settings = {"max_new_tokens": 6, "temperature": 0}
        wanted = jaxlm.generate(trained_run, "abc", **settings)
        assert jaxlm.generate(model, "abc", **settings) == wanted
    ours, theirs = (jaxlm.score(m, "abc def").logprob for m in (model, trained_run))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_sentencepiece_model_alone_is_a_tokenizer(copy, trained_run):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink()
    ours, again = jaxlm.load(trained_run), jaxlm.load(copy)
    assert again.prefix == ours.prefix
    assert [again.tokenizer.encode(text) for text in verify.TEXTS] == [
        ours.tokenizer.encode(text) for text in verify.TEXTS
    ]


@pytest.mark.slow
def test_training_starts_from_an_export(exported, corpus, trained_run, tmp_path):
    """With its model and its tokenizer, neither of them given."""
    arguments = [a for a in tiny_arguments() if not a.startswith(("--model.", "--tokenizer."))]
    arguments += [f"--data.train={corpus}", f"--data.cache={tmp_path}", f"--out={tmp_path / 'run'}"]
    arguments += [f"--init_from={exported}", "--train.steps=2", "--data.seq_len=32", "--mesh=dp2"]
    arguments = [a for a in arguments if a not in ("--train.steps=60", "--mesh=dp2,tp2")]
    assert train.main(arguments) == 0
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"]
    last = read_metrics(trained_run / "metrics.jsonl")[-1]["valid_loss"]
    assert first < last + 0.7  # a new model would be at log(320) = 5.8
    model = jaxlm.load(tmp_path / "run").config
    assert (model.model.d_model, model.model.max_seq_len, model.seq_len) == (32, 64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_are_compared_with_rounded_weights(trained_run, tmp_path, dtype):
    out = tmp_path / "small"
    report = jaxlm.export_checkpoint(trained_run, out=out, dtype=dtype, shard_gb=3e-5)
    assert report.verified, report.reason
    assert (out / INDEX).exists()
    assert {str(t.dtype) for t in read_tensors(out).values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_a_step_is_chosen(trained_run, tmp_path):
    out = tmp_path / "first"
    jaxlm.export_checkpoint(trained_run, out=out, step=30, skip_verification=True)
    first = read_model(find_model(trained_run / "checkpoints" / "step_00000030"))
    jax.tree.map(np.testing.assert_array_equal, read_model(out).params, first.params)
    steps = {s: find_model(trained_run, s).name for s in ("best", "last")}
    losses = {m["step"]: m.get("valid_loss") for m in read_metrics(trained_run / "metrics.jsonl")}
    best = min((s for s in (30, 60)), key=lambda step: losses[step])
    assert steps == {"best": f"step_{best:08}", "last": "step_00000060"}
    with refuses("has no step '45'", "30, 60"):
        find_model(trained_run, "45")
    with refuses("is one step", "leave out step=30"):
        find_model(trained_run / "checkpoints" / "step_00000060", "30")
    with refuses("is a model without steps", "leave out step=best"):
        find_model(out, "best")


@pytest.mark.slow
def test_the_moving_average_is_exported_unless_told_otherwise(corpus, tmp_path):
    run = tmp_path / "run"
    changes = {"train__steps": 3, "optim__ema_decay": 0.9, "mesh": "dp1", "train__batch_size": 2}
    changes |= {"data__cache": tmp_path, "data__train": corpus}
    assert train.main(tiny_arguments(out=run, **changes)) == 0
    averaged, last = (read_model(find_model(run), average=average) for average in (True, False))
    scales = [model.params["final_norm"]["scale"] for model in (averaged, last)]
    assert not np.array_equal(*scales)
    jaxlm.export_checkpoint(run, out=tmp_path / "a", average=False, skip_verification=True)
    jax.tree.map(np.testing.assert_array_equal, read_model(tmp_path / "a").params, last.params)


@pytest.mark.slow
def test_a_wrong_table_is_found_out_and_nothing_is_left(trained_run, tmp_path, monkeypatch):
    def swapped(row):
        names = {"layers/mlp/gate/kernel": "layers/mlp/up/kernel"}
        names |= {ours: theirs for theirs, ours in names.items()}
        return dataclasses.replace(row, ours=names.get(row.ours, row.ours))

    wrong = dataclasses.replace(LLAMA, tensors=tuple(map(swapped, LLAMA.tensors)))
    monkeypatch.setattr(exporter, "family_for", lambda config, name: wrong)
    with refuses("transformers runs another model", "prompt 0 differs at position"):
        jaxlm.export_checkpoint(trained_run, out=tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e30, "float16")])
def test_a_model_that_computes_no_numbers_is_not_called_verified(exported, tmp_path, value, dtype):
    model = read_model(exported)
    scale = model.params["final_norm"]["scale"].at[0].set(value)
    model = dataclasses.replace(model, params=model.params | {"final_norm": {"scale": scale}})
    with refuses("numbers that are not finite"):
        exporter.export_model(model, "hf", tmp_path / "hf", dtype=dtype, say=print)
    assert list(tmp_path.iterdir()) == []


EXPECTED = verify.Expected([[1, 2]], [[0, 1]], [np.float32([[1, 0], [1, 0], [0, 1], [0, 1]])], [[]])


@pytest.mark.parametrize(
    ("logits", "greedy", "words"),
    [
        ([[1, 0], [1, np.nan]], [0, 1], "differs at position 1 by inf"),
        ([[1, 0], [1, 1e-3]], [0, 1], "differs at position 1 by 1.0e-03"),
        ([[1, 0], [1, 0]], [1, 1], "different at token 0: 0 here, 1 there"),
        ([[1, 0], [1, 0]], [0], "gave 1 greedy tokens where there are 2"),
        ([[1, 0]], [0, 1], "gave logits (1, 2) where there are (2, 2)"),
        ([[1, 0], [1, 9e-5]], [0, 1], ""),
    ],
)
def test_what_an_answer_lacks_is_said(logits, greedy, words):
    answer = {"logits_0": np.float32(logits), "greedy_0": np.array(greedy)}
    try:
        result = verify._compare_prompt(verify.TRANSFORMERS, EXPECTED, 0, answer, 1e-4)
    except UserError as error:
        said = str(error)
    else:
        said = verify._prompt_problem(0, result, 1e-4)
    assert words in said and bool(words) == bool(said)


def test_without_the_other_stack_it_is_unverified_and_says_so(
    trained_run, tmp_path, monkeypatch, capsys
):
    stack = verify.Stack(("not_installed",), "hf", "run_transformers.py", {"float32": 1e-4})
    monkeypatch.setitem(exporter.STACKS, "hf", stack)
    assert command.main([str(trained_run), "--to=hf", f"--out={tmp_path / 'hf'}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("unverified: ") and "pip install 'jaxlm[hf]'" in last
    assert not json.loads((tmp_path / "hf" / verify.REPORT).read_text())["verified"]


def test_the_command_prints_one_line(trained_run, tmp_path, capsys):
    assert command.main([str(trained_run), "--to=stablehlo", f"--out={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"verified: {tmp_path / 'out'} in jax "), lines
    assert json.loads((tmp_path / "out" / verify.REPORT).read_text())["verified"]


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_llama_cpp_runs_it(trained_run, tmp_path, dtype):
    pytest.importorskip("xllamacpp")
    report = jaxlm.export_checkpoint(trained_run, to="gguf", out=tmp_path / "gguf", dtype=dtype)
    assert report.verified, report.reason
    assert {p.name for p in (tmp_path / "gguf").iterdir()} == {"model.gguf", verify.REPORT}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to=onnx", "--out=x"], ["--to", "'onnx'"]),
        (["--out=x"], ["give --to", "hf, gguf, stablehlo"]),
        (["--to=hf", "--out={here}"], ["exists", "give another folder"]),
        (["--to=hf", "--out=x", "--dtype=q8_0"], ["dtype='q8_0'", "float32, bfloat16, float16"]),
        (["--to=hf", "--out=x", "--family=lama"], ["'lama' has no table", "'llama'"]),
        (["--to=hf", "--out=x", "--family=gpt2"], ["cannot be written as gpt2"]),
        (["--to=hf", "--out=x", "--step=7"], ["has no step '7'"]),
        (["--to=hf", "--out=x", "--shard_gb=0"], ["shard_gb=0.0 is no size"]),
        (["--to=hf", "--out=x", "--shard_gb=nan"], ["shard_gb=nan is no size"]),
        (["--to=gguf", "--out=x", "--shard_gb=1"], ["in one file", "leave out shard_gb"]),
        (["--to=stablehlo", "--out=x", "--family=llama"], ["no families"]),
        (["--check", "--to=hf"], ["--check writes nothing", "--to"]),
        (["--check"], ["has no config.json"]),
        (["--shards=3"], ["did you mean '--shard_gb'"]),
    ],
)
def test_wrong_arguments_are_one_sentence(trained_run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(here=tmp_path) for a in arguments]
    with refuses(*words):
        command.main([str(trained_run), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(trained_run, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", full)
    with refuses("has no space left", "nothing was kept"):
        jaxlm.export_checkpoint(trained_run, out=tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def change(folder: Path, **settings):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "left out"}))


def rewrite(folder: Path, drop: str | None = None, add: dict | None = None):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    tensors.pop(drop, None)
    save_file(tensors | (add or {}), folder / WEIGHTS)


NORM = "model.norm.weight"
SPOILT = {
    "unknown type": (lambda f: change(f, model_type="lama"), ["'lama'", "'llama'", "it has llama"]),
    "no settings": (lambda f: (f / "config.json").write_text("{"), ["config.json cannot be read"]),
    "other size": (lambda f: change(f, intermediate_size=65), ["has shape (64, 32)", "(65, 32)"]),
    "quantised": (lambda f: change(f, quantization_config={"bits": 4}), ["is quantised"]),
    "no size": (lambda f: change(f, hidden_size="left out"), ["has no 'hidden_size'"]),
    "missing": (lambda f: rewrite(f, drop=NORM), [f"lacks {NORM}"]),
    "extra": (lambda f: rewrite(f, add={"x": np.zeros(2, np.float32)}), ["has unknown x"]),
    "shape": (lambda f: rewrite(f, add={NORM: np.zeros(3, np.float32)}), [NORM, "(3,)", "(32,)"]),
    "cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        ["ends inside tensor"],
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ["not a tokenizer that can"]),
    "small": (lambda f: change(f, vocab_size=300), ["320 ids", "only 300"]),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=list(SPOILT))
def test_a_spoilt_folder_is_one_sentence(copy, spoil):
    act, words = spoil
    act(copy)
    with refuses(*words):
        jaxlm.load(copy)


@pytest.mark.slow
def test_a_foreign_folder_is_checked(exported, capsys):
    assert command.main(["--check", str(exported)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "all 20 tensors come back byte for byte" in lines[1], lines
    assert lines[-1].startswith("verified: ")


@pytest.mark.slow
def test_code_in_a_folder_is_not_run(copy, tmp_path):
    mark = tmp_path / "was_run"
    (copy / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass A: pass\n")
    change(copy, auto_map={"AutoConfig": "code.A", "AutoModelForCausalLM": "code.A"})
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["code.A", "code.A"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert command.main([str(copy), "--check"]) == 0
    assert jaxlm.load(copy) and not mark.exists()


@pytest.mark.slow
def test_a_model_without_begin_token_is_continued_without(corpus, tmp_path):
    """GPT-2's tokenizer puts nothing in front of a prompt, and neither does generate."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(corpus.iterdir())], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=320, n_positions=32, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = jaxlm.load(tmp_path)
    assert model.prefix == ()
    ids = torch.tensor([model.tokenizer.encode("abc")])
    made = theirs.generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    wanted = model.tokenizer.decode(made[0, ids.shape[1] :].tolist())
    assert jaxlm.generate(model, "abc", max_new_tokens=8, temperature=0) == wanted
    assert jaxlm.score(model, "abc").tokens[0] == model.tokenizer.bos_id
    assert command.main(["--check", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Mixtral", "Gemma3", "GPTNeoX"])
def test_other_blocks_become_stablehlo(kind, exported, tmp_path):
    """Experts, windows and parallel blocks, with open batch and length."""
    torch.manual_seed(0)
    name = kind + ("TextConfig" if kind == "Gemma3" else "Config")
    settings = SIZES | {"sliding_window": 8, "num_local_experts": 3, "head_dim": 6}
    if kind == "GPTNeoX":
        settings["rope_parameters"] = {"rope_theta": 100.0, "partial_rotary_factor": 0.4}
    config = getattr(transformers, name)(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "theirs")
    for file in exported.glob("*token*"):
        shutil.copy(file, tmp_path / "theirs")
    report = jaxlm.export_checkpoint(tmp_path / "theirs", to="stablehlo", out=tmp_path / "out")
    assert report.verified, report.reason


@pytest.mark.slow
def test_trained_on_eight_devices_it_continues_alike(corpus, tmp_path):
    changes = {"mesh": "pp2,fsdp2,tp2", "train__steps": 8, "train__eval_every": 8}
    changes |= {"out": tmp_path / "run", "data__cache": tmp_path, "data__train": corpus}
    assert train.main(tiny_arguments(**changes)) == 0
    report = jaxlm.export_checkpoint(tmp_path / "run", out=tmp_path / "hf")
    assert report.verified, report.reason
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = tokenizer("abc", return_tensors="pt").input_ids
    made = theirs.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    text = jaxlm.generate(tmp_path / "run", "abc", max_new_tokens=10, temperature=0)
    ours = jaxlm.load(tmp_path / "run").tokenizer
    assert text == ours.decode_bytes(made[0, ids.shape[1] :].tolist()).decode(errors="replace")


MEMORY = """
import sys, threading, time
import jax
from pathlib import Path
from jaxlm.loading import read_description, load_params
from jaxlm.models.decoder import Decoder
from jaxlm.mesh import make_mesh

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))

folder = Path(sys.argv[1])
config, *_ = read_description(folder)
mesh = make_mesh(sys.argv[2])
jax.block_until_ready(jax.numpy.zeros(3))
before, most, done = held(), [0], threading.Event()

def watch():
    while not done.is_set():
        most[0] = max(most[0], held())
        time.sleep(0.002)

# A daemon: what fails below should end the process.
thread = threading.Thread(target=watch, daemon=True)
thread.start()
params = jax.block_until_ready(load_params(folder, Decoder(config.model), mesh))
done.set()
thread.join()
total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(most[0] - before - total, total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("mesh", ["dp1", "fsdp2,tp2"])
def test_reading_takes_no_more_memory_than_the_largest_tensor(exported, tmp_path, mesh):
    """Beyond the parameters themselves, and what compiling a few small programs takes."""
    config = transformers.LlamaConfig(
        vocab_size=24000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    # What is empty may hold anything, and the tied head something else than the embedding.
    model.to_empty(device="cpu").bfloat16().tie_weights()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    for file in exported.glob("*token*"):
        shutil.copy(file, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), mesh],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    beyond, total = map(int, done.stdout.split())
    largest = 24000 * 768 * 4
    print(f"{beyond / 1e6:.0f} MB beyond parameters of {total / 1e6:.0f} MB")
    assert total > 5 * largest
    assert beyond < largest + 100e6


def test_source_that_is_not_installed_has_no_version(monkeypatch):
    real = verify.importlib.metadata.version

    def version(name):
        if name == "jaxlm":
            raise verify.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(verify.importlib.metadata, "version", version)
    assert verify._versions().keys() == {"jax", "numpy"}
