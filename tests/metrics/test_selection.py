"""What is lost to choosing and what to drawing, by hand on strips of pixels."""

import itertools

import numpy as np
import pytest

from segcompass_hf.metrics import SampleScore, choose_objects, selection_by_group, selection_figures
from segcompass_hf.metrics.selection import shown_objects

WIDTH = 12


def strip(*pixels):
    """A mask `(1, WIDTH)`."""
    mask = np.zeros((1, WIDTH), dtype=bool)
    mask[0, list(pixels)] = True
    return mask


def stack(*masks):
    return np.stack(masks) if masks else np.zeros((0, 1, WIDTH), dtype=bool)


LEFT, MIDDLE, RIGHT = strip(0, 1, 2, 3), strip(4, 5, 6, 7), strip(8, 9, 10, 11)
OBJECTS = stack(LEFT, MIDDLE, RIGHT)


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        (LEFT, [0]),
        (strip(0), [0]),  # badly drawn, but of what is no question: 1 / 4, and no other object
        (strip(2, 3, 4), [0]),  # 2 / 5 of the left one; both 3 / 8, the middle one 1 / 6
        (LEFT | MIDDLE, [0, 1]),  # one mask of two objects shows both
        (np.ones((1, WIDTH), dtype=bool), [0, 1, 2]),
        (strip(), []),
    ],
)
def test_a_mask_shows_the_objects_that_fit_it(mask, shown):
    assert shown_objects(mask, OBJECTS) == shown


def test_no_other_set_of_apart_objects_fits_better():
    """Against all sets, on random strips: the search drops objects too, not only adds them."""
    generator, sizes = np.random.default_rng(0), set()
    for _ in range(200):
        owner = generator.integers(-1, 4, WIDTH)  # of each pixel, -1 for none
        objects = np.stack([(owner == index)[None] for index in range(4)])
        mask = generator.random((1, WIDTH)) < 0.5
        fits = {
            chosen: np.count_nonzero(mask & union) / max(np.count_nonzero(mask | union), 1)
            for size in range(5)
            for chosen in itertools.combinations(range(4), size)
            for union in [objects[list(chosen)].any(axis=0)]
        }
        shown = tuple(shown_objects(mask, objects))
        assert fits[shown] == max(fits.values())
        sizes.add(len(shown))
    assert sizes >= {1, 2, 3}


def test_an_object_inside_another_does_not_hide_it():
    person, tie = strip(*range(8)), strip(3, 4)
    assert shown_objects(strip(*range(1, 8)), stack(tie, person)) == [1]
    assert shown_objects(strip(3, 4, 5), stack(tie, person)) == [0]


@pytest.mark.parametrize(
    ("masks", "targets", "shown", "oracle", "iou"),
    [
        ([strip(0, 1)], [LEFT], [[0]], 1.0, 0.5),  # right, half of it drawn
        ([MIDDLE], [LEFT], [[1]], 0.0, 0.0),  # wrong, well drawn
        ([LEFT, strip(4)], [LEFT], [[0], [1]], 0.5, 0.8),  # one too many: with its true mask 4 of 8, drawn 4 of 5
        ([LEFT], [LEFT, MIDDLE], [[0]], 0.5, 0.5),  # one too few
        ([LEFT | MIDDLE], [LEFT, MIDDLE], [[0, 1]], 1.0, 1.0),
        ([], [LEFT], [], 0.0, 0.0),  # nothing chosen
        ([], [], [], 1.0, 1.0),  # rightly nothing
        ([RIGHT], [], [[2]], 0.0, 0.0),
    ],
)
def test_the_oracle_draws_what_was_chosen(masks, targets, shown, oracle, iou):
    targets, others = stack(*targets), OBJECTS[len(targets) :]
    found, score = choose_objects(stack(*masks), targets, others)
    assert found == shown and score.iou == oracle
    assert (stack(*masks).any(0) & targets.any(0)).sum() / max((stack(*masks).any(0) | targets.any(0)).sum(), 1) == (
        iou if masks or targets.any() else 0
    )


