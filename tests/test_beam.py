"""Beam search: against a reference, against `transformers`, on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_decode import GREEDY, PROMPTS, generate, program_and_params
from test_export_families import CASES, build, placed
from test_models_encoder_decoder import VOCABULARY, marian, t5

from jaxlm.beam import Beams
from jaxlm.collectives import collectives
from jaxlm.decode import build_decode_program
from jaxlm.mesh import make_mesh
from jaxlm.models.decoder import Decoder

torch.set_num_threads(1)

NEW_TOKENS = 9
EOS = 7


def search(beams, prompts=PROMPTS, mesh="dp1", max_new_tokens=12, eos_id=None):
    program, params = program_and_params(mesh)
    return program.beam_search(
        params, prompts, max_new_tokens=max_new_tokens, beams=beams, eos_id=eos_id
    )


def texts_of(found):
    return [[h.tokens for h in row] for row in found]


def test_one_beam_is_greedy():
    free = generate(PROMPTS)
    for eos, early_stopping in ((None, True), (free[0][4], False), (free[0][4], "never")):
        greedy = generate(PROMPTS, GREEDY, eos_id=eos)
        found = search(Beams(1, early_stopping=early_stopping), eos_id=eos)
        assert [row[0].tokens for row in found] == greedy


def test_a_row_is_the_same_alone_and_in_any_batch():
    together = search(Beams(3), eos_id=EOS)
    reversed_ = search(Beams(3), PROMPTS[::-1], eos_id=EOS)
    assert texts_of(reversed_) == texts_of(together)[::-1]
    assert texts_of(search(Beams(3), [PROMPTS[1]], eos_id=EOS)) == texts_of(together)[1:2]


def test_the_longest_text_ends_a_row():
    long, short = list(range(60)), [1, 2]
    found = search(Beams(3), [long, short])
    assert [{len(h.tokens) for h in row} for row in found] == [{4}, {12}]
    assert texts_of(found)[1:] == texts_of(search(Beams(3), [short]))


def test_scores_are_the_log_probability_by_length():
    program, params = program_and_params()
    for prompt, row in zip(PROMPTS, search(Beams(3, 0.6)), strict=True):
        scores = [h.score for h in row]
        assert scores == sorted(scores, reverse=True)
        for h in row:
            (logprobs,) = program.score(params, [prompt + h.tokens])
            total = logprobs[len(prompt) - 1 :].sum()
            assert h.score == pytest.approx(total / len(h.tokens) ** 0.6, rel=1e-4)


@pytest.mark.parametrize("mesh", ["dp4,tp2", pytest.param("fsdp2,tp3", marks=pytest.mark.slow)])
def test_a_mesh_finds_the_same(mesh):
    one = search(Beams(3), eos_id=EOS)
    assert texts_of(search(Beams(3), mesh=mesh, eos_id=EOS)) == texts_of(one)


@pytest.mark.parametrize("mesh", ["dp4", pytest.param("dp2,tp2", marks=pytest.mark.slow)])
def test_rows_stay_on_their_device(mesh):
    program, params = program_and_params(mesh)
    prompt = program._prompt(PROMPTS, None)
    settings = Beams(3).numbers(), np.int32(EOS), np.full(4, 12, np.int32)
    compiled = program._search.lower(3, 16, params, prompt, settings, np.int32(-1)).compile()
    sent = collectives(compiled.as_text(), program.mesh)
    # Whether all rows are closed, and their lengths.
    assert all(c.bytes <= 64 for c in sent if "dp" in c.axes), sent


def test_nothing_is_compiled_again_for_other_penalties_and_lengths(compilations):
    search(Beams(3), [PROMPTS[0]])
    before = len(compilations)
    search(Beams(3, 0.6, "never"), [PROMPTS[2]], max_new_tokens=7, eos_id=EOS)
    search(Beams(3, 2.0, early_stopping=True), [PROMPTS[3]], max_new_tokens=16)
    assert len(compilations) == before
    search(Beams(2), [PROMPTS[0]])
    assert len(compilations) > before


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    """(a random model of transformers, the same here: a decode program and its parameters)."""
    model = build(*CASES[request.param])
    with torch.no_grad():
        # Less sure of itself, so that beams part and meet again, and ends of text are not rare.
        head = model.get_output_embeddings().weight
        head *= 0.25
        head[EOS] *= 4
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    config, params = placed(folder)
    program = build_decode_program(Decoder(config), make_mesh("dp1"))
    return model, program, program.prepare(params)


def beam_search_of_transformers(model, start, beams: Beams, source=None, eos_id=EOS):
    """[(tokens without the end-of-text, score)], the best first."""
    settings = transformers.GenerationConfig(
        num_beams=beams.num_beams,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        num_return_sequences=beams.num_beams,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=0,
        decoder_start_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    start = torch.tensor([start])
    if source is None:
        inputs = {"inputs": start, "attention_mask": torch.ones_like(start)}
    else:
        inputs = {"inputs": torch.tensor([source]), "decoder_input_ids": start}
        inputs["attention_mask"] = torch.ones_like(inputs["inputs"])
    out = model.generate(**inputs, generation_config=settings)
    texts = [row[start.shape[1] :] for row in out.sequences.tolist()]
    texts = [text[: text.index(eos_id)] if eos_id in text else text for text in texts]
    return list(zip(texts, out.sequences_scores.tolist(), strict=True))


def assert_it_is_theirs(model, program, params, beams, starts, sources=None, eos_id=EOS):
    """Searches as transformers does; returns how many texts ended by themselves."""
    found = program.beam_search(
        params, starts, max_new_tokens=NEW_TOKENS, beams=beams, eos_id=eos_id, sources=sources
    )
    for i, row in enumerate(found):
        source = None if sources is None else sources[i]
        wanted = beam_search_of_transformers(model, starts[i], beams, source, eos_id)
        assert [h.tokens for h in row] == [text for text, _ in wanted]
        theirs = [score for _, score in wanted]
        np.testing.assert_allclose([h.score for h in row], theirs, rtol=1e-4, atol=1e-5)
    return sum(len(h.tokens) < NEW_TOKENS for row in found for h in row)


@pytest.mark.parametrize(
    "num_beams", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))]
)
def test_it_is_the_search_of_transformers(pair, num_beams):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(8, 97, n).tolist() for n in (3, 1, 7, 5)]
    searches = [(False, 0.6), (False, 2.0), (True, 1.0), ("never", 0.6)]
    ended = 0
    for early_stopping, length_penalty in searches:
        beams = Beams(num_beams, length_penalty, early_stopping)
        ended += assert_it_is_theirs(*pair, beams, prompts)
    assert ended > len(searches) * len(prompts) * num_beams / 4, "texts end by themselves"


@pytest.mark.parametrize(
    "build",
    [marian, *(pytest.param(lambda g=g: t5(g), marks=pytest.mark.slow) for g in (True, False))],
)
@pytest.mark.slow
def test_it_is_the_search_of_an_encoder_decoder(build):
    theirs, model, params = build()
    program = build_decode_program(model, make_mesh("dp1"))
    params = program.prepare(jax.tree.map(jnp.asarray, params))
    rng = np.random.default_rng(4)
    sources = [rng.integers(8, VOCABULARY, n).tolist() for n in (6, 1, 9, 4)]
    starts = [[0]] * len(sources)
    options = {"max_new_tokens": NEW_TOKENS, "sources": sources}
    free = program.beam_search(params, starts, beams=Beams(4), eos_id=None, **options)
    options["eos_id"] = eos_id = free[0][0].tokens[2]
    ended = 0
    for beams in (Beams(4, 0.6), Beams(4, -1.0), Beams(4, 1.0, early_stopping=True)):
        ended += assert_it_is_theirs(theirs, program, params, beams, starts, sources, eos_id)
    assert ended, "some texts should end by themselves"
    (greedy,) = program.generate(params, starts, sampling=GREEDY, **options)
    assert len({tuple(text) for text in greedy}) > 1, "the source should matter"
    found = program.beam_search(params, starts, beams=Beams(1), **options)
    assert texts_of(found) == [[text] for text in greedy]


def test_the_score_of_an_encoder_decoder_is_that_of_its_beams():
    _, model, params = marian()
    program = build_decode_program(model, make_mesh("dp1"))
    params = program.prepare(jax.tree.map(jnp.asarray, params))
    starts, sources = [[0], [0]], [[9, 8, 30, 17], [40]]
    found = program.beam_search(
        params, starts, max_new_tokens=5, beams=Beams(2, 0.0), eos_id=None, sources=sources
    )
    texts = [start + row[0].tokens for start, row in zip(starts, found, strict=True)]
    for row, logprobs in zip(found, program.score(params, texts, sources), strict=True):
        assert logprobs.sum() == pytest.approx(row[0].score, rel=1e-4)
    swapped = program.score(params, texts, sources[::-1])
    assert abs(swapped[0].sum() - found[0][0].score) > 1e-2
