"""Recurrent language models and sequence to sequence: rows, caches, dropout, meshes, learning."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tiny import exact, make_program, tiny_config

from jaxlm.cli import build_config
from jaxlm.decode import Sampling, build_decode_program
from jaxlm.errors import UserError
from jaxlm.export.stablehlo import write_stablehlo
from jaxlm.mesh import make_mesh
from jaxlm.misfit import check_fits
from jaxlm.model_config import ModelConfig
from jaxlm.models.build import make_model
from jaxlm.models.recurrent import RecurrentModel, reverse_segments
from jaxlm.models.stack import unstack
from jaxlm.nn.attention import Places, Source
from jaxlm.nn.layers import Dropout
from jaxlm.optim import make_optimizer
from jaxlm.parity import random_batch
from jaxlm.sharding import path_name, split_boxes
from jaxlm.tasks.batch import Batch, batch_loss

KINDS = ["rnn", "gru", "lstm"]
TINY = {
    "kind": "lstm",
    "vocab_size": 31,
    "max_seq_len": 24,
    "d_model": 12,
    "num_layers": 2,
    "init_std": 0.4,
}
SEQ2SEQ = {"encoder_layers": 2, "source_attention": True}
TARGETS = [1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0]
SOURCES = [1, 1, 2, 2, 2, 2, 3, 0]


def model_of(**fields) -> RecurrentModel:
    return make_model(ModelConfig(**TINY | fields))


@functools.cache
def params_of(model: RecurrentModel):
    return jax.jit(lambda key: split_boxes(model.init(key))[0])(jax.random.key(0))


def tokens_of(segments, seed: int = 0):
    """One row of random tokens of the segments given, and its places."""
    positions = [segments[:i].count(segment) for i, segment in enumerate(segments)]
    segments = np.array([segments], np.int32)
    tokens = np.random.default_rng(seed).integers(1, TINY["vocab_size"], segments.shape, np.int32)
    places = Places(jnp.asarray([positions], jnp.int32), jnp.asarray(segments))
    return jnp.asarray(tokens), places


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, params, tokens, places, cache=None, source=None):
    """Hidden states and the cache."""
    hidden, _, cache = model.hidden(params, tokens, places, cache=cache, source=source)
    return hidden, cache


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, places, dropout=None, source=None):
    """Logits of every position."""
    return model.logits(params, model.hidden(params, tokens, places, dropout, source=source)[0])


def part(tree, begin: int, end: int):
    """Columns of rows of tokens and places."""
    return jax.tree.map(lambda x: x[:, begin:end], tree)


# -- language models ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_and_padding_in_front_are_as_texts_alone(kind):
    model = model_of(kind=kind)
    tokens, places = tokens_of([0, 0, 1, 1, 1, 1, 2, 2, 2, 0])
    packed = run(model, params_of(model), tokens, places)
    for begin, end in ((2, 6), (6, 9)):
        alone = Places(jnp.arange(end - begin)[None])
        logits = run(model, params_of(model), tokens[:, begin:end], alone)
        np.testing.assert_allclose(packed[:, begin:end], logits, atol=1e-5)


def test_the_model_is_torchs_stack_between_an_embedding_and_a_head():
    model = model_of(tie_embeddings=False)
    params = params_of(model)
    tokens, _ = tokens_of([1] * 9)
    stack = torch.nn.LSTM(12, 12, num_layers=2, batch_first=True)
    with torch.no_grad():
        for layer in range(2):
            for ours, theirs in (("input", "ih"), ("recurrent", "hh")):
                weights = jax.tree.map(lambda x, i=layer: np.asarray(x[i]), params["layers"][ours])
                kernel = weights["kernel"].transpose(1, 2, 0).reshape(-1, 12)
                getattr(stack, f"weight_{theirs}_l{layer}").copy_(torch.tensor(kernel))
                bias = torch.tensor(weights["bias"].reshape(-1))
                getattr(stack, f"bias_{theirs}_l{layer}").copy_(bias)
        embedded = torch.tensor(np.array(params["embed"]["embedding"]))[np.asarray(tokens)]
        logits = stack(embedded)[0] @ torch.tensor(np.asarray(params["head"]["kernel"]))
    ours = run(model, params, tokens, Places(jnp.arange(9)[None]))
    np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_greedy_without_a_cache_and_the_same_in_any_batch(kind):
    model = model_of(kind=kind)
    program = build_decode_program(model, make_mesh("dp1"))
    params = program.prepare(params_of(model))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature=0.0), "eos_id": None}
    made = list(program.generate(params, prompts, **options))[-1]
    for prompt, continuation in zip(prompts, made, strict=True):
        text = list(prompt)
        for _ in range(8):
            padded = jnp.asarray([text + [0] * (16 - len(text))], jnp.int32)
            logits = run(model, params_of(model), padded, Places(jnp.arange(16)[None]))
            text.append(int(logits[0, len(text) - 1].argmax()))
        assert continuation == text[len(prompt) :]
    assert len({tuple(text) for text in made}) == 3


@pytest.mark.parametrize("fields", [{"stack": "unroll"}, {"remat": "full"}], ids=str)
def test_ways_of_running_the_stack_agree(fields):
    model, other = model_of(), model_of(**fields)
    tokens, places = tokens_of(TARGETS)
    loss = lambda model, p: jnp.square(run(model, p, tokens, places)).sum()  # noqa: E731
    wanted = jax.grad(functools.partial(loss, model))(params_of(model))
    got = jax.grad(functools.partial(loss, other))(params_of(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


# -- dropout --------------------------------------------------------------------------------

RATES = ["dropout", "recurrent_dropout", "word_dropout"]


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_depends_on_the_place_of_the_first_token_alone(rate):
    model = model_of(**{rate: 0.5})
    tokens, places = tokens_of([1, 1, 1, 2, 2, 2])
    tokens = tokens.at[:, 3:].set(tokens[:, :3])
    key = jax.random.key(0)
    drop = functools.partial(run, model, params_of(model), tokens, places)
    one = drop(Dropout(key, jnp.arange(6, dtype=jnp.uint32)[None]))
    assert not np.allclose(one[:, :3], one[:, 3:], atol=1e-3)
    assert not np.allclose(one, drop(None), atol=1e-3)
    elsewhere = Dropout(key, jnp.asarray([[0, 9, 9, 0, 9, 9]], jnp.uint32))
    same = drop(elsewhere)
    np.testing.assert_allclose(same[:, :3], one[:, :3], atol=1e-6)
    np.testing.assert_allclose(same[:, 3:], one[:, :3], atol=1e-6)


# -- sequence to sequence -------------------------------------------------------------------


def test_sources_are_reversed_within_their_segments():
    tokens = jnp.asarray([[9, 9, 1, 2, 3, 4, 5, 9]])
    segments = jnp.asarray([[0, 0, 1, 1, 1, 2, 2, 0]])
    assert reverse_segments(tokens, segments).tolist() == [[9, 9, 3, 2, 1, 5, 4, 9]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [True, False], ids=["reversed", "in order"])
def test_a_target_begins_where_its_source_ended(kind, reverse):
    """The pair is read as one text with two stacks: first the encoder's, then the decoder's."""
    model = model_of(kind=kind, encoder_layers=2, reverse_source=reverse)
    params = params_of(model)
    source, read = tokens_of([1] * 5, seed=1)
    tokens, places = tokens_of([1] * 4, seed=2)
    got = run(model, params, tokens, places, source=Source(source, read))

    alone = model_of(kind=kind)
    rest = {"embed": params["embed"]}
    cache = alone.init_cache(1, 16)
    order = source[:, ::-1] if reverse else source
    encoder = rest | {"layers": unstack(params["encoder_layers"])}
    _, cache = hidden_of(alone, encoder, order, read, cache)
    decoder = rest | {"layers": unstack(params["layers"])}
    hidden, _ = hidden_of(alone, decoder, tokens, places, cache)
    np.testing.assert_allclose(got, alone.logits(rest, hidden), atol=1e-5)


def test_attention_is_a_loop_over_source_tokens():
    model = model_of(**SEQ2SEQ)
    params = params_of(model)
    (source, read), (tokens, places) = tokens_of(SOURCES, seed=1), tokens_of(TARGETS, seed=2)
    without = model_of(encoder_layers=2)
    queries, _ = hidden_of(without, params, tokens, places, source=Source(source, read))
    unstacked = params | {name: unstack(params[name]) for name in model.stacks}
    cache = model.init_cache(1, len(TARGETS), len(SOURCES))
    got, cache = hidden_of(model, unstacked, tokens, places, cache, Source(source, read))
    outputs = np.asarray(cache.memory.outputs[0], np.float64)
    queries = np.asarray(queries[0], np.float64)
    wanted = []
    for query, segment in zip(queries, TARGETS, strict=True):
        own = [h for h, number in zip(outputs, SOURCES, strict=True) if number == segment]
        weights = np.exp([query @ h for h in own])
        context = sum(w * h for w, h in zip(weights / weights.sum(), own, strict=True))
        kernel = np.asarray(params["source_attention"]["kernel"], np.float64)
        wanted.append(np.tanh(np.concatenate([context, query]) @ kernel))
    np.testing.assert_allclose(got[0, :9], np.array(wanted)[:9], atol=1e-5)


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "states alone"])
def test_packed_pairs_are_as_pairs_alone(attention):
    model = model_of(encoder_layers=2, source_attention=attention)
    params = params_of(model)
    source = Source(*tokens_of(SOURCES, seed=1))
    target = tokens_of(TARGETS, seed=2)
    packed = run(model, params, *target, source=source)
    for read, written in (((0, 2), (0, 4)), ((2, 6), (4, 7)), ((6, 7), (7, 9))):
        alone = run(model, params, *part(target, *written), source=part(source, *read))
        np.testing.assert_allclose(packed[:, slice(*written)], alone, atol=1e-5)
    other = Source(source.tokens.at[:, 2:6].add(1) % 31, source.places)
    changed = np.abs(run(model, params, *target, source=other) - packed).max(-1)[0]
    assert changed[4:7].min() > 1e-3 and changed[:4].max() == changed[7:9].max() == 0


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "states alone"])
def test_a_cache_keeps_what_later_steps_need_of_the_source(attention):
    model = model_of(encoder_layers=2, source_attention=attention)
    params = params_of(model)
    source = Source(*tokens_of([0, 0, 1, 1, 1, 1], seed=1))
    tokens, places = tokens_of([0, 1, 1, 1, 1, 1], seed=2)
    whole = run(model, params, tokens, places, source=source)
    unstacked = params | {name: unstack(params[name]) for name in model.stacks}
    cache = model.init_cache(1, 16, source_length=6)
    rows = {x.shape[0] for x in jax.tree.leaves(cache) if x.ndim}
    assert rows == {1}
    shapes = jax.tree.map(jnp.shape, cache)
    for begin, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
        step = part((tokens, places), begin, end)
        hidden, cache = hidden_of(model, unstacked, *step, cache, source)
        source = None
        logits = model.logits(params, hidden)
        np.testing.assert_allclose(logits[:, -1], whole[:, end - 1], atol=1e-5)
        assert jax.tree.map(jnp.shape, cache) == shapes


def test_a_model_with_an_encoder_needs_a_source_and_another_none():
    model = model_of(encoder_layers=2)
    with pytest.raises(ValueError, match="needs a source"):
        model.hidden(params_of(model), *tokens_of([1, 1]))
    with pytest.raises(ValueError, match="reads no source"):
        model_of().hidden(params_of(model), *tokens_of([1]), source=Source(*tokens_of([1])))


# -- meshes ---------------------------------------------------------------------------------

MESHES = ["dp2,fsdp2,tp2"]
MORE_MESHES = ["dp8", "fsdp8", "tp3", "dp2,tp2 accumulation"]
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES]


@functools.cache
def trained(case: str):
    """Initial parameters, losses and first gradients of sequence to sequence with dropout."""
    mesh, *extras = case.split()
    model = TINY | SEQ2SEQ | {"vocab_size": 101, "num_layers": 2} | dict.fromkeys(RATES, 0.2)
    train = {"accumulation": 2 if extras else 1, "batch_size": 24, "loss_block": 8}
    config = build_config(
        {"task": "translation", "model": model, "train": train, "optim": {"warmup_steps": 2}}
    )

    def remembering(axes):
        memory = optax.GradientTransformation(
            lambda params: jax.tree.map(jnp.zeros_like, params),
            lambda updates, state, params=None: (updates, updates),
        )
        return optax.chain(memory, make_optimizer(config.optim, axes))

    program = make_program(config, mesh, remembering)
    with jax.default_matmul_precision("highest"):
        state = program.init()
        params, losses = exact(program, state).params, []
        for step in range(2):
            state, metrics = program.train_step(state, program.put(random_batch(config, step)))
            losses.append(float(metrics["loss"]))
            if step == 0:
                gradients = exact(program, state).opt_state[0]
    return params, losses, gradients


@pytest.mark.parametrize("case", MESHES)
@pytest.mark.slow
def test_a_mesh_trains_the_same_with_the_same_masks(case):
    params, losses, gradients = trained(case)
    one_params, one_losses, one_gradients = trained("dp1")
    jax.tree.map(np.testing.assert_array_equal, params, one_params)
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
    total = float(optax.tree.norm(one_gradients))
    for (path, wanted), got in zip(
        jax.tree_util.tree_leaves_with_path(one_gradients), jax.tree.leaves(gradients), strict=True
    ):
        allowed = 1e-5 * max(np.linalg.norm(wanted), 0.1 * total)
        assert np.linalg.norm(got - wanted) <= allowed, path_name(path)
        assert np.linalg.norm(wanted) > 0, path_name(path)


@pytest.mark.parametrize("mesh", ["dp2,tp2"])
@pytest.mark.slow
def test_a_mesh_generates_the_same(mesh):
    config, made = build_config({"model": TINY, "train": {"batch_size": 24}}), []
    for name in ("dp1", mesh):
        program = build_decode_program(make_model(config.model), make_mesh(name))
        params = program.prepare(make_program(config, name).init().params)
        options = {"max_new_tokens": 6, "sampling": Sampling(temperature=0.0), "eos_id": None}
        made += [list(program.generate(params, [[1, 2], [3, 4, 5]], **options))[-1]]
    assert len(set(map(tuple, made[0]))) == 2
    assert made[0] == made[1]


# -- learning -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_reversal_is_learnt(kind):
    """Of sources whose order is kept, so that the state alone has to hold it."""
    config = ModelConfig(
        kind=kind, vocab_size=10, d_model=48, num_layers=1, encoder_layers=1, init_std=0.1,
        source_attention=True,
    )  # fmt: skip
    model = make_model(config)
    length = 5

    def batch(key):
        words = jax.random.randint(key, (64, length), 1, 10)
        places = Places(jnp.broadcast_to(jnp.arange(length), words.shape), jnp.ones_like(words))
        targets = words[:, ::-1]
        tokens = jnp.concatenate([jnp.zeros_like(words[:, :1]), targets[:, :-1]], 1)
        weights = jnp.ones(words.shape)
        return Batch(
            tokens, targets, weights, places.segments, places.positions, Source(words, places)
        )

    train = tiny_config().train
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 500))

    @jax.jit
    def update(params, state, key):
        def loss(params):
            total, sums, _ = batch_loss(model, params, batch(key), train, None)
            return total / sums.weight

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params = split_boxes(model.init(jax.random.key(0)))[0]
    state = optimizer.init(params)
    for step in range(500):
        params, state, value = update(params, state, jax.random.key(step))
    assert value < 0.05


# -- what is refused ------------------------------------------------------------------------

REFUSED = [
    ({"encoder_layers": 3}, ["model.encoder_layers=3", "model.num_layers=2", "the same number"]),
    ({"num_heads": 4}, ["model.num_heads=4", "a Transformer"]),
    ({"norm_eps": 1e-6}, ["model.norm_eps=1e-06", "a Transformer"]),
    ({"source_attention": True}, ["model.source_attention=true", "model.encoder_layers"]),
    ({"reverse_source": False}, ["model.reverse_source=false", "model.encoder_layers"]),
    ({"kind": "decoder", "d_model": 16, "recurrent_dropout": 0.1}, ["recurrent_dropout", "lstm"]),
]


@pytest.mark.parametrize(("fields", "fragments"), REFUSED, ids=lambda x: str(x)[:50])
def test_fields_that_do_not_fit_are_refused_in_a_sentence(fields, fragments):
    with pytest.raises(UserError) as caught:
        build_config({"model": TINY | fields})
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize("mesh", ["pp2", "cp2", "ep2"])
def test_an_axis_that_cannot_split_a_recurrence_is_refused(mesh):
    config = build_config({"model": TINY, "train": {"batch_size": 8}})
    with pytest.raises(UserError, match=f"model.kind=lstm .* {mesh[:2]}=2 .* use dp, fsdp and tp"):
        check_fits(config, make_mesh(mesh))
    check_fits(config, make_mesh("dp2,fsdp2,tp2"))
    with pytest.raises(UserError, match="micro-batches of 8 rows"):
        check_fits(config, make_mesh("dp3"))


@pytest.mark.parametrize(
    ("task", "layers", "fragment"),
    [
        ("translation", None, "encoder_layers=null does not fit task=translation.* set it to 2"),
        (
            "language_modelling",
            2,
            "encoder_layers=2 does not fit .* leave it out",
        ),
    ],
)
def test_a_task_and_an_encoder_go_together(task, layers, fragment):
    with pytest.raises(UserError, match=fragment):
        build_config({"task": task, "model": TINY | {"encoder_layers": layers}})


def test_an_export_that_is_of_decoders_is_refused(tmp_path):
    model = types.SimpleNamespace(config=model_of().config)
    with pytest.raises(UserError, match=r"model\.kind=decoder alone, and this is of kind lstm"):
        write_stablehlo(tmp_path, model, "float32")


def test_a_recurrent_model_needs_a_vocabulary():
    with pytest.raises(UserError, match="vocab_size is not set"):
        make_model(ModelConfig(kind="gru"))
