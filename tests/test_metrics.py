"""Metrics against values derived by hand, an independent pixel loop, and the original's bookkeeping."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segcompass_hf.metrics import (
    METRIC_NAMES,
    SampleScore,
    SegmentationAccumulator,
    bootstrap_intervals,
    score_sample,
    segmentation_metrics,
)

EMPTY = np.zeros((2, 3), dtype=bool)


def mask(*rows):
    return np.array([[character == "#" for character in row] for row in rows])


def test_hand_computed_case():
    predictions = [mask("##.", "..."), mask("###", "###"), EMPTY, EMPTY, mask("#..", "...")]
    references = [mask(".##", "..."), mask("###", "..."), EMPTY, mask("..#", "..#"), EMPTY]
    metrics = segmentation_metrics(predictions, references)
    # sample          1    2    3 (both empty)  4 (missed)  5 (invented)
    # intersection    1    3    0               0           0             sum 4
    # union           3    6    0               2           1             sum 12
    # IoU           1/3  1/2    1               0           0             mean (11/6)/5
    assert metrics["gIoU"] == pytest.approx(11 / 30)
    assert metrics["cIoU"] == pytest.approx(4 / 12)
    assert metrics["N-acc"] == 1 / 2  # samples 3 and 5 have no target; 3 is right
    assert metrics["T-acc"] == 2 / 3  # samples 1, 2 and 4 have one; 4 is answered with nothing
    assert tuple(metrics) == METRIC_NAMES


def test_several_masks_mean_their_union():
    prediction = np.stack([mask("#..", "..."), mask("##.", "...")])  # union: 2 pixels
    reference = np.stack([mask("#..", "..."), mask("...", "#..")])  # union: 2 pixels, one of them predicted
    assert score_sample(prediction, reference) == SampleScore(1, 3, 2, 2)
    assert score_sample(list(prediction), list(reference)) == SampleScore(1, 3, 2, 2)


@pytest.mark.parametrize("nothing", [EMPTY, np.zeros((0, 2, 3), bool), np.zeros((4, 2, 3), bool), []])
def test_every_way_to_say_nothing_is_empty(nothing):
    assert segmentation_metrics([nothing], [EMPTY]) == {"gIoU": 1.0, "cIoU": 1.0, "N-acc": 1.0, "T-acc": 1.0}
    target = mask("#..", "...")
    assert segmentation_metrics([nothing], [target]) == {"gIoU": 0.0, "cIoU": 0.0, "N-acc": 1.0, "T-acc": 0.0}
    assert segmentation_metrics([target], [nothing]) == {"gIoU": 0.0, "cIoU": 0.0, "N-acc": 0.0, "T-acc": 1.0}


def test_ignored_pixels_count_nowhere():
    prediction, reference = mask("##.", "#.."), mask("#..", "..#")
    ignore = mask("...", "#.#")
    assert score_sample(prediction, reference, ignore) == SampleScore(1, 2, 2, 1)
    metrics = segmentation_metrics([prediction, EMPTY], [reference, EMPTY], [ignore, None])
    assert metrics == {"gIoU": 0.75, "cIoU": 0.5, "N-acc": 1.0, "T-acc": 1.0}
    # A prediction wholly inside the ignored area is no prediction.
    assert segmentation_metrics([mask("...", "#..")], [EMPTY], [ignore])["N-acc"] == 1.0


def test_masks_as_numbers():
    assert score_sample(mask("##.", "...").astype(np.uint8) * 255, mask("#..", "...").astype(float)) == (1, 2, 2, 1)
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        score_sample(np.full((2, 3), 0.7), EMPTY)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"sample 1: masks of one sample differ in size.*original image size"):
        segmentation_metrics([EMPTY, EMPTY], [EMPTY, np.zeros((4, 4), bool)])
    with pytest.raises(ValueError, match="differ in size"):
        score_sample(np.zeros((0, 4, 4), bool), EMPTY)
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        segmentation_metrics([EMPTY], [EMPTY, EMPTY])
    with pytest.raises(ValueError, match=r"shape \(1, 1, 2, 3\)"):
        score_sample(EMPTY[None, None], EMPTY)
    with pytest.raises(ValueError, match="0 samples"):
        segmentation_metrics([], [])
    with pytest.raises(ValueError, match="0 samples"):
        bootstrap_intervals([])
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_intervals([SampleScore(1, 1, 1, 1)], confidence=95)


def test_groups():
    accumulator = SegmentationAccumulator()
    accumulator.update(mask("#..", "..."), mask("#..", "..."), group="attribute")
    accumulator.update(mask("#..", "..."), mask("##.", "..."), group="relation")
    accumulator.update(EMPTY, mask("##.", "..."), group="relation")
    accumulator.update(mask("#..", "..."), EMPTY, group="none")
    assert accumulator.groups == ["attribute", "relation", "none"] and len(accumulator) == 4
    assert accumulator.compute("relation") == {"gIoU": 0.25, "cIoU": 0.25, "N-acc": 1.0, "T-acc": 0.5}
    assert accumulator.compute_by_group()["none"]["gIoU"] == 0.0
    assert accumulator.compute("attribute", "relation")["gIoU"] == 0.5
    assert accumulator.compute() == {"gIoU": 0.375, "cIoU": 2 / 6, "N-acc": 0.0, "T-acc": 2 / 3}


samples = st.lists(
    st.tuples(
        *[hnp.arrays(bool, (3, 4, 5), elements=st.booleans(), fill=st.just(False)) for _ in range(2)],
        st.none() | hnp.arrays(bool, (4, 5), elements=st.booleans(), fill=st.just(False)),
    ),
    min_size=1,
    max_size=6,
)


def pixel_loop(prediction, reference, ignore):
    """(intersection, union, predicted, target) counted pixel by pixel."""
    counts = [0, 0, 0, 0]
    for y in range(4):
        for x in range(5):
            if ignore is not None and ignore[y, x]:
                continue
            predicted, target = any(m[y, x] for m in prediction), any(m[y, x] for m in reference)
            for position, hit in enumerate((predicted and target, predicted or target, predicted, target)):
                counts[position] += bool(hit)
    return tuple(counts)


@settings(max_examples=50, deadline=None)
@given(samples)
def test_counts_equal_a_pixel_loop(rows):
    for row in rows:
        assert score_sample(*row) == pixel_loop(*row)


@settings(max_examples=50, deadline=None)
@given(samples, st.randoms(use_true_random=False), st.integers(1, 4))
def test_order_and_sharding_change_nothing(rows, random, num_shards):
    whole = segmentation_metrics(*map(list, zip(*rows, strict=True)))
    assert all(0 <= value <= 1 for value in whole.values())
    shuffled = random.sample(rows, len(rows))
    shards = [SegmentationAccumulator() for _ in range(num_shards)]
    for index, row in enumerate(shuffled):
        shards[index % num_shards].update(*row, group=index % 2)
    for shard in shards[1:]:
        shards[0].merge(shard)
    assert shards[0].compute() == whole
    single = SegmentationAccumulator()
    for row in rows:
        single.update(*row)
    assert bootstrap_intervals(shards[0], num_resamples=50) == bootstrap_intervals(single, num_resamples=50)


@settings(max_examples=50, deadline=None)
@given(samples)
def test_perfect_predictions_score_one_and_swapping_keeps_the_iou(rows):
    predictions, references, ignore = map(list, zip(*rows, strict=True))
    assert segmentation_metrics(references, references, ignore) == dict.fromkeys(METRIC_NAMES, 1.0)
    there, back = (
        segmentation_metrics(predictions, references, ignore),
        segmentation_metrics(references, predictions, ignore),
    )
    assert (there["gIoU"], there["cIoU"]) == (back["gIoU"], back["cIoU"])


def test_bootstrap_interval_of_a_share():
    # 60 of 100 target samples answered: the normal approximation gives 0.6 +- 1.96 * sqrt(0.6 * 0.4 / 100) = +- 0.096.
    scores = [SampleScore(1, 1, 1, 1)] * 60 + [SampleScore(0, 1, 0, 1)] * 40
    intervals = bootstrap_intervals(scores, num_resamples=4000, seed=3)
    for name in ("gIoU", "cIoU", "T-acc"):
        assert intervals[name] == pytest.approx((0.504, 0.696), abs=0.012)
    assert intervals["N-acc"] == (0.0, 1.0)  # nothing is known about it
    assert intervals == bootstrap_intervals(scores, num_resamples=4000, seed=3)
    assert intervals != bootstrap_intervals(scores, num_resamples=4000, seed=4)
    narrow = bootstrap_intervals(scores, confidence=0.5, num_resamples=4000, seed=3)["gIoU"]
    assert intervals["gIoU"][0] < narrow[0] < 0.6 < narrow[1] < intervals["gIoU"][1]


def test_bootstrap_of_certain_samples_has_no_width():
    scores = [SampleScore(2, 4, 3, 3)] * 10
    assert bootstrap_intervals(scores) == {
        "gIoU": (0.5, 0.5),
        "cIoU": (0.5, 0.5),
        "N-acc": (0.0, 1.0),
        "T-acc": (1.0, 1.0),
    }


# Sums of intersection and union and the mean IoU over matched pairs, and the matched (slot, object) pairs, as the
# original's evaluation reported them on the masks of the fixture (cases a, b, c of the parity file `eval`).
ORIGINAL = {
    "a": ([(1, 0), (2, 1)], 3276, 5595, 0.5986418724060059),
    "b": ([(0, 3), (1, 0), (2, 1), (3, 2)], 2478, 3367, 0.7323726415634155),
    "c": ([(1, 0)], 468, 537, 0.8715083599090576),
}


@pytest.mark.parametrize("case", ORIGINAL)
def test_original_bookkeeping_where_protocols_coincide(case):
    """A matched pair, taken as a sample of its own, is what the original counts."""
    masks = np.load(Path(__file__).parent / "fixtures" / "original_evaluation.npz")
    predicted, targets = masks[f"{case}.mask_bool"], masks[f"{case}.gt"]
    height, width = predicted.shape[1:]
    pairs, intersection, union, mean_iou = ORIGINAL[case]
    accumulator = SegmentationAccumulator()
    for slot, target in pairs:
        accumulator.update(predicted[slot], targets[target, :height, :width])
    metrics = accumulator.compute()
    assert metrics["cIoU"] == pytest.approx(intersection / union, abs=2e-3)
    assert metrics["gIoU"] == pytest.approx(mean_iou, abs=2e-3)
