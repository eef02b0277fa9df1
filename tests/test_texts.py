"""`generate`, `translate`, `score` and `classify`, on models of every task."""

import numpy as np
import pytest
from loaded import loaded

import jaxlm
from jaxlm.chat import Message, encode_prompt, turn_end
from jaxlm.tasks.classification import encode_texts
from jaxlm.tasks.translation import encode_sources
from jaxlm.texts import classify, generate, score, translate

SOURCES = ["the fox", "the lazy dog jumps over", "brown"]
TALK = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "fox?"}]
ANSWER = {"role": "assistant", "content": "So it does."}


def test_a_recurrent_model_scores_texts_of_any_length_among_others():
    model = loaded("language_modelling", kind="lstm")
    texts = ["the fox " * model.config.model.max_seq_len, "a", "the lazy dog"]
    long, *_ = scores = score(model, texts)
    assert len(long.tokens) > 2 * model.config.model.max_seq_len
    for text, found in zip(texts, scores, strict=True):
        assert found.logprob == pytest.approx(score(model, text).logprob, rel=1e-5)
        assert found.tokens[1:] == model.tokenizer.encode(text)


def beam_texts(model, prompts, num_beams, length_penalty=1.0, sources=None, **options):
    """The best texts by the decode program itself."""
    from jaxlm.beam import Beams

    found = model.program.beam_search(
        model.params,
        prompts,
        beams=Beams(num_beams, length_penalty),
        sources=sources,
        **{"max_new_tokens": 8, "eos_id": model.tokenizer.eos_id} | options,
    )
    decode = lambda ids: model.tokenizer.decode_bytes(ids).decode(errors="replace")  # noqa: E731
    return [[decode(h.tokens) for h in row] for row in found]


def test_beams_are_the_programs_best_texts():
    model = loaded("language_modelling")
    prompts = ["the fox", "a"]
    rows = [[model.tokenizer.bos_id, *model.tokenizer.encode(text)] for text in prompts]
    found = generate(model, prompts, max_new_tokens=8, num_beams=3, num_samples=2)
    assert found == [row[:2] for row in beam_texts(model, rows, 3)]
    one = generate(model, prompts[0], max_new_tokens=8, num_beams=3)
    assert one == found[0][0]
    stop = one[1:3]
    cut = generate(model, prompts[0], max_new_tokens=8, num_beams=3, stop=stop)
    assert cut == one[: one.index(stop)]


@pytest.mark.slow
def test_a_translation_reads_its_source_and_tag():
    model = loaded("translation")
    start = [[model.tokenizer.bos_id]] * len(SOURCES)
    for target in ("de", "fr"):
        sources = encode_sources(model.tokenizer, SOURCES, [target] * len(SOURCES))
        wanted = beam_texts(model, start, 4, 0.6, sources)
        made = translate(model, SOURCES, target, max_new_tokens=8)
        assert made == [row[0] for row in wanted]
        assert translate(model, SOURCES[1], target, max_new_tokens=8) == made[1]
    greedy = generate(model, SOURCES, target="fr", temperature=0, max_new_tokens=8)
    assert greedy == translate(model, SOURCES, "fr", num_beams=1, max_new_tokens=8)
    assert len(set(greedy)) == 3


def test_a_translation_is_sampled_or_streamed_where_that_is_asked_for():
    model, few = loaded("translation"), {"max_new_tokens": 8}
    sampled = {"temperature": 0.9, "top_k": 20, "seed": 3} | few
    expected = generate(model, SOURCES, target="fr", **sampled)
    assert translate(model, SOURCES, "fr", **sampled) == expected
    greedy = translate(model, SOURCES[0], "fr", num_beams=1, **few)
    assert "".join(translate(model, SOURCES[0], "fr", stream=True, **few)) == greedy
    beams = generate(model, SOURCES, target="fr", num_beams=4, length_penalty=0.6, **few)
    assert translate(model, SOURCES, "fr", stop="\0", **few) == beams


