"""The threshold of the slots' confidence: answers at every threshold and the choice between them, by hand."""

import numpy as np
import pytest

from segcompass_hf.evaluation.threshold import AnswersByThreshold, choose_threshold

OBJECTS = np.zeros((3, 2, 6), dtype=bool)  # three objects of four pixels each, side by side
for number in range(3):
    OBJECTS[number, :, 2 * number : 2 * number + 2] = True
NOTHING = OBJECTS[:0]


def answers(masks, logits, targets):
    return AnswersByThreshold.of(masks, np.array(logits), targets)


def test_answers_at_every_threshold():
    # The surer mask, of confidence 2, is the second one and wrong; with the first one half of the union is right.
    found = answers(OBJECTS[:2], [-1.0, 2.0], OBJECTS[:1])
    assert [found.at(threshold).iou for threshold in (5, 2, 1.9, -1, -1.1)] == [0, 0, 0, 0, 0.5]
    assert answers(NOTHING, [], NOTHING).at(0.0).iou == 1.0


def test_the_highest_giou_by_hand():
    rows = [
        answers(OBJECTS[:1], [3.0], OBJECTS[:1]),  # right where shown: from below 3
        answers(OBJECTS[:2], [1.0, -2.0], OBJECTS[:2]),  # half below 1, whole below -2
        answers(OBJECTS[2:], [0.0], NOTHING),  # wrong where shown: below 0
        answers(OBJECTS[2:], [-1.0], NOTHING),
    ]
    # gIoU times 4, thresholds from above 3: 2 (both without target); 3 below 3; 3.5 below 1; 2.5 below 0; 1.5; 2.
    assert choose_threshold(rows) == {
        "slot_logit_threshold": 0.5,  # between 1 and 0
        "gIoU": 3.5 / 4,
        "cIoU": 8 / 12,
        "N-acc": 1.0,
        "T-acc": 1.0,
    }
    # Without the rows without target everything is best shown, and of targets alone nothing is lost.
    assert choose_threshold(rows[:2])["slot_logit_threshold"] == -2.5
    # Nothing but rows without target: nothing is best shown.
    none = choose_threshold(rows[2:])
    assert none["slot_logit_threshold"] == 0.5 and none["N-acc"] == 1.0


def test_equal_confidences_change_together():
    # Two masks of one confidence: only both can be shown, which costs as much as it brings; the higher one is taken.
    rows = [answers(OBJECTS[:1], [1.0], OBJECTS[:1]), answers(OBJECTS[:1], [1.0], NOTHING)]
    assert choose_threshold(rows)["slot_logit_threshold"] == 1.5


def test_rows_that_no_metric_counts_choose_nothing():
    ignored = AnswersByThreshold.of(OBJECTS[1:], np.array([4.0, 5.0]), OBJECTS[:1], OBJECTS[0])
    rows = [answers(OBJECTS[:1], [1.0], OBJECTS[:1]), ignored]
    assert choose_threshold(rows)["slot_logit_threshold"] == 0.5
    for nothing in ([], [ignored], [answers(NOTHING, [], OBJECTS[:1])]):
        with pytest.raises(ValueError, match="no row has a mask"):
            choose_threshold(nothing)


def test_the_choice_is_the_best_of_all():
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        targets = OBJECTS[generator.random(3) < 0.4]
        rows.append(answers(OBJECTS, generator.normal(size=3), targets))
    chosen = choose_threshold(rows)
    gious = {t: np.mean([row.at(t).iou for row in rows]) for t in np.linspace(-5, 5, 2001)}
    assert chosen["gIoU"] == pytest.approx(max(gious.values()))
    assert chosen["gIoU"] == pytest.approx(np.mean([row.at(chosen["slot_logit_threshold"]).iou for row in rows]))
