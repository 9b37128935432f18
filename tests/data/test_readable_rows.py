"""Damaged rows: found, named, counted once, and replaced alike everywhere."""

import io
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image as PILImage

from segcompass_hf.data import readable_rows
from segcompass_hf.data.readable_rows import (
    ReadableRows,
    check_row,
    count_unreadable,
    is_image_dataset,
    readable_stream,
)
from segcompass_hf.data.schema import encode_mask, row_features


def image_bytes(number: int, size=(20, 10), kind="PNG") -> bytes:
    """An image whose every pixel has the row's number as its red."""
    pixels = np.full((size[1], size[0], 3), 7, dtype=np.uint8)
    pixels[..., 0] = number
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def noise(kind="JPEG") -> bytes:
    """Enough pixel data for a cut inside of it."""
    pixels = np.random.default_rng(0).integers(0, 255, (10, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def mask(size=(10, 20)) -> dict:
    pixels = np.zeros(size, dtype=bool)
    pixels[2:5, 3:9] = True
    return encode_mask(pixels)


def row(number: int, **changes) -> dict:
    whole = {"image": {"bytes": image_bytes(number), "path": None}, "instruction": f"row {number}", "masks": [mask()]}
    return {**dict.fromkeys(row_features()), **whole, "sample_id": f"s{number}", **changes}


def rows(*bad: int, number: int = 6, damage=None) -> Dataset:
    damage = {"image": {"bytes": b"no image", "path": None}} if damage is None else damage
    return Dataset.from_list([row(i, **(damage if i in bad else {})) for i in range(number)], features=row_features())


def red(read: dict) -> int:
    return read["image"].getpixel((0, 0))[0]


DAMAGES = {
    "no image": ({"image": {"bytes": b"no image", "path": None}}, "cannot identify image"),
    "empty file": ({"image": {"bytes": b"", "path": None}}, "cannot identify image"),
    "header only": ({"image": {"bytes": image_bytes(1)[:40], "path": None}}, "Error: "),
    "cut JPEG": ({"image": {"bytes": noise()[:-60], "path": None}}, "truncated"),
    "cut PNG": ({"image": {"bytes": noise("PNG")[:-60], "path": None}}, "truncated"),
    "missing file": ({"image": {"bytes": None, "path": "/nowhere/x.png"}}, "No such file"),
    "no image at all": ({"image": None}, "NoneType"),
    "strip": ({"image": {"bytes": image_bytes(1, size=(401, 1)), "path": None}, "masks": []}, "401 x 1 pixels"),
    "mask of another size": (
        {"masks": [mask(), mask((20, 10))]},
        r"masks: mask 1 is \(20, 10\) but its image is \(10, 20\)",
    ),
    "distractor of another size": ({"distractor_masks": [mask((9, 20))]}, "distractor_masks: mask 0"),
    "ignore of another size": ({"ignore": mask((9, 20))}, "ignore: mask 0"),
    "broken counts": ({"masks": [{"size": [10, 20], "counts": "#"}]}, "masks: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_are_found_and_replaced_by_the_next_row(name, caplog, tmp_path):
    damage, reason = DAMAGES[name]
    log = tmp_path / "deep" / "unreadable.jsonl"
    readable = ReadableRows(rows(2, damage=damage), log_file=log, name="training")
    assert [red(readable[i]) for i in range(6)] == [0, 1, 3, 3, 4, 5]
    assert readable.num_unreadable == 1
    (line,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (line["dataset"], line["index"], line["sample_id"]) == ("training", 2, "s2")
    (warning,) = [record.message for record in caplog.records]
    assert "row 2 (s2) is unreadable and skipped" in warning
    assert re.search(reason, line["reason"])


def test_fatal_by_option_names_row_and_reason(tmp_path):
    readable = ReadableRows(rows(2), "error", log_file=tmp_path / "x.jsonl", name="training")
    assert red(readable[1]) == 1
    with pytest.raises(ValueError, match=r"training: row 2 \(s2\) is unreadable: .*cannot identify.*\"skip\""):
        readable[2]
    assert count_unreadable(tmp_path / "x.jsonl") == 1
    with pytest.raises(ValueError, match="on_unreadable is 'drop'"):
        ReadableRows(rows(), "drop")


def test_neighbours_wrap_round_and_negative_indices_count_from_the_end():
    readable = ReadableRows(rows(4, 5))
    assert [red(readable[i]) for i in (3, 4, 5, -1, -6)] == [3, 0, 0, 0, 0]
    for index in (6, -7):
        with pytest.raises(IndexError):
            readable[index]
    assert len(readable) == 6 and readable.column_names == list(row_features())


def test_one_failed_read_is_tried_again_and_a_whole_row_checked_once(monkeypatch):
    class Disk(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 1:
                raise OSError("stale handle")
            return super().__getitem__(index)

    checked = []
    monkeypatch.setattr(readable_rows, "check_row", checked.append)
    disk = Disk(["a", "b"])
    readable = ReadableRows(disk)
    assert [readable[0], readable[0], readable[1]] == ["a", "a", "b"]
    assert (disk.reads, checked, readable.num_unreadable) == (4, ["a", "b"], 0)


def test_all_unreadable_is_an_error_and_so_are_many_in_a_row(monkeypatch):
    with pytest.raises(RuntimeError, match=r"rows: 3 of 3 rows in a row are unreadable, from row 1"):
        ReadableRows(rows(0, 1, 2, number=3))[1]
    monkeypatch.setattr(readable_rows, "MAX_IN_A_ROW", 2)
    readable = ReadableRows(rows(1, 2))
    with pytest.raises(RuntimeError, match="2 of 6 rows in a row"):
        readable[1]
    assert red(readable[2]) == 3


def test_rows_without_masks_and_with_several_images():
    picture = PILImage.new("RGB", (20, 10))
    check_row({"images": [picture, picture], "texts": ["a", "b"]})
    check_row({"image": picture, "masks": [], "ignore": None})
    with pytest.raises(ValueError):
        check_row({"images": [picture, None]})


def test_counted_once_over_workers_repetitions_and_starts(tmp_path):
    log = tmp_path / "unreadable.jsonl"
    readable = ReadableRows(rows(1, 4), log_file=log)
    for _ in range(2):  # each epoch starts new workers
        loader = torch.utils.data.DataLoader(
            readable, sampler=[0, 1, 1, 1, 2, 3, 4, 5], batch_size=2, num_workers=2, collate_fn=lambda batch: batch
        )
        assert [[red(read) for read in batch] for batch in loader] == [[0, 2], [2, 2], [2, 3], [5, 5]]
    assert readable.num_unreadable == 2  # the workers' memory is shared
    again = ReadableRows(rows(1, 4), log_file=log)  # a resumed run
    assert red(again[1]) == 2
    assert count_unreadable(log) == 2
    with open(log, "a") as lines:
        lines.write('{"dataset": "ro')  # killed while writing
    assert count_unreadable(log) == 2
    assert count_unreadable(tmp_path / "none") == 0


def streamed(*bad: int) -> IterableDataset:
    return rows(*bad).to_iterable_dataset()


def test_stream_drops_unreadable_rows_and_stays_a_stream(tmp_path, caplog):
    stream = readable_stream(streamed(0, 3), log_file=tmp_path / "x.jsonl", name="training")
    assert isinstance(stream, IterableDataset) and is_image_dataset(stream)
    assert [red(read) for read in stream] == [1, 2, 4, 5]
    assert [red(read) for read in stream] == [1, 2, 4, 5]
    assert count_unreadable(tmp_path / "x.jsonl") == 2
    assert "training: row 3 (s3) is unreadable and skipped" in caplog.text
    assert sorted(red(read) for read in stream.shuffle(seed=1, buffer_size=3)) == [1, 2, 4, 5]
    assert count_unreadable(tmp_path / "x.jsonl") == 2  # in whatever order they come


def test_stream_fatal_by_option_or_after_many(monkeypatch):
    with pytest.raises(ValueError, match=r"row 3 \(s3\) is unreadable"):
        list(readable_stream(streamed(3), "error"))
    monkeypatch.setattr(readable_rows, "MAX_IN_A_ROW", 2)
    assert [red(read) for read in readable_stream(streamed(1, 3))] == [0, 2, 4, 5]
    with pytest.raises(ValueError, match=r"row 3 \(s3\) is unreadable.*so are the 1 before it"):
        list(readable_stream(streamed(2, 3)))


def test_stream_without_known_features():
    def generate():
        for number in (1, 2):
            yield row(number) | {"image": PILImage.new("RGB", (20, 10), (number, 0, 0))}

    assert [red(read) for read in readable_stream(IterableDataset.from_generator(generate))] == [1, 2]


class Reads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, reds):
        return {"loss": (self.w * reds.float()).mean()}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_trainer_skips_counts_and_logs(tmp_path, streaming):
    from robust_trainers import make_trainer

    seen = []

    def collate(batch):
        seen.extend(red(read) for read in batch)
        return {"reds": torch.tensor([red(read) for read in batch])}

    settings = {"remove_unused_columns": False, "max_steps": 6 if not streaming else 4, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, [], Reads(), **settings)
    trainer.data_collator = collate
    trainer.train_dataset = rows(1, 4)
    if streaming:
        trainer.train_dataset = trainer._readable_streams(streamed(1, 4), "train")
    trainer.train()
    assert seen[:6] == ([0, 2, 2, 3, 5, 5] if not streaming else [0, 2, 3, 5])
    assert [line["unreadable_rows"] for line in trainer.state.log_history if "unreadable_rows" in line][-1] == 2
    lines = [json.loads(line) for line in (tmp_path / "unreadable_rows.jsonl").read_text().splitlines()]
    assert {line["sample_id"] for line in lines} == {"s1", "s4"}


def no_odd_texts(row: dict) -> None:
    if row["instruction"] in ("row 1", "row 4"):
        raise ValueError("odd")


def test_rows_with_refused_texts_are_skipped_named_and_counted_like_broken_images(tmp_path):
    log = tmp_path / "unreadable.jsonl"
    readable = ReadableRows(rows(2), log_file=log, name="training", check_text=no_odd_texts)
    assert [red(readable[i]) for i in range(6)] == [0, 3, 3, 3, 5, 5]
    found = {(line["index"], line["sample_id"], "odd" in line["reason"]) for line in map(json.loads, log.open())}
    assert found == {(1, "s1", True), (4, "s4", True), (2, "s2", False)}
    assert readable.num_unreadable == count_unreadable(log) == 3
    with pytest.raises(ValueError, match=r"training: row 1 \(s1\) is unreadable: ValueError: odd"):
        ReadableRows(rows(), "error", name="training", check_text=no_odd_texts)[1]


def test_refused_texts_drop_out_of_a_stream_and_are_named_once(tmp_path):
    log = tmp_path / "unreadable.jsonl"
    stream = readable_stream(rows().to_iterable_dataset(), log_file=log, check_text=no_odd_texts)
    for _ in range(2):
        assert [red(row) for row in stream] == [0, 2, 3, 5]
    assert [json.loads(line)["sample_id"] for line in log.open()] == ["s1", "s4"]


SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\n{} loop\n"


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_would_run_a_program_or_fill_the_memory_are_unreadable(streaming, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("another program was run"))
    monkeypatch.setenv("SEGCOMPASS_MAX_IMAGE_PIXELS", "200")
    bad = [{"bytes": SCRIPT, "path": None}, {"bytes": image_bytes(0, (21, 10)), "path": None}]
    data = Dataset.from_list([row(0, image=bad[0]), row(1), row(2, image=bad[1]), row(3)], features=row_features())
    log = tmp_path / "unreadable.jsonl"
    if streaming:
        assert [red(read) for read in readable_stream(data.to_iterable_dataset(), log_file=log)] == [1, 3]
    else:
        readable = ReadableRows(data, log_file=log)
        assert [red(readable[index]) for index in range(4)] == [1, 1, 3, 3]
    assert count_unreadable(log) == 2 and "21 x 10 = 210 pixels" in log.read_text()


def test_a_transform_of_one_s_own_gets_images():
    data = rows(number=2).with_transform(lambda batch: {**batch, "image": [one.rotate(0) for one in batch["image"]]})
    assert red(ReadableRows(data)[1]) == 1
