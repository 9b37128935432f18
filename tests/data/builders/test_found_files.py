# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that annotations name: spellings, and links, dots and absolute paths that lead out of the folder."""

import os

import pytest

from segcompass_hf.data.builders.build_report import RowProblem
from segcompass_hf.data.builders.found_files import TrustedFolder, spellings


def test_spellings():
    assert spellings("a.jpg") == ["a.jpg"]
    assert "a b/c.jpg" in spellings("a%20b\\c.jpg") and spellings("a b.jpg")[-1] == "a%20b.jpg"
    assert {"caf\u00e9.jpg", "cafe\u0301.jpg"} <= set(spellings("cafe\u0301.jpg"))
    assert spellings("a\0\\b") == ["a\0\\b"]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "in.jpg").write_bytes(b"in")
    (tmp_path / "private.jpg").write_bytes(b"private")
    (root / "link.jpg").symlink_to(tmp_path / "private.jpg")
    (root / "near.jpg").symlink_to(root / "in.jpg")
    (root / "folder").symlink_to(tmp_path)
    return root


@pytest.mark.parametrize(
    "name", ["../private.jpg", "link.jpg", "folder/private.jpg", "images/../../private.jpg", "%2e%2e/private.jpg", "/"]
)
def test_files_outside_are_not_found(root, name):
    name = str(root.parent / "private.jpg") if name == "/" else name
    folder = TrustedFolder(root)
    with pytest.raises(RowProblem, match=r"private.jpg|link.jpg") as caught:
        folder.find(spellings(name), [str(root)])
    assert caught.value.kind == "outside_folder" and "allow_outside=True (--allow-outside)" in str(caught.value)
    found = TrustedFolder(root, allow_outside=True).find(spellings(name), [str(root)])
    assert open(found, "rb").read() == b"private"


@pytest.mark.parametrize("name", ["in.jpg", "near.jpg", "images/../in.jpg", "./in.jpg"])
def test_files_inside_are_found(root, name):
    assert open(TrustedFolder(root).find([name], [str(root)]), "rb").read() == b"in"
    assert TrustedFolder(root).find([str(root / "in.jpg")], [str(root)]) == str(root / "in.jpg")
    assert TrustedFolder(root).find(["in.jpg"], [str(root)], never=str(root / "in.jpg")) is None
    assert TrustedFolder(root).find(["none.jpg"], [str(root)]) is None


def test_a_folder_whose_name_starts_like_the_root_is_outside(root):
    (root.parent / "root-private").mkdir()
    (root.parent / "root-private" / "a.jpg").write_bytes(b"private")
    with pytest.raises(RowProblem, match="lies outside"):
        TrustedFolder(root).find(["../root-private/a.jpg"], [str(root)])


def test_a_root_that_is_a_link_is_where_it_leads(root):
    link = root.parent / "other"
    link.symlink_to(root)
    assert TrustedFolder(link).find(["in.jpg"], [str(link)]) == str(link / "in.jpg")


def test_snapshots_of_the_hub_lead_to_their_own_blobs(tmp_path):
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "f00", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(b"blob")
    (snapshot / "a.jpg").symlink_to("../../blobs/1")
    (tmp_path / "private.jpg").write_bytes(b"private")
    (snapshot / "b.jpg").symlink_to(tmp_path / "private.jpg")
    folder = TrustedFolder(snapshot)
    assert os.path.basename(folder.find(["a.jpg"], [str(snapshot)])) == "a.jpg"
    with pytest.raises(RowProblem, match="lies outside"):
        folder.find(["b.jpg"], [str(snapshot)])


def test_one_name_in_several_folders_that_no_name_says(root):
    for place, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (root / place).mkdir()
        (root / place / "x.jpg").write_bytes(content)
    a, b, c = (str(root / place) for place in "abc")
    with pytest.raises(RowProblem, match="'x.jpg' is .*a/x.jpg' or .*b/x.jpg'; write the folder") as caught:
        TrustedFolder(root).find(["x.jpg"], [], [a, b])
    assert caught.value.kind == "ambiguous_file"
    assert TrustedFolder(root).find(["x.jpg"], [], [a, c]) == os.path.join(a, "x.jpg")  # the same twice
    assert TrustedFolder(root).find(["x.jpg"], [b, a]) == os.path.join(b, "x.jpg")
