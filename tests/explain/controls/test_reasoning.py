"""Faithfulness of the reasoning: what changed words say, and that masks are read from them again."""

import numpy as np
import pytest

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import decode_masks, scenes
from segcompass_hf.explain import Answer, scenes_objects
from segcompass_hf.explain.controls.reasoning import (
    changed_reasonings,
    name_another,
    named_objects,
    object_shown,
    reasoning_test,
)

REASONING = "d1 small red cross no, c2 small white circle yes. candidates c2. answer 1 c2."
EMPTY = np.zeros((4, 4), dtype=bool)
OBJECTS = [(["d1", "small", "red", "cross"], EMPTY), (["c2", "small", "white", "circle"], EMPTY)]


def test_words_are_cut_filled_and_moved():
    changed = changed_reasonings(REASONING)
    assert changed["none"] == "" and changed["filled"] == " ".join(["."] * 15)
    assert changed["cut"] == "d1 small red cross no, c2 small"  # 7 of 15 words
    assert changed["reordered"] == "c2 small white circle yes, d1 small red cross no. candidates c2. answer 1 c2."
    assert set(changed_reasonings("the dog.")) == {"cut", "none", "filled"}  # one part has one order


def test_the_end_names_objects_by_words_of_their_own():
    assert named_objects(REASONING, OBJECTS) == {1}
    assert named_objects("c2 white. both are small.", OBJECTS) == set()  # "small" is said of both
    assert named_objects("answer 1 d1, 2 c2.", OBJECTS) == {0, 1}
    assert named_objects(REASONING, OBJECTS[:1]) == set()  # one known object: nothing to tell apart


def test_an_error_names_another_object_at_the_end_only():
    changed, former, named = name_another(REASONING, OBJECTS, shown=[1])
    assert changed == "d1 small red cross no, c2 small white circle yes. candidates c2. answer 1 d1."
    assert (former, named) == (1, 0)
    assert name_another(REASONING, OBJECTS, shown=[0]) is None  # the end does not name what is shown
    assert name_another("answer 1 d1, 2 c2.", OBJECTS, shown=[0, 1]) is None  # there is no other


def test_the_object_that_a_mask_shows():
    left, right = EMPTY.copy(), EMPTY.copy()
    left[:, :2], right[:, 2:] = True, True
    objects = [(["left"], left), (["right"], right)]
    most = left.copy()
    most[:, 2] = True  # 8 of 12 pixels are left's: IoU 2/3; right's is 4/16
    assert object_shown(most, objects) == 0
    assert object_shown(EMPTY, objects) is None and object_shown(left, []) is None


@pytest.fixture(scope="module")
def tested():
    model = SegCompassForReasoningSegmentation.from_pretrained(bundled_checkpoint()).eval()
    processor = SegCompassProcessor.from_pretrained(bundled_checkpoint())
    row = next(row for row in scenes.iterate("val", 20) if row["kind"] == "attribute" and len(row["masks"]) == 1)
    answer = Answer(model, processor, row["image"], row["instruction"])
    targets = decode_masks(row["masks"], (answer.image.height, answer.image.width))
    return answer, row, targets, reasoning_test(answer, scenes_objects(row), targets)


def test_the_reasoning_as_written_gives_the_answer_again(tested):
    answer, _, targets, test = tested
    union, target = answer.masks.any(0), targets.any(0)
    iou = (union & target).sum() / (union | target).sum()
    assert test.iou_to_truth["as_written"] == pytest.approx(iou, abs=0.02)
    assert {"cut", "none", "filled", "reordered"} <= set(test.iou_to_answer)
    assert all(0 <= iou <= 1 for iou in test.iou_to_answer.values())
    assert len(test.named) in (0, len(answer.masks))


def test_a_reasoning_that_names_another_object_is_read(tested):
    answer, row, _, test = tested
    assert "error" in test.iou_to_answer and test.shows_named is not None and test.shows_former is not None
    # what the answer shows the bundled checkpoint names at the end of its reasoning
    assert test.named == [True] * len(answer.masks)
