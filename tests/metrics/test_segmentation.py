"""Metrics against values derived by hand, an independent pixel loop, and the original's bookkeeping."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from places import FIXTURES

from segcompass_hf.images_segcompass import restore_map
from segcompass_hf.metrics import (
    ALL_METRIC_NAMES,
    METRIC_NAMES,
    PRECISION_NAMES,
    LeftOutScore,
    SampleScore,
    SegmentationAccumulator,
    bootstrap_intervals,
    breakdown,
    metrics_of_scores,
    metrics_with_intervals,
    num_bearing_samples,
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


def test_a_target_that_is_ignored_as_a_whole_is_left_out():
    target, ignore = mask("##.", "..."), mask("###", "...")
    # The answer is right, wrong or missing: none of it counts, and the sample is not one "without target".
    for prediction in (target, mask("...", "##."), EMPTY):
        score = score_sample(prediction, target, ignore)
        assert score.left_out and score.target_pixels == 0
        scores = [score, SampleScore(1, 2, 2, 1), SampleScore(0, 0, 0, 0)]
        assert metrics_of_scores(scores) == {"gIoU": 0.75, "cIoU": 0.5, "N-acc": 1.0, "T-acc": 1.0}
        assert [num_bearing_samples(scores, name) for name in METRIC_NAMES] == [2, 2, 1, 1]
        assert bootstrap_intervals(scores) == bootstrap_intervals(scores[1:])
    assert pickle.loads(pickle.dumps(score)).left_out  # from another process
    # One pixel of the target is left: it counts. No target at all, and everything ignored: rightly nothing.
    assert score_sample(EMPTY, mask("##.", "..."), mask("#.#", "###")) == (0, 1, 0, 1)
    assert not score_sample(EMPTY, EMPTY, ~EMPTY).left_out
    # Alone it bears on nothing: every figure says 1 and stands on no sample.
    figures = metrics_with_intervals([score])
    assert {(f["value"], f["low"], f["high"], f["num_samples"]) for f in figures.values()} == {(1.0, 0.0, 1.0, 0)}
    accumulator = SegmentationAccumulator()
    accumulator.update(EMPTY, target, ignore)
    accumulator.update(target, target, None)
    assert accumulator.compute()["N-acc"] == accumulator.compute()["gIoU"] == 1.0
    assert segmentation_metrics([EMPTY, EMPTY], [target, EMPTY], [ignore, None])["gIoU"] == 1.0


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "bfloat16", "float32", "float64"])
def test_tensors_of_every_dtype(dtype):
    prediction = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=getattr(torch, dtype))
    prediction = prediction.requires_grad_() if prediction.is_floating_point() else prediction
    target = mask("#..", "...")
    assert score_sample(prediction, target) == (1, 2, 2, 1) and score_sample(target, prediction) == (1, 2, 1, 2)
    assert score_sample([prediction, prediction], target) == (1, 2, 2, 1)  # a list of tensors
    assert score_sample(target, target, prediction[None]).left_out
    if prediction.is_floating_point():
        with pytest.raises(ValueError, match="values other than 0 and 1"):
            score_sample(prediction * 3, target)


def test_one_name_is_as_good_as_a_list_of_one():
    scores = [SampleScore(1, 2, 2, 1), SampleScore(1, 1, 1, 1)]
    assert metrics_of_scores(scores, "gIoU") == metrics_of_scores(scores, ["gIoU"]) == {"gIoU": 0.75}
    assert bootstrap_intervals(scores, names="cIoU") == bootstrap_intervals(scores, names=("cIoU",))
    assert list(metrics_with_intervals(scores, "precision@0.5")) == ["precision@0.5"]
    assert breakdown(scores, "ab", names="gIoU")["a"]["gIoU"]["value"] == 0.5
    with pytest.raises(ValueError, match="'giou' is no metric"):
        metrics_of_scores(scores, "giou")


def test_masks_as_numbers():
    assert score_sample(mask("##.", "...").astype(np.uint8) * 255, mask("#..", "...").astype(float)) == (1, 2, 2, 1)
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        score_sample(np.full((2, 3), 0.7), EMPTY)


@pytest.mark.parametrize("values", [[[3, -2, -2], [-2, -2, -2]], [[0, -1, 0], [0, 0, 0]]])
def test_integers_below_zero_are_no_masks(values):
    """Logits cast to integers, or labels with -1 for nothing: taken as they are, all of it would be the mask."""
    for masks in (np.array(values), torch.tensor(values), [torch.tensor(values)]):
        with pytest.raises(ValueError, match="prediction holds int64 values below 0; expected 0 outside the mask"):
            score_sample(masks, mask("#..", "..."))


def test_sparse_tensors():
    prediction = torch.tensor([[1.0, 1, 0], [0, 0, 0]]).to_sparse()
    assert score_sample(prediction, mask("#..", "...")) == (1, 2, 2, 1)


def test_run_lengths_are_to_be_decoded_first():
    with pytest.raises(ValueError, match="Decode run-length encodings with decode_mask"):
        score_sample([{"size": [2, 3], "counts": [6]}], EMPTY)


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


# Precision at an IoU


def test_precision_counts_samples_with_target_at_or_above_the_threshold():
    # IoU 5/10, 7/10, 9/10, 1 and 0 with target; an empty and an invented answer without.
    scores = [SampleScore(hit, 10, hit, 10) for hit in (5, 7, 9, 10, 0)]
    scores += [SampleScore(0, 0, 0, 0), SampleScore(0, 4, 4, 0)]
    values = metrics_of_scores(scores, PRECISION_NAMES)
    assert values == {"precision@0.5": 4 / 5, "precision@0.7": 3 / 5, "precision@0.9": 2 / 5}
    assert metrics_of_scores(scores, ["precision@0.8", "gIoU"]) == {"precision@0.8": 2 / 5, "gIoU": 4.1 / 7}
    assert [num_bearing_samples(scores, name) for name in ALL_METRIC_NAMES] == [7, 7, 2, 5, 5, 5, 5]
    assert metrics_of_scores(scores[5:], PRECISION_NAMES) == dict.fromkeys(PRECISION_NAMES, 1.0)  # nothing to miss


@pytest.mark.parametrize("numerator", [1, 3, 5, 7, 9])
def test_an_iou_of_exactly_the_threshold_counts(numerator):
    name = f"precision@0.{numerator}"
    for scale in (1, 7, 12_345):
        exact = SampleScore(numerator * scale, 10 * scale, numerator * scale, 10 * scale)
        below = exact._replace(intersection=exact.intersection - 1)
        assert metrics_of_scores([exact], [name]) == {name: 1.0}
        assert metrics_of_scores([below], [name]) == {name: 0.0}


@pytest.mark.parametrize("name", ["mIoU", "precision@0", "precision@1.5", "precision@", "precision@nan", "precision"])
def test_unknown_metrics_are_refused(name):
    for function in (metrics_of_scores, lambda scores, names: bootstrap_intervals(scores, names=names)):
        with pytest.raises(ValueError, match=f"'{name}' is no metric"):
            function([SampleScore(1, 1, 1, 1)], [name])


def test_contract_keys_stay_the_four():
    target = mask("##.", "...")
    assert list(segmentation_metrics([target], [target])) == ["gIoU", "cIoU", "N-acc", "T-acc"]


# Breakdowns


def test_breakdown_by_source_and_kind():
    accumulator = SegmentationAccumulator()
    for source, kind, hit in (("coco", "set", 10), ("coco", None, 5), ("own", "set", 0), ("own", None, 9)):
        accumulator.add(SampleScore(hit, 10, 10, 10), group=(source, kind))
    by_source = accumulator.regrouped(lambda group: group[0]).compute_by_group(ALL_METRIC_NAMES)
    by_kind = accumulator.regrouped(lambda group: group[1]).compute_by_group(names=("gIoU", "precision@0.9"))
    assert by_source["coco"] == pytest.approx(
        {"gIoU": 0.75, "cIoU": 0.75, "N-acc": 1, "T-acc": 1}
        | {"precision@0.5": 1, "precision@0.7": 0.5, "precision@0.9": 0.5}
    )
    assert by_kind == {"set": {"gIoU": 0.5, "precision@0.9": 0.5}, None: {"gIoU": 0.7, "precision@0.9": 0.5}}
    figures = breakdown(accumulator, [source for source, _ in accumulator.groups], num_resamples=50)
    assert list(figures) == ["coco", "own"] and list(figures["own"]) == list(ALL_METRIC_NAMES)
    assert figures["own"] == metrics_with_intervals(
        accumulator.scores(("own", "set"), ("own", None)), num_resamples=50
    )
    assert figures["own"]["gIoU"] == {"value": 0.45, "low": 0.0, "high": 0.9, "num_samples": 2}
    assert figures["own"]["N-acc"] == {"value": 1.0, "low": 0.0, "high": 1.0, "num_samples": 0}
    with pytest.raises(ValueError):
        breakdown(accumulator, ["coco"])


counts = st.lists(
    st.tuples(*[st.integers(0, 30)] * 3, st.sampled_from(["attribute", "set", None])).map(
        lambda row: (
            SampleScore(min(row[:2]), row[0] + row[1] - min(row[:2]) + row[2], row[0] + row[2], row[1]),
            row[3],
        )
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(counts, st.randoms(use_true_random=False), st.integers(1, 4))
def test_breakdowns_are_exact_under_order_and_sharding(rows, random, num_shards):
    expected = breakdown(*zip(*rows, strict=True), num_resamples=20)
    shuffled = random.sample(rows, len(rows))
    merged = SegmentationAccumulator()
    for shard in range(num_shards):
        part = SegmentationAccumulator()
        for score, group in shuffled[shard::num_shards]:
            part.add(score, group)
        merged.merge(part)
    assert merged.compute_by_group(ALL_METRIC_NAMES) == {
        group: {name: figure["value"] for name, figure in figures.items()} for group, figures in expected.items()
    }
    assert {g: metrics_with_intervals(merged.scores(g), num_resamples=20) for g in expected} == expected
    # The whole is what its groups say: gIoU weighted by samples, precision and T-acc by samples with target.
    whole = merged.compute(names=ALL_METRIC_NAMES)
    for name in ("gIoU", "N-acc", "T-acc", *PRECISION_NAMES):
        bearing = {group: figures[name]["num_samples"] for group, figures in expected.items()}
        if sum(bearing.values()):
            mean = sum(expected[g][name]["value"] * bearing[g] for g in expected) / sum(bearing.values())
            assert whole[name] == pytest.approx(mean)


@settings(max_examples=50, deadline=None)
@given(counts)
def test_every_figure_is_a_share_and_precision_falls_with_the_threshold(rows):
    scores = [score for score, _ in rows]
    figures = metrics_with_intervals(scores, num_resamples=20)
    for figure in figures.values():
        assert 0 <= figure["low"] <= figure["high"] <= 1 and 0 <= figure["value"] <= 1
    half, seventy, ninety = (figures[name]["value"] for name in PRECISION_NAMES)
    assert half >= seventy >= ninety
    assert half <= figures["T-acc"]["value"] or not figures["T-acc"]["num_samples"]
    union = sum(score.union for score in scores)
    assert figures["cIoU"]["value"] * union == pytest.approx(sum(score.intersection for score in scores)) or not union


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
def test_ignoring_is_erasing_from_both(rows):
    for prediction, reference, ignore in rows:
        if ignore is not None:
            assert score_sample(prediction, reference, ignore) == score_sample(
                prediction & ~ignore, reference & ~ignore
            )
            assert score_sample(prediction, reference, ~np.zeros_like(ignore)) == SampleScore(0, 0, 0, 0)
            assert score_sample(prediction, reference, np.stack([ignore, ~ignore])).iou == 1.0


@settings(max_examples=50, deadline=None)
@given(samples, st.integers(0, 3))
def test_right_silence_raises_giou_and_leaves_ciou(rows, num_silent):
    """An empty prediction for an empty target counts 1 for gIoU and nothing for cIoU, however many there are."""
    scores = [score for row in rows if not (score := score_sample(*row)).left_out]
    assume(scores)
    whole, more = (
        metrics_of_scores(scores + [score_sample([], EMPTY)] * n, ALL_METRIC_NAMES) for n in (0, num_silent)
    )
    assert more["gIoU"] == pytest.approx((whole["gIoU"] * len(scores) + num_silent) / (len(scores) + num_silent))
    for name in ("T-acc", *PRECISION_NAMES):
        assert more[name] == whole[name]
    assert more["cIoU"] == whole["cIoU"] and more["N-acc"] >= whole["N-acc"] - 1e-12


@settings(max_examples=50, deadline=None)
@given(samples)
def test_perfect_predictions_score_one_and_swapping_keeps_the_iou(rows):
    predictions, references, ignore = map(list, zip(*rows, strict=True))
    assert segmentation_metrics(references, references, ignore) == dict.fromkeys(METRIC_NAMES, 1.0)
    scores = [(score_sample(p, r, i), score_sample(r, p, i)) for p, r, i in rows]
    judged = [pair for pair in scores if not (pair[0].left_out or pair[1].left_out)]
    assume(judged)
    there, back = map(metrics_of_scores, zip(*judged, strict=True))
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


def test_bootstrap_intervals_of_precision():
    # As above: 60 of 100 with an IoU of 0.8, the others 0.6.
    scores = [SampleScore(8, 10, 9, 9)] * 60 + [SampleScore(6, 10, 8, 8)] * 40
    intervals = bootstrap_intervals(scores, num_resamples=4000, seed=3, names=ALL_METRIC_NAMES)
    assert intervals["precision@0.7"] == pytest.approx((0.504, 0.696), abs=0.012)
    assert (intervals["precision@0.5"], intervals["precision@0.9"]) == ((1.0, 1.0), (0.0, 0.0))
    # gIoU is 0.6 + 0.2 x that share, on the same resamples.
    assert intervals["gIoU"] == pytest.approx([0.6 + 0.2 * bound for bound in intervals["precision@0.7"]])


def test_samples_of_an_image_are_drawn_together():
    # 50 images, 30 of them right, with four samples each that are right or wrong together: as uncertain as 50 samples.
    scores = [SampleScore(1, 1, 1, 1)] * 30 + [SampleScore(0, 1, 0, 1)] * 20
    images = [*range(50)] * 4
    once, together = bootstrap_intervals(scores), bootstrap_intervals(scores * 4, images=images)
    assert together == once
    alone = bootstrap_intervals(scores * 4)
    assert alone["gIoU"][1] - alone["gIoU"][0] < 0.7 * (once["gIoU"][1] - once["gIoU"][0])
    assert bootstrap_intervals(scores * 2, images=["one"] * 100)["gIoU"] == (0.6, 0.6)  # one image: nothing to draw
    # Image 0 has an IoU of 0.6 and one of 0 that is ignored as a whole, image 1 one of 0.
    mixed = [SampleScore(6, 10, 8, 8), LeftOutScore(0, 0, 0, 0), SampleScore(0, 5, 0, 5)]
    assert bootstrap_intervals(mixed, images=[0, 0, 1])["gIoU"] == (0.0, 0.6)
    order = np.random.default_rng(0).permutation(200)
    shuffled = bootstrap_intervals([(scores * 4)[i] for i in order], images=[images[i] for i in order])
    assert shuffled == together
    groups = breakdown(scores * 4, "ab" * 100, images)
    assert groups["a"] == metrics_with_intervals((scores * 4)[::2], images=images[::2])
    with pytest.raises(ValueError, match="50 samples and 3 images"):
        bootstrap_intervals(scores, images=[1, 2, 3])


def test_drawing_in_parts_changes_no_interval(monkeypatch):
    scores = [SampleScore(hit, 10, hit, 10 * (hit != 3)) for hit in range(8)]
    whole = bootstrap_intervals(scores, num_resamples=100, names=ALL_METRIC_NAMES)
    monkeypatch.setattr("segcompass_hf.metrics.intervals.COUNTS_AT_ONCE", 8 * 7)  # 7 resamples at a time
    assert bootstrap_intervals(scores, num_resamples=100, names=ALL_METRIC_NAMES) == whole


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
    masks = np.load(FIXTURES / "original_evaluation.npz")
    predicted, targets = masks[f"{case}.mask_bool"], masks[f"{case}.gt"]
    height, width = predicted.shape[1:]
    pairs, intersection, union, mean_iou = ORIGINAL[case]
    accumulator = SegmentationAccumulator()
    for slot, target in pairs:
        accumulator.update(predicted[slot], targets[target, :height, :width])
    metrics = accumulator.compute()
    assert metrics["cIoU"] == pytest.approx(intersection / union, abs=2e-3)
    assert metrics["gIoU"] == pytest.approx(mean_iou, abs=2e-3)


@pytest.mark.parametrize("case", [*ORIGINAL, "empty_gt"])
def test_every_pair_has_the_original_iou(case):
    """Every slot with every object, an object without a pixel included, from masks and from low-resolution logits."""
    fixture = np.load(FIXTURES / "original_evaluation.npz")
    predicted, targets, expected = (fixture[f"{case}.{name}"] for name in ("mask_bool", "gt", "iou_mask"))
    size, reshaped = predicted.shape[1:], fixture[f"{case}.reshaped_size"]
    logits = torch.from_numpy(fixture[f"{case}.mask_logits"])
    for slot, row in enumerate(expected):
        restored = restore_map(logits[slot], 1024, reshaped.tolist(), size).numpy() > 0
        for target, iou in enumerate(row):
            truth = targets[target, : size[0], : size[1]]
            assert score_sample(predicted[slot], truth).iou == pytest.approx(iou, abs=1e-6)
            assert score_sample(restored, truth).iou == pytest.approx(iou, abs=2e-3)


def test_original_sums_are_those_of_the_pairs():
    """The object without a pixel adds the prediction to the union: 494 of 1137 pixels, mean IoU 0.25649."""
    fixture = np.load(FIXTURES / "original_evaluation.npz")
    predicted, targets = fixture["empty_gt.mask_bool"], fixture["empty_gt.gt"]
    scores = [score_sample(predicted[slot], targets[1 - slot, :60, :80]) for slot in (0, 1)]
    assert metrics_of_scores(scores) == pytest.approx(
        {"gIoU": 0.25649014, "cIoU": 494 / 1137, "N-acc": 0.0, "T-acc": 1.0}, abs=1e-6
    )