@pytest.mark.slow
def test_a_translation_is_the_same_on_a_mesh():
    one = translate(loaded("translation"), SOURCES, "de", max_new_tokens=8)
    assert translate(loaded("translation", "dp4,tp2"), SOURCES, "de", max_new_tokens=8) == one


def test_the_score_of_a_translation_is_of_target_given_source():
    model = loaded("translation")
    targets = ["brown dog", "over", "fox jumps"]
    scores = score(model, targets, SOURCES, target="de")
    end, start = model.tokenizer.eos_id, model.tokenizer.bos_id
    for text, found in zip(targets, scores, strict=True):
        assert found.tokens == [start, *model.tokenizer.encode(text), end]
        assert found.logprob == pytest.approx(sum(found.token_logprobs), rel=1e-6)
        assert len(found.token_logprobs) == len(found.tokens) - 1
    alone = score(model, targets[2], SOURCES[2], target="de")
    np.testing.assert_allclose(alone.token_logprobs, scores[2].token_logprobs, rtol=1e-4)
    other = score(model, targets[2], SOURCES[1], target="de")
    assert abs(other.logprob - alone.logprob) > 1e-2


def test_a_chat_is_continued_from_its_template():
    model = loaded("instruction")
    ids = encode_prompt(model.tokenizer, [Message(**m) for m in TALK])
    (made,) = model.program.generate(
        model.params,
        [ids],
        max_new_tokens=8,
        sampling=jaxlm.texts.Sampling(temperature=0),
        eos_id=turn_end(model.tokenizer),
    )
    answer = generate(model, TALK, max_new_tokens=8, temperature=0)
    assert answer == model.tokenizer.decode_bytes(made[0]).decode(errors="replace")
    assert generate(model, [TALK, TALK[1:]], max_new_tokens=8, temperature=0)[0] == answer
    assert "".join(generate(model, TALK, max_new_tokens=8, temperature=0, stream=True)) == answer


def test_a_classifier_gives_labels_and_probabilities():
    model = loaded("classification")
    texts = ["the fox", "dog " * 200, "brown", "the quick brown fox jumps"]
    said = []
    found = classify(model, texts, say=said.append)
    assert said == ["1 of 4 texts cut to 64 tokens, as in training"]
    for one in found:
        assert tuple(one.probabilities) == model.config.model.labels
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert one.label == max(one.probabilities, key=one.probabilities.get)
    assert len({c.probabilities["neutral"] for c in found}) == 4
    alone = classify(model, texts[2])
    assert alone.probabilities == pytest.approx(found[2].probabilities, rel=1e-4)
    ((cut, _),) = encode_texts(
        model.tokenizer, texts[1:2], model.config.seq_len, model.tokenizer.ends
    )
    assert len(cut) == model.config.seq_len
    assert classify(model, []) == []


def test_what_does_not_fit_the_model_is_said_once():
    model, said = loaded("language_modelling"), []
    rows = [len(model.tokenizer.encode(text)) + 1 for text in SOURCES]
    generate(model, SOURCES, max_new_tokens=64 - max(rows), say=said.append)
    assert said == []
    generate(model, SOURCES, max_new_tokens=500, say=said.append)
    fewest = f"which leaves as few as {64 - max(rows)} for new ones"
    assert len(said) == 1 and said[0].startswith("max_new_tokens=500") and fewest in said[0]
    said.clear()
    next(generate(model, SOURCES[0], max_new_tokens=500, say=said.append, stream=True))
    assert [line.endswith(f"leaves {64 - rows[0]} for new ones") for line in said] == [True]


@pytest.mark.parametrize(
    ("task", "call", "words"),
    [
        ("language_modelling", lambda m: generate(m, "fox", 99), "max_new_tokens=99 is more"),
        ("translation", lambda m: translate(m, "a", "de", max_new_tokens=99), "max_new_tokens=99"),
        ("classification", lambda m: classify(m, "dog " * 200), "1 of 1 text cut to 64 tokens"),
    ],
)
def test_what_is_cut_short_warns_the_caller(task, call, words):
    with pytest.warns(UserWarning, match=words) as warned:
        call(loaded(task))
    assert [one.filename for one in warned] == [__file__]


