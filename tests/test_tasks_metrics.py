"""Scores of translations, and how languages are cut into words."""

import pytest

from jaxlm.tasks.metrics import translation_scores


def test_what_is_right_scores_all_and_what_is_wrong_nothing():
    right = translation_scores(["ein kleiner Hund schläft"], ["ein kleiner Hund schläft"], "de")
    assert (right.bleu, right.chrf) == pytest.approx((100, 100))
    assert translation_scores(["xyz"], ["ein kleiner Hund schläft"]).bleu == 0


def test_bleu_is_what_its_authors_wrote_down():
    # All 1- to 4-grams match but for the last word: precisions 5/6, 4/5, 3/4, 2/3, no penalty.
    said, wanted = "the cat sat on the rug", "the cat sat on the mat"
    expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert translation_scores([said], [wanted], "en").bleu == pytest.approx(expected)


def test_chinese_is_cut_into_characters():
    said, wanted = "今天天气很好", "今天天气真好"
    assert "tok:zh" in translation_scores([said], [wanted], "zh-CN").signature
    assert translation_scores([said], [wanted], "zh").bleu > 20
    assert translation_scores([said], [wanted], "de").bleu < 1
