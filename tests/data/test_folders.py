"""A folder on a disk or behind a URL: files that are whole, found, read and removed."""

import functools
import uuid

import pytest

from segcompass_hf.data.folders import AnyFolder


@pytest.fixture(params=["disk", "url"])
def folder(request, tmp_path):
    return AnyFolder(tmp_path / "made" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/made")


def test_files_are_written_found_read_and_removed(folder):
    assert folder.read_json("a.json") is None and folder.find("*") == []
    for content in (b'{"x": 1}', b'{"x": 2}'):  # over what was there
        folder.write("a.json", content)
    folder.write("deeper/b.json", b"{}")
    assert folder.read_json("a.json") == {"x": 2} and folder.read_json("deeper/b.json") == {}
    with folder.open("a.json") as file:
        file.seek(2)
        assert file.read() == b'x": 2}'
    assert folder.find("*.json") == [folder.path("a.json")] and folder.find("*/b.json") == [
        folder.path("deeper/b.json")
    ]
    folder.remove("a.json")
    folder.remove("a.json")
    assert folder.read_json("a.json") is None and folder.find("*.part") == []
    with pytest.raises(FileNotFoundError):
        folder.open("a.json")


def behind_a_url(monkeypatch, move):
    folder = AnyFolder(f"memory://{uuid.uuid4().hex}/made")
    folder.write("a", b"old")
    monkeypatch.setattr(folder._filesystem, "mv", functools.partial(move, folder, folder._filesystem.mv))
    return folder


def test_the_old_file_stays_where_the_new_one_gets_no_name(monkeypatch):
    def lost(folder, move, part, path):
        raise OSError("the connection is lost")

    folder = behind_a_url(monkeypatch, lost)
    with pytest.raises(OSError, match="connection is lost"):
        folder.write("a", b"new")
    assert folder.open("a").read() == b"old"


def test_a_kind_of_folder_that_renames_over_nothing(monkeypatch):
    def careful(folder, move, part, path):
        if folder.holds("a"):
            raise FileExistsError(path)
        move(part, path)

    folder = behind_a_url(monkeypatch, careful)
    folder.write("a", b"new")
    assert folder.open("a").read() == b"new" and folder.find("*") == [folder.path("a")]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_damaged_objects_are_named(folder, content):
    folder.write("a.json", content)
    with pytest.raises(ValueError, match="a.json is damaged .*; delete it."):
        folder.read_json("a.json", "delete it")


def test_only_a_disk_has_a_path(tmp_path):
    assert AnyFolder(tmp_path).local == tmp_path and AnyFolder("memory://x").local is None


def test_kinds_of_urls_that_are_not_known():
    with pytest.raises(ValueError, match="'nowhere://x' cannot be written to"):
        AnyFolder("nowhere://x")
