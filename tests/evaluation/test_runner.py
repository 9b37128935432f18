"""The evaluation runner: every sample once and rightly counted, for any number of processes and interruptions."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from places import ROOT, SUPPORT
from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.data import row_features, scenes
from segcompass_hf.evaluation import ModelPredictor, Prediction, compare_runs, evaluate_dataset, read_samples
from segcompass_hf.evaluation.records import RECORDS_FOLDER, SAMPLES_FILE, read_records
from segcompass_hf.locks import alone_with

SCRIPT = SUPPORT / "made_rows.py"

from made_rows import BATCH_SIZE, HEIGHT, NUM_ROWS, WIDTH, SeededBoxes, box, make_row, make_rows  # noqa: E402

NOTHING = np.zeros((0, HEIGHT, WIDTH), dtype=bool)


class Given:
    """Answers with given masks, by `sample_id`."""

    name = "given"

    def __init__(self, answers):
        self.answers = answers

    def predict(self, rows):
        return [Prediction(np.reshape(self.answers[row["sample_id"]], (-1, HEIGHT, WIDTH))) for row in rows]


def run(predictor, rows, folder, **kwargs):
    return evaluate_dataset(predictor, rows, folder, **{"batch_size": BATCH_SIZE, "page_samples": 0} | kwargs)


def launch(*arguments, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation of one process, never interrupted: its folder and figures."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(SeededBoxes(), make_rows(), folder).figures


def assert_same(folder, figures, whole):
    """The records to the byte, and all figures but times."""
    assert (folder / SAMPLES_FILE).read_bytes() == (whole[0] / SAMPLES_FILE).read_bytes()
    for name in ("metrics", "by_source", "by_kind", "counts", "settings"):
        assert figures[name] == whole[1][name]


def test_figures_by_hand(tmp_path):
    six = [box(left, 1) for left in range(6)]
    rows = [
        make_row(0, [box(0, 4)]),  # 24 pixels; 12 of them found, 12 others too: 12 / 36
        make_row(1, six),  # six objects, more than any slot count here: 36 pixels, 30 found
        make_row(2, [box(0, 4)], ignore=box(2, 4)),  # 12 pixels count; found 2 columns of them: all
        make_row(3, [], kind="none", source="empty"),  # rightly nothing
        make_row(4, [], kind="none", source="empty"),  # a false alarm of 6 pixels
    ]
    answers = {
        "made-0": [box(2, 4)],
        "made-1": [box(0, 3), box(2, 3)],
        "made-2": [box(0, 6)],
        "made-3": NOTHING,
        "made-4": [box(9, 1)],
    }
    figures = run(Given(answers), rows, tmp_path).figures
    records = read_samples(tmp_path)
    counts = [tuple(r[k] for k in ("intersection", "union", "predicted_pixels", "target_pixels")) for r in records]
    assert counts == [(12, 36, 24, 24), (30, 36, 30, 36), (12, 12, 12, 12), (0, 0, 0, 0), (0, 6, 6, 0)]
    values = {name: figure["value"] for name, figure in figures["metrics"].items()}
    assert values["gIoU"] == pytest.approx((12 / 36 + 30 / 36 + 1 + 1 + 0) / 5)
    assert values["cIoU"] == pytest.approx((12 + 30 + 12) / (36 + 36 + 12 + 0 + 6))
    assert (values["N-acc"], values["T-acc"]) == (0.5, 1)
    assert figures["metrics"]["N-acc"]["num_samples"] == 2 and figures["metrics"]["T-acc"]["num_samples"] == 3
    assert figures["by_kind"]["none"]["gIoU"]["value"] == 0.5
    assert figures["by_source"]["made"]["gIoU"]["value"] == pytest.approx((12 / 36 + 30 / 36 + 1) / 3)
    assert figures["counts"] == {
        "samples": 5,
        "left_out": 0,
        "no_target": 2,
        "several_objects": 1,
        "empty_predictions": 1,
        "unreadable": 0,
        "duplicates": 0,
        "duplicates_dropped": 0,
    }
    assert records[1]["num_targets"] == 6 and [mask["size"] for mask in records[1]["masks"]] == [[6, 10]] * 2


def test_intervals_are_over_images(tmp_path):
    """Two images with four samples each, of one image all right and of the other all wrong."""
    rows = [make_row(index, [box(0, 4)]) | {"image_id": image} for index, image in enumerate("aaaabbbb")]
    answers = {f"made-{index}": [box(0, 4)] if index < 4 else NOTHING for index in range(8)}
    figures = run(Given(answers), rows, tmp_path).figures
    assert [record["image_id"] for record in read_samples(tmp_path)] == list("aaaabbbb")
    # One of four resamples holds image b alone; drawn one by one, all eight would be wrong in 1 of 256.
    for found in (figures["metrics"]["gIoU"], figures["by_source"]["made"]["gIoU"]):
        assert (found["value"], found["low"], found["high"], found["num_samples"]) == (0.5, 0, 1, 8)


@pytest.mark.slow
def test_two_processes_give_the_records_of_one(tmp_path, whole):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    process = launch(tmp_path, 0, launcher=launcher)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["timing"]["processes"] == 2
    shares = [
        [json.loads(line)["index"] for line in open(path)] for path in sorted((tmp_path / RECORDS_FOLDER).iterdir())
    ]
    batches = [[i for i in range(b, min(b + 3, NUM_ROWS))] for b in range(0, NUM_ROWS, 3)]
    assert shares == [sum(batches[0::2], []), sum(batches[1::2], [])]
    assert_same(tmp_path, figures, whole)

    # One of the two was killed after its first batch and a half, and one process goes on.
    (second,) = (tmp_path / RECORDS_FOLDER).glob("*1.jsonl")
    lines = second.read_text().splitlines(keepends=True)
    second.write_text("".join(lines[:4]) + lines[4][:50])
    predictor = SeededBoxes()
    figures = run(predictor, make_rows(), tmp_path).figures
    assert predictor.batches == [[f"made-{i}" for i in batch] for batch in batches[1::2][1:]]  # whole batches
    assert_same(tmp_path, figures, whole)


def test_killed_and_resumed(tmp_path, whole):
    process = launch(tmp_path, 0.4)
    shard = tmp_path / RECORDS_FOLDER / "process-00000.jsonl"
    deadline = time.monotonic() + 120
    while not (shard.is_file() and shard.read_bytes().count(b"\n") >= 2 * BATCH_SIZE):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = shard.read_bytes().count(b"\n")
    assert 2 * BATCH_SIZE <= done < NUM_ROWS and not (tmp_path / SAMPLES_FILE).exists()
    with open(shard, "ab") as file:
        file.write(b'{"index": 25, "intersection": 3')  # what a kill within a write leaves

    predictor = SeededBoxes()
    figures = run(predictor, make_rows(), tmp_path).figures
    assert [row for batch in predictor.batches for row in batch] == [f"made-{i}" for i in range(done, NUM_ROWS)]
    assert figures["timing"]["last_start"]["samples"] == NUM_ROWS - done
    assert_same(tmp_path, figures, whole)

    again = SeededBoxes()
    figures = run(again, make_rows(), tmp_path).figures
    assert again.batches == []  # nothing is left to do
    assert_same(tmp_path, figures, whole)


def test_a_second_process_in_one_folder_is_refused(tmp_path, whole):
    with alone_with(tmp_path / ".lock", "held"):
        for resume in (True, False):
            with pytest.raises(FileExistsError, match="another process is evaluating into .*; wait for it"):
                run(SeededBoxes(), make_rows(), tmp_path, resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    figures = run(SeededBoxes(), make_rows(), tmp_path).figures
    assert_same(tmp_path, figures, whole)
    assert not (tmp_path / ".lock").exists()


def test_a_record_written_twice_or_damaged_counts_once(tmp_path, whole):
    run(SeededBoxes(), make_rows(), tmp_path)
    shard = tmp_path / RECORDS_FOLDER / "process-00000.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    lines[7] = "not json\n"
    lines[9] = '{"index": 9}\n'
    shard.write_text("".join(lines + lines[:5]))
    predictor = SeededBoxes()
    figures = run(predictor, make_rows(), tmp_path).figures
    assert predictor.batches == [["made-6", "made-7", "made-8"], ["made-9", "made-10", "made-11"]]
    assert_same(tmp_path, figures, whole)


def _with_another_digit(line, random):
    """One digit of a line, at random, is another one."""
    places = [place for place, character in enumerate(line) if character.isdigit()]
    place = places[random.integers(len(places))]
    return line[:place] + str((int(line[place]) + random.integers(1, 10)) % 10) + line[place + 1 :]


def test_one_changed_digit_is_not_taken_over(tmp_path, whole):
    run(SeededBoxes(), make_rows(), tmp_path)
    shard, random = tmp_path / RECORDS_FOLDER / "process-00000.jsonl", np.random.default_rng(0)
    lines = shard.read_text().splitlines(keepends=True)
    for index in range(NUM_ROWS):
        changed = [*lines[:index], _with_another_digit(lines[index], random), *lines[index + 1 :]]
        shard.write_text("".join(changed))
        assert set(range(NUM_ROWS)) - set(read_records(tmp_path)) == {index}
    changed = [lines[0], *(_with_another_digit(line, random) for line in lines[1:3]), *lines[3:]]
    shard.write_text("".join(changed))
    predictor = SeededBoxes()
    figures = run(predictor, make_rows(), tmp_path).figures
    assert predictor.batches == [["made-0", "made-1", "made-2"]]
    assert_same(tmp_path, figures, whole)


def test_a_changed_sample_of_a_finished_run_is_named(tmp_path, whole):
    lines = (whole[0] / SAMPLES_FILE).read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        changed = _with_another_digit(line, np.random.default_rng(number))
        (tmp_path / SAMPLES_FILE).write_text("".join([*lines[: number - 1], changed, *lines[number:]]))
        with pytest.raises(ValueError, match=f"{SAMPLES_FILE}, line {number} is damaged"):
            compare_runs(tmp_path, whole[0])
    for damage in ("", "[1]\n", lines[0][:40] + "\n", "\0" * 9 + "\n"):
        (tmp_path / SAMPLES_FILE).write_text(lines[0] + damage + "\n")
        with pytest.raises(ValueError, match="line 2 is damaged"):
            read_samples(tmp_path)
    # Records of older versions have no checksum.
    older = [{k: v for k, v in json.loads(line).items() if k not in ("checksum", "left_out")} for line in lines]
    (tmp_path / SAMPLES_FILE).write_text("".join(json.dumps(record) + "\n" for record in older))
    assert compare_runs(tmp_path, whole[0]).differences == []


def test_half_a_character_can_be_written(tmp_path):
    """Byte-level tokenizers cut characters, and `json` reads halves of them."""
    row = make_row(0, [box(0, 4)])
    answer = Prediction(box(0, 4)[None], [0.5], text="\ud83d and a whole \U0001f600")
    half = type("Half", (), {"name": "half", "predict": lambda _, rows: [answer] * len(rows)})()
    run(half, [row], tmp_path, page_samples=1)
    assert read_samples(tmp_path)[0]["text"] == answer.text
    again = SeededBoxes()
    with pytest.raises(ValueError, match="results of another run"):
        run(again, [row], tmp_path)
    run(half, [row], tmp_path)
    assert len(read_records(tmp_path)) == 1


def test_a_target_that_is_ignored_as_a_whole_is_left_out(tmp_path):
    rows = [
        make_row(0, [box(0, 4)]),
        make_row(1, [box(0, 4)], ignore=box(0, 6), kind="hidden"),  # found, but it does not count
        make_row(2, [box(0, 2), box(8, 1)], ignore=box(0, 6)),  # of its two objects one counts, and is missed
        make_row(3, [], ignore=box(0, 6), kind="none"),  # means nothing, and a false alarm
        make_row(4, [box(1, 2)], ignore=box(0, 6), kind="hidden"),  # something else is found
    ]
    answers = [[box(0, 4)], [box(0, 4)], NOTHING, [box(7, 1)], [box(7, 2)]]
    answers = {f"made-{index}": masks for index, masks in enumerate(answers)}
    figures = run(Given(answers), rows, tmp_path, page_samples=4).figures
    values = {name: (figure["value"], figure["num_samples"]) for name, figure in figures["metrics"].items()}
    assert values["gIoU"] == (pytest.approx(1 / 3), 3) and values["N-acc"] == (0.0, 1) and values["T-acc"] == (0.5, 2)
    assert values["cIoU"][0] == 24 / (24 + 6 + 6)
    assert figures["counts"]["left_out"] == 2 and figures["counts"]["no_target"] == 1
    assert figures["counts"]["empty_predictions"] == 1
    assert figures["by_kind"]["hidden"]["gIoU"]["num_samples"] == 0
    assert [record["left_out"] for record in read_samples(tmp_path)] == [False, True, False, False, True]
    assert "2 samples have no part in the metrics" in (tmp_path / "summary.md").read_text()
    page = (tmp_path / "samples.html").read_text()
    assert "made-2" in page and "made-1" not in page and "made-4" not in page
    assert run(Given(answers), rows, tmp_path).figures["metrics"] == figures["metrics"]  # from the records


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 4}, "batch_size was 3, is 4"),
        ({"predictor": SeededBoxes(weights="new")}, "predictor.weights was 'old', is 'new'"),
        ({"rows": make_rows()[1:]}, "dataset was .*; num_samples was 26, is 25"),
        ({"rows": [{**make_rows()[0], "instruction": "other words"}, *make_rows()[1:]]}, "dataset was "),
        ({"rows": [{**make_rows()[0], "kind": "another"}, *make_rows()[1:]]}, "dataset was "),
        ({"rows": [{**make_rows()[0], "distractor_masks": []}, *make_rows()[1:]]}, "dataset was "),
        ({"num_samples": 9}, "num_samples was 26, is 9"),
    ],
)
def test_another_run_is_not_mixed_in(tmp_path, changed, message):
    first = {"predictor": SeededBoxes(weights="old"), "rows": make_rows()}
    run(folder=tmp_path, **first)
    before = (tmp_path / SAMPLES_FILE).read_bytes()
    with pytest.raises(ValueError, match=f"results of another run; .*{message}"):
        run(folder=tmp_path, **first | changed)
    assert (tmp_path / SAMPLES_FILE).read_bytes() == before
    figures = run(folder=tmp_path, resume=False, **first | changed).figures
    assert figures["timing"]["last_start"]["samples"] == figures["counts"]["samples"] == len(read_samples(tmp_path))


@pytest.fixture
def damaged():
    """Four rows: readable, a broken image with a target of 24 pixels, one without target, masks that do not decode."""
    rows = [make_row(0, [box(0, 4)]), make_row(1, [box(0, 4)]), make_row(2, []), make_row(3, [box(0, 4)])]
    rows[3]["masks"][0]["size"] = [3, 3]
    dataset = datasets.Dataset.from_list(rows, features=row_features())
    broken = {"bytes": b"\x89PNG\r\n\x1a\n broken", "path": None}
    raw = dataset.cast_column("image", datasets.Image(decode=False))
    raw = raw.map(lambda row, i: {"image": broken if i in (1, 2) else row["image"]}, with_indices=True)
    return raw.cast(row_features())


def test_unreadable_rows_stop_or_count_as_failures(tmp_path, damaged):
    perfect = Given({"made-0": [box(0, 4)]})
    with pytest.raises(ValueError, match=r"row 1 \('made-1'\) is unreadable"):
        run(perfect, damaged, tmp_path, batch_size=1)
    figures = run(perfect, damaged, tmp_path, batch_size=1, unreadable="count").figures
    assert figures["timing"]["last_start"]["samples"] == 3  # the first row was kept
    assert [row["sample_id"] for row in figures["unreadable"]] == ["made-1", "made-2", "made-3"]
    assert figures["counts"]["unreadable"] == 3
    counts = [
        (r["intersection"], r["union"], r["predicted_pixels"], r["target_pixels"]) for r in read_samples(tmp_path)
    ]
    assert counts == [(24, 24, 24, 24), (0, 24, 0, 24), (0, 1, 1, 0), (0, 1, 0, 1)]
    values = {name: figure["value"] for name, figure in figures["metrics"].items()}
    assert (values["gIoU"], values["N-acc"], values["T-acc"]) == (1 / 4, 0, pytest.approx(1 / 3))
    assert "made-2" in (tmp_path / "summary.md").read_text()
    with pytest.raises(ValueError, match="3 rows .* counted as failures by an earlier start"):
        run(perfect, damaged, tmp_path, batch_size=1)


class Choosy(Given):
    """Refuses what asks for too much."""

    def check_row(self, row):
        if row["instruction"] == "too long":
            raise ValueError("shorten it")


def test_rows_whose_text_a_predictor_refuses_count_like_broken_images(tmp_path):
    rows = [make_row(index, [box(0, 4)]) for index in range(3)]  # targets of 24 pixels
    rows[1]["instruction"] = "too long"
    perfect = Choosy({row["sample_id"]: [box(0, 4)] for row in rows})
    with pytest.raises(ValueError, match=r"row 1 \('made-1'\) is unreadable: ValueError: shorten it"):
        run(perfect, rows, tmp_path)
    figures = run(perfect, rows, tmp_path, unreadable="count").figures
    assert [(row["sample_id"], row["problem"]) for row in figures["unreadable"]] == [
        ("made-1", "ValueError: shorten it")
    ]
    assert figures["metrics"]["gIoU"]["value"] == pytest.approx(2 / 3)
    assert [(r["intersection"], r["union"]) for r in read_samples(tmp_path)] == [(24, 24), (0, 24), (24, 24)]


def test_a_model_refuses_texts_that_it_cannot_read(tmp_path):
    folder = segcompass_hf.bundled_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    rows = [{**row, "sample_id": f"s{index}"} for index, row in enumerate(scenes.iterate("val", 4))]
    for index, words in ((1, ""), (2, None), (3, "ring " * processor.tokenizer.model_max_length)):
        rows[index]["instruction"] = words
    figures = run(ModelPredictor(model, processor), rows, tmp_path, unreadable="count").figures
    assert [row["sample_id"] for row in figures["unreadable"]] == ["s1", "s2", "s3"]
    assert figures["counts"]["samples"] == 4


def test_what_cannot_be_used_is_named(tmp_path):
    rows = make_rows(3)
    with pytest.raises(ValueError, match=r"row 0 \('made-0'\): masks of one sample differ in size"):
        run(
            type(
                "Small", (), {"name": "s", "predict": lambda _, r: [Prediction(np.ones((1, 2, 2), bool))] * len(r)}
            )(),
            rows,
            tmp_path,
        )
    with pytest.raises(ValueError, match="gave 1 predictions for 3 rows"):
        run(type("Few", (), {"name": "s", "predict": lambda _, r: [Prediction(NOTHING)]})(), rows, tmp_path)
    for wrong in (np.ones((2, 2), bool), np.ones((1, 2, 2))):
        with pytest.raises(ValueError, match="expected bool of shape"):
            Prediction(wrong)
    with pytest.raises(ValueError, match="expected numbers in"):
        Prediction(np.ones((1, 2, 2), bool), [float("nan")])
    with pytest.raises(ValueError, match="1 masks but 2 scores"):
        Prediction(np.ones((1, 2, 2), bool), [0.5, 0.5])
    with pytest.raises(ValueError, match="has 3 rows; 4 are to be evaluated"):
        run(SeededBoxes(), rows, tmp_path, num_samples=4)
    with pytest.raises(ValueError, match=r"lacks the columns \['masks'\]"):
        run(SeededBoxes(), [{"image": 0, "instruction": ""}], tmp_path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        run(SeededBoxes(), rows, tmp_path, batch_size=0)


def test_streams_and_arrow_files_give_the_same(tmp_path, whole):
    dataset = datasets.Dataset.from_list(make_rows(), features=row_features())
    for name, form in (("arrow", dataset), ("stream", dataset.to_iterable_dataset())):
        figures = run(SeededBoxes(), form, tmp_path / name).figures
        assert_same(tmp_path / name, figures, whole)
    assert (
        run(SeededBoxes(), dataset.to_iterable_dataset(), tmp_path / "few", num_samples=4).figures["counts"]["samples"]
        == 4
    )


@pytest.fixture(scope="module")
def bundled():
    path = segcompass_hf.bundled_checkpoint()
    return AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def scene_rows():
    return list(scenes.iterate("val", 8))


def test_batches_of_one_and_of_eight(bundled, scene_rows, tmp_path):
    predictor = ModelPredictor(*bundled, name="scenes-tiny")
    together = run(predictor, scene_rows, tmp_path / "8", batch_size=8)
    alone = run(predictor, scene_rows, tmp_path / "1", batch_size=1)
    comparison = compare_runs(tmp_path / "8", tmp_path / "1")
    assert comparison.num_samples == 8
    assert comparison.metrics["gIoU"] == together.metrics["gIoU"] - alone.metrics["gIoU"]
    assert abs(comparison.metrics["gIoU"]) <= 1e-3, comparison.to_text()
    assert together.metrics["gIoU"] > 0.7  # it is the trained checkpoint, and its masks are in their places
    assert all(record["reasoning"] and record["scores"] for record in read_samples(tmp_path / "8"))


def test_a_model_does_not_see_the_targets(bundled, scene_rows):
    predictor = ModelPredictor(*bundled)
    row = scene_rows[0]
    (answer,), (blind,) = predictor.predict([row]), predictor.predict([row | {"masks": [], "reasoning": None}])
    assert np.array_equal(answer.masks, blind.masks) and answer.scores == blind.scores and answer.masks.any()
    assert answer.masks.shape[1:] == row["image"].size[::-1]


def test_settings_of_a_model_change_with_what_decides_its_answers(bundled):
    model, processor = bundled
    before = ModelPredictor(model, processor).settings
    assert ModelPredictor(model, processor).settings == before
    assert ModelPredictor(model, processor, max_new_tokens=9).settings != before
    weight = next(model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
        changed = ModelPredictor(model, processor).settings
        weight.view(-1)[0] -= 1
    assert {name for name in before if before[name] != changed[name]} == {"weights"}
    with torch.no_grad():  # the same numbers in other places
        model.codebook.weight.copy_(model.codebook.weight.flip(0))
        changed = ModelPredictor(model, processor).settings
        model.codebook.weight.copy_(model.codebook.weight.flip(0))
    assert {name for name in before if before[name] != changed[name]} == {"weights"}
    assert ModelPredictor(model, processor).settings == before
    with pytest.raises(ValueError, match="greedily"):
        ModelPredictor(model, processor, do_sample=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"null", b"\0\0", b"\xff", b"[" * 100_000])
def test_a_damaged_run_file_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json is damaged .*resume=False \(--restart\)"):
        run(SeededBoxes(), make_rows(2), tmp_path)
    run(SeededBoxes(), make_rows(2), tmp_path, resume=False)