def test_as_many_tokens_as_fit_warn_nobody(recwarn):
    translate(loaded("translation"), "a", "de")
    generate(loaded("language_modelling"), "fox")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("task", "call", "words"),
    [
        ("translation", lambda m: translate(m, "a", "ed"), "'de', 'fr'"),
        ("translation", lambda m: translate(m, "a"), "choose one by target="),
        ("translation", lambda m: translate(m, "fox " * 90, "de"), "source text 0 has"),
        (
            "translation",
            lambda m: translate(m, "a", "de", num_beams=4, temperature=0.9),
            "not sample",
        ),
        ("translation", lambda m: translate(m, "a", "de", top_k=4), "no effect with temperature=0"),
        ("translation", lambda m: score(m, ["a"], target="de"), "0 sources for 1"),
        ("translation", lambda m: generate(m, TALK, target="de"), "not messages"),
        ("translation", lambda m: classify(m, "a"), "use jaxlm.translate"),
        ("classification", lambda m: generate(m, "a"), "use jaxlm.classify"),
        ("classification", lambda m: score(m, "a"), "use jaxlm.classify"),
        ("language_modelling", lambda m: translate(m, "a"), "use jaxlm.generate"),
        ("language_modelling", lambda m: generate(m, "a", target="de"), "leave it out"),
        ("language_modelling", lambda m: score(m, "a", "b"), "leave them out"),
        ("language_modelling", lambda m: generate(m, TALK), "messages first (--task=instruction"),
        ("instruction", lambda m: generate(m, [{"role": "use", "content": ""}]), "'use'"),
        ("instruction", lambda m: generate(m, [TALK, "a"]), "prompts[0] is"),
        ("instruction", lambda m: generate(m, [*TALK, ANSWER]), "ends with the assistant's turn"),
        ("instruction", lambda m: generate(m, [{"rol": "user"}]), "no 'role' but 'rol': a message"),
        (
            "instruction",
            lambda m: generate(m, [{**TALK[1], "content": "a " * 99}]),
            "the conversation has",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(task, call, words):
    with pytest.raises(jaxlm.UserError) as error:
        call(loaded(task))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 0}, "num_beams=0 is out of range"),
        ({"num_beams": 2.5}, "num_beams=2.5"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
        ({"num_beams": 2, "length_penalty": "1"}, "length_penalty='1'"),
        ({"length_penalty": 0.6}, "give num_beams too"),
        ({"early_stopping": True}, "give num_beams too"),
        ({"num_beams": 2, "early_stopping": "ever"}, "early_stopping='ever'"),
        ({"num_beams": 2, "temperature": 0.7}, "does not sample"),
        ({"num_beams": 2, "top_k": 5}, "does not sample"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples=3"),
        ({"num_beams": 2, "stream": True}, "num_beams=1"),
    ],
)
def test_beam_settings_out_of_range_are_one_sentence(settings, words):
    with pytest.raises(jaxlm.UserError) as error:
        generate(loaded("language_modelling"), "a", **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_text_of_its_own_loses_the_space_that_a_tokenizer_adds(monkeypatch):
    def made(task: str, adds_space: bool) -> str:
        model = loaded(task)
        ids = model.tokenizer.encode(" the fox ")

        def generate_ids(*_, chunk=None, **__):
            yield from ([ids[:n]] for n in (range(1, len(ids) + 1) if chunk else [len(ids)]))

        monkeypatch.setattr(type(model.program), "generate", generate_ids)
        monkeypatch.setattr(model.tokenizer, "adds_space", adds_space)
        options = {"target": "de"} if task == "translation" else {}
        text = generate(model, "a", **options)
        assert "".join(generate(model, "a", stream=True, **options)) == text
        return text

    assert made("translation", adds_space=True) == "the fox "
    assert made("translation", adds_space=False) == " the fox "
    assert made("language_modelling", adds_space=True) == " the fox "