def test_a_mask_of_nothing_known_stays_a_wrong_choice():
    """The background at the left is no object: a false alarm there is of the choice, not of the drawing."""
    _, no_target = choose_objects(stack(strip(0)), stack(), OBJECTS[1:])
    assert no_target == SampleScore(0, 1, 1, 0)
    shown, beside = choose_objects(stack(strip(0), RIGHT), stack(RIGHT), stack(MIDDLE))
    assert shown == [[], [0]] and beside.iou == 4 / 5


def test_ignored_pixels_choose_nothing():
    """Of the mask only a pixel of the middle object counts; and of the target, which is half ignored, the rest."""
    shown, score = choose_objects(stack(LEFT | strip(4)), stack(LEFT), stack(MIDDLE), ignore=LEFT[0:1] & strip(0, 1))
    assert shown == [[0]] and score == SampleScore(2, 2, 2, 2)
    shown, _ = choose_objects(stack(LEFT | strip(4)), stack(LEFT), stack(MIDDLE), ignore=LEFT)
    assert shown == [[1]]


def score_of(intersection, union):
    return SampleScore(intersection, union, intersection, union)


def test_losses_add_up_and_have_intervals():
    drawn = [score_of(1, 2), score_of(0, 4), score_of(4, 5), score_of(0, 0)]
    oracle = [score_of(1, 1), score_of(0, 8), score_of(4, 8), score_of(0, 0)]
    figures = selection_figures(drawn, oracle)
    values = {name: figure["value"] for name, figure in figures.items()}
    # IoU 0.5, 0, 0.8, 1; of the oracle 1, 0, 0.5, 1
    assert values == pytest.approx(
        {
            "gIoU": 2.3 / 4,
            "oracle_gIoU": 2.5 / 4,
            "lost_to_selection": 1.5 / 4,
            "lost_to_masks": 0.2 / 4,  # 0.5 + 0 - 0.3 + 0: the true mask of one object too many costs more
            "right_choice": 2 / 4,
        }
    )
    assert values["gIoU"] + values["lost_to_selection"] + values["lost_to_masks"] == pytest.approx(1)
    for figure in figures.values():
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["low"] < figure["high"]
        assert figure["num_samples"] == 4
    order = [2, 0, 3, 1]
    assert selection_figures([drawn[i] for i in order], [oracle[i] for i in order]) == figures
    # Many samples: the interval of a mean of two values, 0 and 1, is about 2 * 1.96 * 0.5 / sqrt(n) wide.
    many = selection_figures([score_of(i % 2, 1) for i in range(400)], [score_of(1, 1)] * 400)
    width = many["lost_to_masks"]["high"] - many["lost_to_masks"]["low"]
    assert width == pytest.approx(1.96 / 20, rel=0.15) and many["lost_to_selection"]["high"] == 0


def test_groups_are_figures_of_their_own():
    drawn, oracle = [score_of(1, 2), score_of(0, 4), score_of(1, 1)], [score_of(1, 1), score_of(0, 8), score_of(1, 1)]
    groups = selection_by_group(drawn, oracle, ["b", "a", "b"])
    assert list(groups) == ["a", "b"]
    assert groups["a"]["lost_to_selection"]["value"] == 1 and groups["a"]["lost_to_masks"]["value"] == 0
    assert groups["b"] == selection_figures(drawn[::2], oracle[::2])


def test_samples_of_an_image_are_drawn_together():
    drawn, oracle = [score_of(1, 2), score_of(0, 4), score_of(4, 5)], [score_of(1, 1), score_of(0, 8), score_of(4, 8)]
    together = selection_figures(drawn * 5, oracle * 5, images=[0, 1, 2] * 5)
    for name, figure in selection_figures(drawn, oracle).items():
        assert together[name] == pytest.approx(figure | {"num_samples": 15})
    one = selection_by_group(drawn, oracle, ["a"] * 3, ["same"] * 3)["a"]["gIoU"]
    assert one["low"] == one["high"] == pytest.approx(one["value"])


def test_scores_must_be_of_the_same_samples():
    with pytest.raises(ValueError, match="2 scores and 1 oracle scores"):
        selection_figures([score_of(1, 2)] * 2, [score_of(1, 2)])
    with pytest.raises(ValueError, match="0 samples"):
        selection_figures([], [])
