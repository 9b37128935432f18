# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Masks of a row: a few bytes must not become gigabytes."""

import tracemalloc

import numpy as np
import pytest

from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask, decode_masks, encode_mask, merge_masks
from segcompass_hf.evaluation.rows import EvaluationRows

HUGE = {"size": [65_536, 65_536], "counts": "PPPP4"}


@pytest.fixture(autouse=True)
def little_memory():
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 50_000_000  # bytes
    tracemalloc.stop()


def row(masks, **more):
    image = np.zeros((20, 30, 3), np.uint8)
    return {"image": image, "instruction": "it", "masks": masks, "sample_id": "a", **more}


def test_run_lengths_of_more_pixels_than_an_image_has():
    for decode in (decode_mask, lambda rle: decode_masks([rle], (65_536, 65_536))):
        with pytest.raises(ValueError, match="1 masks of 65536 x 65536 .*SEGCOMPASS_MAX_IMAGE_PIXELS"):
            decode(HUGE)
    with pytest.raises(ValueError, match="masks: mask 0: 1 masks of 65536"):
        check_row(row([HUGE]))


def test_many_large_masks_in_a_row():
    one = {"size": [4000, 3000], "counts": "any"}
    with pytest.raises(ValueError, match="1000 masks of 4000 x 3000"):
        decode_masks([one] * 1000, (4000, 3000))


def test_the_setting_bounds_masks_too(monkeypatch):
    mask = np.ones((20, 30), bool)
    monkeypatch.setenv("SEGCOMPASS_MAX_IMAGE_PIXELS", "600")
    assert decode_masks([encode_mask(mask)] * 20, (20, 30)).all()
    with pytest.raises(ValueError, match="21 masks of 20 x 30"):
        decode_masks([encode_mask(mask)] * 21, (20, 30))


def test_evaluation_counts_such_rows():
    read = EvaluationRows([row([HUGE]), row([encode_mask(np.zeros((20, 30)))], ignore=HUGE)])
    assert all("65536" in read[index].problem for index in range(2))


def test_union_of_masks():
    first, second = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    first[0, 1:3] = second[0, 2:] = second[2] = True
    union = merge_masks([encode_mask(first), encode_mask(second)])
    assert (decode_mask(union) == (first | second)).all() and union["size"] == [3, 4]
