# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The store under the caches of embeddings and activations: whole shards, by name or by number."""

import errno
import json
import os
import shutil
import uuid

import pytest
import torch
from safetensors import safe_open

from segcompass_hf.data.tensor_shards import NumberedShards, TensorShards, check_dtype, gib, write_shard


def test_a_shard_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50))
    tensors = {"a": torch.zeros(10)}  # 40 bytes
    with pytest.raises(OSError, match="50 bytes are free, 40 are needed, 11 stay free") as caught:
        write_shard(tmp_path / "made" / "s.safetensors", tensors, min_free_bytes=11)
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    write_shard(tmp_path / "made" / "s.safetensors", tensors, {"identity": "x"}, min_free_bytes=10)
    with safe_open(tmp_path / "made" / "s.safetensors", "pt") as shard:
        assert shard.metadata() == {"identity": "x"}


def test_named_tensors_are_written_when_enough_came_together(tmp_path):
    shards = TensorShards(tmp_path, "me", shard_bytes=8, min_free_bytes=0)
    shards.put("a", torch.tensor([1.0]))
    assert list(tmp_path.iterdir()) == [] and shards.get("a") == 1 and "a" in shards
    shards.put("b", torch.tensor([2.0]))
    assert len(list(tmp_path.iterdir())) == 1 and len(shards) == 2
    reader = TensorShards(tmp_path, "me", 8, 0)
    assert reader.get("b") == 2 and len(TensorShards(tmp_path, "another", 8, 0)) == 0
    shards.put("c", torch.tensor([3.0]))
    shards.flush()
    assert "c" not in reader
    reader.refresh()
    assert reader.get("c") == 3
    with pytest.raises(KeyError):
        reader.get("d")


@pytest.mark.parametrize("name", ["shard-1-a.safetensors.1-2.part", ".tmpX2k341"])
def test_what_a_kill_left_goes_when_it_is_a_day_old(tmp_path, name):
    left = tmp_path / name
    left.touch()
    TensorShards(tmp_path, "me", 8, 0)
    assert left.exists(), "its writer may be alive"
    os.utime(left, (1, 1))
    TensorShards(tmp_path, "me", 8, 0)
    assert not left.exists()


class TestNumbered:
    def test_read_again_and_gone_on_with(self, tmp_path):
        shards = NumberedShards(tmp_path / "made", {"layer": 3}, next_row=0)
        assert shards.index == {"key": {"layer": 3}, "shards": [], "next_row": 0} and not (tmp_path / "made").exists()
        file = shards.write(0, {"x": torch.arange(3), "y": torch.arange(3) * 2})
        shards.name([{"file": file, "tokens": 3}], next_row=5)
        again = NumberedShards(tmp_path / "made", {"layer": 3}, next_row=0)
        file = again.write(1, {"x": torch.arange(2), "y": torch.arange(2)})
        again.name([{"file": file, "tokens": 2}], next_row=7)
        again.name([], complete=True)
        entries = [
            {"file": f"shard-0000{number}.safetensors", "tokens": tokens} for number, tokens in ((0, 3), (1, 2))
        ]
        stored = json.loads((tmp_path / "made" / "index.json").read_text())
        assert stored == {"key": {"layer": 3}, "shards": entries, "next_row": 7, "complete": True}
        found = again.read(entries[0], start=1)
        assert found["x"].tolist() == [1, 2] and found["y"].tolist() == [2, 4]

    def test_another_key(self, tmp_path):
        NumberedShards(tmp_path, {"layer": 3, "vlm": "a"}).name([])
        with pytest.raises(ValueError, match="made for something else: layer is 3 there and 4 here. Delete"):
            NumberedShards(tmp_path, {"layer": 4, "vlm": "a"})

    @pytest.mark.parametrize("place", ["disk", "url"])
    def test_a_shard_of_another_key_is_not_read(self, tmp_path, place):
        """Where two runs began in one empty folder and each has written what the other's index names."""
        folder = tmp_path if place == "disk" else f"memory://{uuid.uuid4().hex}/shards"
        one, two = NumberedShards(folder, {"layer": 3}), NumberedShards(folder, {"layer": 4})
        one.name([{"file": one.write(0, {"x": torch.zeros(1)})}])
        two.write(0, {"x": torch.ones(1)})
        with pytest.raises(ValueError, match="shard-00000.safetensors.* made for something else than the index says"):
            one.read(one.index["shards"][0])

    def test_what_another_process_has_written_elsewhere_is_not_named(self, tmp_path):
        file = NumberedShards(tmp_path / "of another machine", {}).write(0, {"x": torch.zeros(1)})
        shards = NumberedShards(tmp_path / "here", {})
        with pytest.raises(FileNotFoundError, match="all processes must see the same folder.*here/shard-00000"):
            shards.name([{"file": file}])
        assert shards.index["shards"] == [] and not (tmp_path / "here").exists()

    @pytest.mark.parametrize("place", ["disk", "url"])
    def test_what_no_index_names_is_removed(self, tmp_path, place):
        shards = NumberedShards(tmp_path if place == "disk" else f"memory://{uuid.uuid4().hex}/shards", {})
        files = [shards.write(number, {"x": torch.full((1,), number)}) for number in range(3)]
        shards.folder.write(".tmpX2k341", b"what safetensors had not renamed")
        shards.name([{"file": files[1]}])
        shards.remove_unnamed()
        assert [path.rsplit("/")[-1] for path in shards.folder.find("*.safetensors")] == files[1:2]
        assert shards.folder.holds(".tmpX2k341") == (place == "url")  # there nothing has such names
        assert shards.read(shards.index["shards"][0])["x"] == 1

    def test_a_shard_that_the_index_does_not_name_is_written_anew(self, tmp_path):
        (tmp_path / "shard-00000.safetensors").write_bytes(b"of a kill between shard and index")
        shards = NumberedShards(tmp_path, {})
        shards.name([{"file": shards.write(0, {"x": torch.ones(1)})}])
        assert shards.read(shards.index["shards"][0])["x"] == 1


def test_sizes_and_dtypes():
    assert gib(2**20) == "1.00 MiB" and gib(2**28 - 1) == "256.00 MiB" and gib(2**28) == "0.25 GiB"
    with pytest.raises(ValueError, match="dtype='int8' is not known; expected one of float32, float16, bfloat16"):
        check_dtype("int8")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"key": {}, "shards": [1], "next_row": 0}', '{"key": 1, "shards": []}']
)
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=f"index.json is damaged .*delete the folder {tmp_path}"):
        NumberedShards(tmp_path, {"model": "a"}, next_row=0)
