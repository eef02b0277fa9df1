"""The N-gram model against modified Kneser-Ney written down plainly, and its own promises."""

import math
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.tokens import TokenFile, TokenWriter, token_dtype
from jaxlm.models import ngram
from jaxlm.models.ngram import Ngram
from jaxlm.models.ngram_fit import FALLBACK, discounts, fit

BOS, EOS = 1, 2


def token_file(folder, documents, vocab_size) -> TokenFile:
    """A token file of these documents, each a list of all its ids."""
    writer = TokenWriter(folder, token_dtype(vocab_size))
    for document in documents:
        writer.add(np.array(document), len(document))
    writer.finish(num_skipped=0)
    return TokenFile(folder)


def random_documents(vocab_size: int, count: int, seed: int = 0) -> list[list[int]]:
    """Documents in which some tokens often follow others."""
    rng = np.random.default_rng(seed)
    likely = rng.dirichlet(np.full(vocab_size - 3, 0.2), vocab_size)
    documents = []
    for length in rng.integers(0, 30, count):
        document = [BOS]
        for _ in range(length):
            document.append(3 + int(rng.choice(vocab_size - 3, p=likely[document[-1]])))
        documents.append([*document, EOS])
    return documents


class Plain:
    """Interpolated modified Kneser-Ney as in Chen and Goodman (1998), on dictionaries."""

    def __init__(self, documents, order: int, vocab_size: int):
        self.order, self.vocab_size = order, vocab_size
        occurrences = Counter()
        before = defaultdict(set)
        for document in documents:
            for end in range(1, len(document)):
                for length in range(1, min(order, end + 1) + 1):
                    gram = tuple(document[end - length + 1 : end + 1])
                    occurrences[gram] += 1
                    if end >= length:
                        before[gram].add(document[end - length])
        self.counts = {
            gram: times if len(gram) == order or gram[0] == BOS else len(before[gram])
            for gram, times in occurrences.items()
        }
        self.discounts = [None, *(self.estimate(length) for length in range(1, order + 1))]

    def estimate(self, length: int):
        n = Counter(count for gram, count in self.counts.items() if len(gram) == length)
        if not all(n[i] for i in (1, 2, 3, 4)):
            return (0, *FALLBACK)
        y = n[1] / (n[1] + 2 * n[2])
        found = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
        return (0, *found) if min(found) > 0 else (0, *FALLBACK)

    def probability(self, history: list[int], token: int) -> float:
        history = tuple(history[-(self.order - 1) :]) if self.order > 1 else ()
        return self._probability(history, token)

    def _probability(self, history: tuple, token: int) -> float:
        length = len(history) + 1
        lower = self._probability(history[1:], token) if history else 1 / self.vocab_size
        followers = {
            gram[-1]: count
            for gram, count in self.counts.items()
            if len(gram) == length and gram[:-1] == history
        }
        total = sum(followers.values())
        if not total:
            return lower
        taken = self.discounts[length]
        left = sum(taken[min(count, 3)] for count in followers.values())
        count = followers.get(token, 0)
        return (count - taken[min(count, 3)] + left * lower) / total


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents and, in two files, what the model is fitted on."""
    documents = random_documents(vocab_size=12, count=120)
    folder = tmp_path_factory.mktemp("ngram")
    files = [
        token_file(folder / n, part, 12) for n, part in zip("ab", np_split(documents), strict=True)
    ]
    return documents, files


def np_split(documents):
    return documents[:70], documents[70:]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_plain_definition(texts, order):
    documents, files = texts
    plain, model = Plain(documents, order, 12), fit(files, order, 12)
    histories = [[], [BOS], [EOS], [7, 7, 7, 7, 7, 7], documents[3][:9], documents[5], [0, 4]]
    for history in histories:
        expected = [plain.probability(history, token) for token in range(12)]
        np.testing.assert_allclose(model.next_probabilities(history), expected, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("window", [5, 1 << 20])
def test_texts_have_the_product_of_their_tokens_probabilities(texts, order, window, monkeypatch):
    monkeypatch.setattr(ngram, "WINDOW", window)
    documents, files = texts
    model, plain = fit(files, order, 12), Plain(documents, order, 12)
    unseen = [BOS, 3, 3, 0, 5, EOS]
    tokens = np.array([*documents[0], *unseen, *documents[9]])
    places = np.concatenate([np.arange(len(d)) for d in (documents[0], unseen, documents[9])])
    logprobs = model.token_logprobs(tokens, places)
    for i, (token, place) in enumerate(zip(tokens, places, strict=True)):
        history = tokens[i - place : i].tolist()
        assert logprobs[i] == pytest.approx(math.log(plain.probability(history, token)), abs=1e-5)
    nats, count = model.nats(files)
    assert count == sum(len(d) - 1 for d in documents)
    whole = [model.token_logprobs(np.array(d), np.arange(len(d)))[1:].sum() for d in documents]
    assert nats == pytest.approx(-sum(whole), rel=1e-9)


def test_windows_and_files_do_not_change_the_counts(texts, monkeypatch, tmp_path):
    documents, files = texts
    expected = fit(files, 4, 12).arrays()
    monkeypatch.setattr(ngram, "WINDOW", 7)
    found = fit([token_file(tmp_path / "all", documents, 12)], 4, 12).arrays()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@given(history=st.lists(st.integers(0, 11), max_size=9), order=st.integers(1, 6))
def test_probabilities_sum_to_one_after_any_history(fitted, history, order):
    probabilities = fitted[order].next_probabilities(history)
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def fitted(texts):
    return {order: fit(texts[1], order, 12) for order in range(1, 7)}


@given(
    documents=st.lists(st.lists(st.integers(3, 8), max_size=8), min_size=1, max_size=8),
    history=st.lists(st.integers(0, 8), max_size=4),
    order=st.integers(1, 5),
)
def test_any_text_gives_a_distribution(tmp_path_factory, documents, history, order):
    documents = [[BOS, *document, EOS] for document in documents]
    model = fit([token_file(tmp_path_factory.mktemp("t") / "t", documents, 9)], order, 9)
    expected = [Plain(documents, order, 9).probability(history, token) for token in range(9)]
    np.testing.assert_allclose(model.next_probabilities(history), expected, rtol=1e-5)
    assert sum(expected) == pytest.approx(1)


def test_discounts_are_estimated_or_fall_back():
    counts = np.repeat([1, 2, 3, 4, 7], [10, 5, 3, 2, 4])
    y = 10 / 20
    expected = [0, 1 - 2 * y * 5 / 10, 2 - 3 * y * 3 / 5, 3 - 4 * y * 2 / 3]
    np.testing.assert_allclose(discounts(counts), expected)
    assert discounts(counts[counts != 4]).tolist() == [0, *FALLBACK]  # no count of 4
    many_fours = np.repeat([1, 2, 3, 4], [10, 5, 3, 50])
    assert discounts(many_fours).tolist() == [0, *FALLBACK]  # the last would be below 0


def test_a_vocabulary_of_32_bits_and_long_ngrams_fit_in_the_keys(tmp_path):
    top = 2**32 - 1
    documents = [[BOS, top, top - 1, 3, top, top - 1, 4, 9, 5, 5, EOS]] * 3
    model = fit([token_file(tmp_path / "t", documents, 2**32)], 8, 2**32)
    logprobs = model.token_logprobs(np.array(documents[0]), np.arange(11))[1:]
    other = model.token_logprobs(np.array([BOS, top - 1, top, 4, 3]), np.arange(5))[1:]
    assert logprobs.min() > math.log(0.2) and other.max() < logprobs.min()


def test_a_model_comes_back_from_its_arrays(texts, fitted):
    arrays = fitted[3].arrays()
    again = Ngram.from_arrays(dict(arrays), 3, 12)
    for name, values in again.arrays().items():
        assert values is arrays[name]
    np.testing.assert_array_equal(
        again.next_probabilities([BOS, 4]), fitted[3].next_probabilities([BOS, 4])
    )


def test_memory_is_that_of_distinct_ngrams_not_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(ngram, "WINDOW", 1 << 12)
    documents = random_documents(vocab_size=50, count=300)
    files = [token_file(tmp_path / str(n), documents * n, 50) for n in (1, 20)]
    peaks = []
    for file in files:
        tracemalloc.start()
        fit([file], 4, 50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert files[1].num_tokens > 80_000
    assert peaks[1] < 1.5 * peaks[0]
