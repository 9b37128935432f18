# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The loop under all builders, and the Arrow file that rows become."""

import json
import os
import subprocess

import datasets
import numpy as np
import pytest
from PIL import Image

from segcompass_hf.data import build_folder
from segcompass_hf.data.builders.build_report import BuildReport, RowProblem
from segcompass_hf.data.builders.rows import dataset_from_rows, image_size, kind_by_number, make_row, usable_rows
from segcompass_hf.data.readable_rows import check_row
from segcompass_hf.data.schema import decode_mask
from segcompass_hf.images_segcompass import to_rgb_image


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


def save_turned(path, form, orientation, **options):
    """24 wide and 16 high as stored; white at the stored left upper corner."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, form, exif=exif, **options)


FORMS = [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("AVIF", {}), ("MPO", {}), ("TIFF", {})]
FORMS += [("TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
# Where the stored left upper corner is shown, as (row, column) of 0 or -1: the table of the EXIF standard.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("form, options", FORMS)
def test_sizes_are_those_shown(form, options, orientation, tmp_path):
    if form == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow cannot write AVIF")
    save_turned(tmp_path / "a", form, orientation, **options)
    shown = (24, 16) if orientation > 4 else (16, 24)
    for source in (tmp_path / "a", (tmp_path / "a").read_bytes()):
        assert image_size(source) == shown
        pixels = np.asarray(to_rgb_image(source))
        assert pixels.shape[:2] == shown and pixels[CORNERS[orientation]].min() > 200
    with Image.open(tmp_path / "a") as lazy:
        assert to_rgb_image(lazy).size == shown[::-1]


def test_turned_by_xmp_alone(tmp_path):
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"></x:xmpmeta>'
    for form, options in (("TIFF", {"tiffinfo": {700: xmp}}), ("JPEG", {"xmp": xmp}), ("WEBP", {"xmp": xmp})):
        Image.new("RGB", (24, 16)).save(tmp_path / form, form, **options)
        assert image_size(tmp_path / form) == to_rgb_image(tmp_path / form).size[::-1] == (24, 16)


@pytest.mark.parametrize("orientation", [3, 6])
def test_masks_of_a_turned_tiff_are_those_a_viewer_shows(orientation, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "pictures"
    root.mkdir()
    save_turned(root / "t.tif", "TIFF", orientation)
    height, width = (24, 16) if orientation == 6 else (16, 24)
    mask = np.zeros((height, width), bool)
    mask[height - 6 : height - 2, 2:5] = True
    Image.fromarray(mask).save(root / "m.png")
    polygon = [[2, height - 6, 5, height - 6, 5, height - 2, 2, height - 2]]
    lines = [
        {"image": "t.tif", "instruction": "the block", "masks": [polygon]},
        {"image": "t.tif", "instruction": "the block again", "masks": ["m.png"]},
    ]
    (root / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = build_folder(root)
    assert len(rows) == 2
    for row in rows:
        check_row(row)
        assert (decode_mask(row["masks"][0]) == mask).all()


def test_pictures_that_are_identified_but_not_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("another program was run"))
    root = tmp_path / "pictures"
    root.mkdir()
    Image.new("RGB", (9, 9)).save(root / "good.png")
    (root / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    names = ["good.png", "script.png"]
    for form in ("AVIF", "WEBP", "TIFF", "JPEG"):
        if form in Image.SAVE:
            save_turned(root / f"a.{form}", form, 6)
            whole = (root / f"a.{form}").read_bytes()
            for cut in range(12, len(whole), max(1, len(whole) // 12)):  # in the head, in tables and in pixels
                names.append(f"{cut}.{form}")
                (root / names[-1]).write_bytes(whole[:cut] + b"\xff" * (len(whole) - cut))
    lines = [{"image": name, "instruction": "it", "masks": []} for name in names]
    (root / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = BuildReport()
    rows = build_folder(root, report=report)
    assert rows[0]["image"].size == (9, 9) and set(report.counts) == {"unreadable_image"}
    assert len(rows) + report.counts["unreadable_image"] == len(names)
    assert any("script.png" in problem["detail"] for problem in report.problems)


def test_more_pixels_than_allowed_are_named(tmp_path, monkeypatch):
    Image.new("1", (50, 20)).save(tmp_path / "a.png")
    monkeypatch.setenv("SEGCOMPASS_MAX_IMAGE_PIXELS", "999")
    with pytest.raises(RowProblem, match="50 x 20 = 1000 pixels; at most 999") as caught:
        image_size(tmp_path / "a.png")
    assert caught.value.kind == "unreadable_image"
