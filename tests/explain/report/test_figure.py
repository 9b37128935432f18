"""The figure of an explanation: what stands in it, for masks, none, odd texts."""

from dataclasses import replace
from itertools import pairwise

import pytest
from explanations import REASONING, made_explanation

from segcompass_hf.explain.report.figure import MAX_BARS, plot, token_weights


def _texts(strip) -> list[str]:
    texts = [text.get_text() for axes in strip.axes for text in (*axes.texts, *axes.get_yticklabels())]
    return texts + [axes.get_title(loc="left") for axes in strip.axes]


def test_one_row_per_mask_with_its_concepts_and_words(tmp_path):
    explanation = made_explanation(num_masks=2, num_concepts=12)
    figure = plot(explanation)
    answer, first, second = figure.subfigs
    assert "2 masks" in _texts(answer)
    texts = _texts(first)
    assert {"red", "circle", "concept 2", "+68.2 %", "-17.0 %"} <= set(texts)  # 1 and -1/4 over 1.4663
    assert "10 of 15 concepts: share of the mask logit's change" in texts and MAX_BARS == 10
    assert [word for word in REASONING.split() if word not in texts] == []
    assert "concept 102" in _texts(second)
    figure.savefig(tmp_path / "figure.png")


def test_words_weigh_by_the_contributions_of_all_concepts():
    mask = made_explanation(num_masks=1, num_concepts=2).masks[0]
    # Concept 0 has share 2/3, concept 1 has 1/3; each adds activation x share to its tokens.
    at = [[token.position for token in concept.tokens] for concept in mask.concepts]
    weights = token_weights(mask)
    assert weights[at[0][0]] == pytest.approx(1.0)  # 2 x 2/3, the largest
    assert weights[at[1][0]] == pytest.approx(0.5)  # 2 x 1/3
    assert weights[at[0][1]] == pytest.approx(0.5)  # 1 x 2/3
    assert token_weights(made_explanation(num_masks=1, num_concepts=0).masks[0]) == {}


def test_places_that_are_not_known_are_said_so():
    explanation = made_explanation(num_masks=1)
    assert explanation.places_known
    assert "slot 0: patches its concepts read" in _texts(plot(explanation).subfigs[1])
    explanation.tokens = [replace(token, patch=None) for token in explanation.tokens]
    assert not explanation.places_known
    assert "slot 0: places of patches not known" in _texts(plot(explanation).subfigs[1])


@pytest.mark.parametrize(
    "options",
    [
        {"num_masks": 0, "reasoning": ""},
        {"num_masks": 1, "kept": False},
        {"num_masks": 1, "num_concepts": 0},
        {"num_masks": 1, "instruction": "$x_ ^ <b>\n" * 40, "reasoning": "y" * 900, "labels": ("$a_{", "z" * 99)},
    ],
)
def test_odd_explanations_are_drawn(options, tmp_path):
    figure = plot(made_explanation(**options))
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert len(figure.subfigs) == 1 + options["num_masks"]


def test_bars_of_what_was_shared_out_are_hatched():
    explanation = made_explanation(num_masks=1)
    for concept in explanation.masks[0].concepts[:2]:
        concept.measured = True
    figure = plot(explanation)
    mask = figure.subfigs[1]
    assert "10 of 15 concepts: share of the mask logit's change; hatched: shared out by gradients" in _texts(mask)
    bars = next(axes.patches for axes in mask.axes if len(axes.patches) == MAX_BARS)
    assert [bar.get_hatch() is not None for bar in bars] == [False] * 2 + [True] * 8


def test_titles_of_a_mask_stand_beside_each_other():
    from matplotlib.text import Text

    explanation = made_explanation(num_masks=1)
    explanation.masks[0].concepts[0].measured = True  # the longest title: some are hatched
    figure = plot(explanation)
    figure.canvas.draw()
    mask = figure.subfigs[1]
    titles = {axes.get_title(loc="left") for axes in mask.axes} - {""}
    boxes = [text.get_window_extent() for text in mask.findobj(Text) if text.get_text() in titles]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) == 3 and all(left.x1 < right.x0 for left, right in pairwise(boxes))
