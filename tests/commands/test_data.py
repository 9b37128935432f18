# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass data`: from a specification to a folder of shards and to the Hub, and one clear line on bad input."""

import json

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from segcompass_hf import cli
from segcompass_hf.data import scenes
from segcompass_hf.data.hosting import write


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(write, "save_contact_sheet", lambda rows, path: False)


@pytest.fixture
def pictures(tmp_path):
    """A folder of a user's own, with one broken line."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 12, 3), 80 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    square = [[[2, 2, 6, 2, 6, 6, 2, 6]]]
    lines = [{"image": f"{number}.png", "instruction": f"thing {number}", "masks": square} for number in range(3)]
    lines.append({"image": "nowhere.png", "instruction": "x", "masks": []})
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def fails(capsys, *argv) -> str:
    """Run, expect exit code 2, nothing on stdout and one line of the command on stderr; return that line."""
    try:
        code = cli.main(["data", *map(str, argv)])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("segcompass data")]
    assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0]
    return lines[0]


def load(folder, tmp_path, **options):
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **options)


def test_build_of_several_splits(tmp_path, capsys):
    output = tmp_path / "new" / "scenes"
    argv = ["data", "build", "scenes:val", "scenes:test_pairs", "--limit", "3", "--output", str(output)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "val: 3 samples on 3 images" in out and "test_pairs: 3 samples" in out and "1 file," in out
    loaded = load(output, tmp_path)
    assert set(loaded) == {"val", "test_pairs"}
    assert loaded["val"]["instruction"][:] == [row["instruction"] for row in scenes.iterate("val", 3)]
    assert DatasetCard.load(output / "README.md").data.license == "apache-2.0"


def test_build_of_a_folder_with_a_split_a_limit_and_a_licence(pictures, tmp_path, capsys):
    (tmp_path / "terms.txt").write_text("Only for cats.\n")
    argv = ["data", "build", f"folder:{pictures}::train", "--limit", "2", "--license", str(tmp_path / "terms.txt")]
    assert cli.main([*argv, "--name", "Cats", "--output", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["splits"]) == ["train"]
    split = told["splits"]["train"]
    assert (split["samples"], split["images"], split["lost"], split["shards"]) == (2, 2, 1, 1)
    assert split["left_out"] == {"beyond --limit": 1} and split["problems"] == {"missing_image": 1}
    assert split["objects_per_sample"] == {"1": 2} and split["sources"] == {"pictures": 2}
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# Cats" in card and str(tmp_path) not in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "Only for cats.\n"
    assert load(tmp_path / "out", tmp_path, split="train")["instruction"][:] == ["thing 0", "thing 1"]


def test_specs_are_joined_in_one_split(pictures, tmp_path, capsys):
    argv = ["data", "build", "scenes:train", f"folder:{pictures}::train", "--limit", "2", "--output"]
    assert cli.main([*argv, str(tmp_path / "own")]) == 0
    assert "train: 4 samples on 4 images" in capsys.readouterr().out
    argv[2] = "scenes:val"
    assert cli.main([*argv, str(tmp_path / "named"), "--split", "mix", "--license", "cc0-1.0"]) == 0
    assert load(tmp_path / "named", tmp_path, split="mix")["split"][:] == ["val", "val", "train", "train"]
    # What it has written is itself a specification, of the split that its rows are in.
    assert cli.main(["data", "build", f"{tmp_path / 'named'}:mix", "--output", str(tmp_path / "again")]) == 0
    assert "mix: 4 samples" in capsys.readouterr().out


def test_bad_input_of_build(pictures, tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    assert "there is no data set 'frob'" in fails(capsys, "build", "frob", *out)
    assert "Scenes has no split 'vall'" in fails(capsys, "build", "scenes:vall", *out)
    assert "no folder" in fails(capsys, "build", "folder:/no/where", *out).lower()
    assert "required: --output" in fails(capsys, "build", "scenes:val")
    assert "'0' is not a positive number" in fails(capsys, "build", "scenes:val", "--limit", "0", *out)
    assert "neither a file nor an identifier" in fails(capsys, "build", "scenes:val", "--license", "Ask me", *out)
    assert "is no name of a split" in fails(capsys, "build", "scenes:val", "--limit", "1", "--split", "a/b", *out)
    wrong_size = fails(capsys, "build", "scenes:val", "--limit", "1", "--shard-size", "big", *out)
    assert "big" in wrong_size
    assert not (tmp_path / "out").exists()
    assert "is there already" in fails(capsys, "build", "scenes:val", "--output", pictures)
    assert "required: ACTION" in fails(capsys)


def test_push_shows_the_tree_or_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    output = tmp_path / "scenes"
    cli.main(["data", "build", "scenes:val", "--limit", "2", "--output", str(output)])
    capsys.readouterr()
    assert cli.main(["data", "push", str(output), "me/scenes", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "would be published as me/scenes" in out and "data/val-00000-of-00001.parquet" in out
    assert "no folder" in fails(capsys, "push", tmp_path / "nowhere", "me/scenes")
    assert "a//b" in fails(capsys, "push", output, "a//b")
    assert "offline" in fails(capsys, "push", output, "me/scenes").lower()  # tests have no network
    (output / "data" / "val-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "no complete Parquet file" in fails(capsys, "push", output, "me/scenes", "--dry-run")


def test_push_publishes(tmp_path, capsys, monkeypatch):
    from segcompass_hf.data.hosting import publish

    told = {}

    def push(folder, repo_id, private, dry_run):
        told.update(folder=folder, repo_id=repo_id, private=private, dry_run=dry_run)
        return publish.Publication({"README.md": 1500}, {"val": 2}, [".DS_Store"], "https://hub.example/x")

    monkeypatch.setattr(publish, "push_dataset", push)
    assert cli.main(["data", "push", str(tmp_path), "me/scenes", "--private"]) == 0
    assert told == {"folder": tmp_path, "repo_id": "me/scenes", "private": True, "dry_run": False}
    out = capsys.readouterr().out
    assert "https://hub.example/x:" in out and "1.5 kB" in out and "not part of the data set: .DS_Store" in out
