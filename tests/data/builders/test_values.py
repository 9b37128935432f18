# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Ids, flags and numbers as annotation tools write them."""

import math

import pytest

from segcompass_hf.data.builders.build_report import RowProblem
from segcompass_hf.data.builders.values import as_flag, as_id, as_whole, parse_json


@pytest.mark.parametrize("value", [9, 9.0, "9", " 9 ", "9.0", "009"])
def test_one_number_in_several_spellings(value):
    assert as_whole(value) == as_id(value) == 9


@pytest.mark.parametrize(
    "value", [None, True, False, 1.5, math.inf, -math.inf, math.nan, [], [1], {}, {"id": 1}, "", " "]
)
def test_what_is_no_id(value):
    assert as_whole(value) is None and as_id(value) is None


def test_other_texts_are_ids_but_no_numbers():
    for text in ("5f3a", "1e5", "inf", "-", "١", "9" * 40):
        assert as_whole(text) is None and as_id(f" {text} ") == text
    assert as_id({"$oid": "5f3a"}) == "5f3a"  # as MongoDB exports it


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "true", "True", " YES "])
def test_true_flags(value):
    assert as_flag(value, "iscrowd") is True


@pytest.mark.parametrize("value", [0, 0.0, False, None, "", "0", "false", "False", "no"])
def test_false_flags(value):
    assert as_flag(value, "iscrowd") is False


@pytest.mark.parametrize("value", [2, -1, 0.5, math.inf, math.nan, "perhaps", [1], {}])
def test_other_flags_are_refused(value):
    with pytest.raises(RowProblem, match="iscrowd is .*; expected true or false"):
        as_flag(value, "iscrowd")


def test_json_that_is_nested_too_deeply_is_broken_json():
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200_000)
