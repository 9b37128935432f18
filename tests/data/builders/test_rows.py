# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The loop under all builders, and the Arrow file that rows become."""

import os

import pytest

from segcompass_hf.data.builders.build_report import BuildReport, RowProblem
from segcompass_hf.data.builders.rows import dataset_from_rows, kind_by_number, make_row, usable_rows


def to_row(entry):
    if entry == "broken":
        raise RowProblem("bad_annotation", "it is broken.")
    return None if entry == "left out" else {"entry": entry}


def test_every_entry_is_a_row_or_named_or_left_out():
    report = BuildReport()
    entries = [("1", "a"), ("2", "broken"), ("3", RowProblem("bad_json", "no json.")), ("4", "left out"), ("5", "b")]
    rows = usable_rows(iter(entries), to_row, report)
    assert report.problems == []  # nothing happens before a row is asked for
    assert list(rows) == [{"entry": "a"}, {"entry": "b"}]
    assert report.problems == [
        {"kind": "bad_annotation", "where": "2", "detail": "it is broken.", "lost": True},
        {"kind": "bad_json", "where": "3", "detail": "no json.", "lost": True},
    ]


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(usable_rows([("1", 0)], lambda entry: 1 / entry, BuildReport()))


def test_kinds():
    assert [kind_by_number(number) for number in (0, 1, 2, 7)] == ["none", "single", "multi", "multi"]


def test_equal_builds_share_one_file_which_follows_the_umask(tmp_path):
    def rows():
        return [make_row(image=b"x", instruction="a", sample_id="1", source="tiny")]

    before = os.umask(0o027)
    try:
        first = dataset_from_rows(rows(), "name", cache_dir=tmp_path)
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    stat = path.stat()
    assert stat.st_mode & 0o777 == 0o640 and path.name.startswith("name-") and path.suffix == ".arrow"
    again = dataset_from_rows(rows(), "name", cache_dir=tmp_path)
    assert [path] == list(tmp_path.iterdir()) and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert first._fingerprint == again._fingerprint
    with pytest.raises(ValueError, match="name has no row that can be used"):
        dataset_from_rows([], "name", cache_dir=tmp_path)
    assert [path] == list(tmp_path.iterdir())
