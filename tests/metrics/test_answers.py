"""Which objects an answer chose, by hand on strips of pixels; chances of k samples against all ways to draw them."""

import doctest
import itertools

import numpy as np
import pytest

from segcompass_hf.metrics import answers
from segcompass_hf.metrics.answers import choice_f1, chosen_objects, is_right_choice, mixed_at_k, pass_at_k

WIDTH = 12


def strip(*pixels):
    mask = np.zeros((1, WIDTH), dtype=bool)
    mask[0, list(pixels)] = True
    return mask


def stack(*masks):
    return np.stack(masks) if masks else np.zeros((0, 1, WIDTH), dtype=bool)


LEFT, MIDDLE, RIGHT, NOTHING = strip(0, 1, 2, 3), strip(4, 5, 6, 7), strip(8, 9, 10, 11), strip()


def test_docstring_examples():
    results = doctest.testmod(answers)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("masks", "known", "alone"),
    [
        ([LEFT], {0}, {0}),
        ([strip(3)], {0}, {0}),  # badly drawn, but of what is no question
        ([LEFT, strip(1, 2)], {0}, {0}),  # twice the same
        ([LEFT, MIDDLE], {0, 1}, {0, 1}),
        ([LEFT | MIDDLE], {0, 1}, {0, 1}),  # one mask of both
        ([RIGHT], {2}, {-1}),  # the other object, or something else
        ([strip(3, 8, 9, 10, 11)], {2}, {-1}),  # the other fits 4 / 5, both 5 / 8
        ([strip(2, 3, 8, 9)], {0, 2}, {-1}),  # no more than half on targets
        ([RIGHT, strip(9)], {2}, {-1, -2}),  # two masks of something unknown are two things
        ([NOTHING], set(), set()),
        ([], set(), set()),
    ],
)
def test_chosen_objects(masks, known, alone):
    targets = stack(LEFT, MIDDLE)
    assert chosen_objects(stack(*masks), targets, stack(RIGHT)) == known
    assert chosen_objects(stack(*masks), targets) == alone


def test_something_else_where_everything_is_known_is_wrong():
    assert chosen_objects(stack(RIGHT), stack(LEFT), stack(MIDDLE)) == {-1}
    assert chosen_objects(stack(RIGHT), stack(), None) == {-1}  # nothing was asked for
    assert chosen_objects(stack(strip(3, 8, 9)), stack(LEFT), ignore=RIGHT) == {0}  # what is ignored does not count


@pytest.mark.parametrize(
    ("chosen", "num_targets", "f1", "right"),
    [
        ({0}, 1, 1.0, True),
        (set(), 0, 1.0, True),
        (set(), 2, 0.0, False),
        ({-1}, 0, 0.0, False),
        ({0}, 2, 2 / 3, False),  # half found: 2 * 1 / (1 + 2)
        ({0, 1, -1}, 2, 0.8, False),  # one too many: 2 * 2 / (3 + 2)
        ({2}, 2, 0.0, False),
    ],
)
def test_f1_and_right(chosen, num_targets, f1, right):
    assert choice_f1(chosen, num_targets) == f1
    assert is_right_choice(chosen, num_targets) is right


def test_chances_are_those_of_all_ways_to_draw():
    for num_samples in (1, 4, 6):
        for num_right in range(num_samples + 1):
            samples = [True] * num_right + [False] * (num_samples - num_right)
            for k in range(1, num_samples + 1):
                draws = list(itertools.combinations(samples, k))
                assert pass_at_k(num_right, num_samples, k) == pytest.approx(sum(map(any, draws)) / len(draws))
                mixed = [any(draw) and not all(draw) for draw in draws]
                assert mixed_at_k(num_right, num_samples, k) == pytest.approx(sum(mixed) / len(draws))


@pytest.mark.parametrize("numbers", [(5, 4, 1), (-1, 4, 1), (1, 4, 5), (1, 4, 0)])
def test_numbers_that_do_not_fit_are_refused(numbers):
    for chance in (pass_at_k, mixed_at_k):
        with pytest.raises(ValueError, match="draw at least k samples"):
            chance(*numbers)
