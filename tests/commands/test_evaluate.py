"""`segcompass evaluate`, its specifications of data sets, and `examples/evaluate.py`."""

import csv
import json
import runpy
import subprocess
import sys

import datasets
import numpy as np
import pytest
import refer_files
from huggingface_hub import ModelCard
from made_rows import make_rows  # noqa: E402
from PIL import Image
from places import ROOT
from tiny import tiny_model, tiny_processor

from segcompass_hf import cli
from segcompass_hf.data import row_features, scenes
from segcompass_hf.evaluation import BoxLocalizerPredictor, read_samples
from segcompass_hf.evaluation.datasets_spec import DatasetSpecError, describe_known, load_dataset_of


def evaluate(folder, *argv, dataset="scenes:val", baseline="all-objects"):
    """Exit code of the command, with an answer that needs no model unless told otherwise."""
    chosen = ["--baseline", baseline] if baseline else []
    return cli.main(["evaluate", "--dataset", dataset, "--output", str(folder), *chosen, *argv])


def fails(capsys, *argv):
    """Run, expect exit code 2, nothing on stdout and one line on stderr; return that line."""
    try:
        code = cli.main(["evaluate", *map(str, argv)])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    (line,) = captured.err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def all_objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all-objects")
    assert evaluate(folder, "--num-samples", "6") == 0
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_figures_are_those_of_the_samples(all_objects, capsys):
    rows, records = list(scenes.iterate("val", 6)), read_samples(all_objects)
    assert [record["sample_id"] for record in records] == [row["sample_id"] for row in rows]
    for row, record in zip(rows, records, strict=True):
        assert record["num_targets"] == len(row["masks"])
        assert len(record["masks"]) == len(row["masks"]) + len(row["distractor_masks"])
    # All objects: the targets are found whole, so that IoU is their share of the area of all objects.
    shares = [record["target_pixels"] / record["predicted_pixels"] for record in records]
    figures = summary_of(all_objects)
    assert figures["metrics"]["gIoU"]["value"] == pytest.approx(np.mean(shares))
    assert figures["dataset"] == "scenes val" and figures["dataset_split"] == "val"
    assert figures["command"].startswith("segcompass evaluate --dataset scenes:val --output ")

    assert evaluate(all_objects, "--num-samples", "6") == 0  # again: all is there
    out = capsys.readouterr().out
    assert "all-objects on scenes val: 6 samples" in out and "6 of them were evaluated before" in out
    assert f"gIoU           {np.mean(shares):.4f} [" in out
    assert out.splitlines()[-1] == f"page: {(all_objects / 'samples.html').as_uri()}"


def test_json_is_the_summary(all_objects, capsys):
    assert evaluate(all_objects, "--num-samples", "6", "--json", "--compare", str(all_objects)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("comparison")["differences"] == []
    assert printed == summary_of(all_objects)


def test_records_of_a_run_serve_as_predictions(all_objects, tmp_path, capsys):
    argv = ["--num-samples", "6", "--predictions", str(all_objects / "samples.jsonl")]
    assert evaluate(tmp_path, *argv, baseline=None) == 0
    assert summary_of(tmp_path)["metrics"] == summary_of(all_objects)["metrics"]
    capsys.readouterr()
    assert cli.main(["evaluate", "--output", str(tmp_path), "--compare", str(all_objects)]) == 0
    assert "0 of 6 samples differ" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["num_samples"] == 6
    line = fails(capsys, "--dataset", "scenes:val", "--num-samples", "7", "--output", tmp_path / "more", *argv[2:])
    assert "scenes-val-0-000006" in line  # has no prediction


def test_the_bundled_checkpoint(tmp_path, capsys):
    assert evaluate(tmp_path, "--num-samples", "2", "--batch-size", "2", baseline=None) == 0
    assert "scenes-tiny on scenes val: 2 samples" in capsys.readouterr().out
    records = read_samples(tmp_path)
    assert all("answer" in record["reasoning"] for record in records)
    assert min(record["intersection"] / record["union"] for record in records) > 0.5
    assert (tmp_path / "model_index.yml").read_text().startswith("model-index:\n- name: scenes-tiny\n")


def test_sam_baseline_takes_the_sam_of_the_model(tmp_path):
    assert evaluate(tmp_path, "--num-samples", "2", baseline="sam-box") == 0
    assert summary_of(tmp_path)["predictor"] == "sam-box"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "scenes:nowhere"], "no split 'nowhere'; choose one of train, val, "),
        (["--dataset", "nowhere"], "there is no data set 'nowhere'. Known are: scenes:SPLIT"),
        (["--dataset", "refcoco:a:b"], "has 2 arguments; expected refcoco|"),
        (["--dataset", "refcoco:/no/where:/no/where:val"], "/no/where"),
        (["--dataset", "scenes:val", "--baseline", "magic"], "choose one of all-objects, "),
        (["--dataset", "scenes:val", "--predictions", "/no/where"], "/no/where"),
        (["--dataset", "scenes:val", "--model", "/no/where"], "no checkpoint folder '/no/where'"),
        (["--dataset", "scenes:val", "--batch-size", "0"], "'0' is not a positive number"),
        (["--dataset", "scenes:val", "--baseline", "nothing", "--predictions", "x"], "not allowed with"),
        (["--compare", "/no/where"], "holds no finished evaluation"),
        ([], "--dataset is missing"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, argv, message):
    assert message in fails(capsys, *argv, "--output", tmp_path / "out", "--num-samples", "1")


def test_another_run_in_the_folder_is_refused_unless_dropped(all_objects, tmp_path, capsys):
    argv = ["--dataset", "scenes:val", "--num-samples", "2", "--baseline", "nothing", "--output", str(tmp_path)]
    assert cli.main(["evaluate", *argv]) == 0
    capsys.readouterr()
    line = fails(capsys, *argv, "--batch-size", "3")
    assert "batch_size was 8, is 3" in line and "--restart" in line
    assert cli.main(["evaluate", *argv, "--batch-size", "3", "--restart"]) == 0
    assert summary_of(tmp_path)["settings"]["batch_size"] == 3


def test_stored_data_sets(tmp_path, monkeypatch):
    dataset = datasets.Dataset.from_list(make_rows(3), features=row_features())
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(val=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "both")
    (tmp_path / "shards").mkdir()
    for split in ("train", "test"):
        dataset.to_parquet(tmp_path / "shards" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    sizes = {}
    for spec in ("rows.parquet", "saved", "both:val", "both:test", "shards:test", f"{tmp_path}/rows.parquet"):
        named = load_dataset_of(spec)
        assert named.dataset.features == row_features()
        sizes[named.name] = len(named.dataset)
    assert sizes == {"rows.parquet": 3, "saved": 3, "both val": 3, "both test": 1, "shards test": 3}
    with pytest.raises(DatasetSpecError, match="name a split of 'both': both:val, both:test"):
        load_dataset_of("both")
    with pytest.raises(DatasetSpecError, match="no split 'train' in 'both'"):
        load_dataset_of("both:train")
    (tmp_path / "notes.txt").write_text("")
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(whole[:8] + b"\xff" * 90 + whole[98:])  # its footer is whole
    with pytest.raises(DatasetSpecError, match="'damaged.parquet' cannot be read .*; is a file damaged"):
        load_dataset_of("damaged.parquet")
    with pytest.raises(DatasetSpecError, match="no .parquet file"):
        load_dataset_of("notes.txt")


def test_refer_specification_reports_what_was_lost(tmp_path):
    refs = [
        refer_files.ref(1, 7, 70, ["left dog", "the dog"], split="testA"),
        refer_files.ref(2, 8, 80, ["a cat"], split="testA"),
    ]
    annotations = [refer_files.annotation(70, 7), refer_files.annotation(80, 8)]
    root, photographs = refer_files.write(tmp_path, refs, annotations, [refer_files.image(7), refer_files.image(8)])
    (photographs / refer_files.image(8)["file_name"]).unlink()
    named = load_dataset_of(f"refcoco:{root}:{photographs}:testA")
    assert (named.name, named.kind, named.split) == ("refcoco unc testA", "refcoco", "testA")
    assert named.dataset["instruction"][:] == ["left dog", "the dog"]
    notes = named.notes()
    assert notes["build"]["num_rows"] == 2 and notes["build"]["num_lost"] == 1
    assert [problem["kind"] for problem in notes["build"]["problems"]] == ["missing_image"]


def test_folder_specification(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[2:5, 3:9] = 255
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "instruction", "mask"], ["a.png", "the box", "a_mask.png"]])
    named = load_dataset_of(f"folder:{tmp_path}:{tmp_path / 'rows.csv'}")
    assert (named.name, named.kind) == (tmp_path.name, "folder")
    assert len(named.dataset) == 1 and named.dataset[0]["instruction"] == "the box"


def test_known_data_sets_are_described():
    for kind in (
        "scenes",
        "refcoco",
        "refcoco+",
        "refcocog",
        "grefcoco",
        "reasonseg",
        "hosted",
        "folder",
        "coco",
        "labelme",
        "yolo",
    ):
        assert kind in describe_known()
    done = subprocess.run(
        [sys.executable, "-m", "segcompass_hf.cli", "evaluate", "--help"], capture_output=True, text=True
    )
    assert "refcoco:ROOT:IMAGES:SPLIT[:SPLIT_BY]" in done.stdout and "torchrun" in done.stdout


@pytest.fixture(scope="module")
def vlm_and_sam(tmp_path_factory):
    """Folders of a tiny VLM, with its processor's parts, and of a tiny SAM."""
    folder, model, processor = tmp_path_factory.mktemp("parts"), tiny_model("qwen2_5_vl"), tiny_processor("qwen2_5_vl")
    for part in (model.vlm, processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder / "vlm")
    model.sam.save_pretrained(folder / "sam")
    return ["--boxes", str(folder / "vlm"), "--sam", str(folder / "sam")]


def test_boxes_of_a_vlm_are_evaluated(vlm_and_sam, tmp_path, capsys, monkeypatch):
    argv = [*vlm_and_sam, "--num-samples", "3", "--max-new-tokens", "2"]
    assert evaluate(tmp_path / "random", *argv, baseline=None) == 0
    figures = summary_of(tmp_path / "random")
    settings = figures["settings"]["predictor"]
    assert figures["predictor"] == settings["name"] == "vlm with sam"
    assert (settings["coordinates"], settings["image_size"], settings["max_new_tokens"]) == ("absolute", None, 2)
    # Two tokens of an untrained model are no list of boxes.
    assert "3 answers could not be understood and count as empty predictions" in capsys.readouterr().out
    assert figures["counts"]["empty_predictions"] == 3

    texts = ['[{"bbox_2d": [250, 250, 750, 750]}]', "[]", "none"]
    monkeypatch.setattr(BoxLocalizerPredictor, "_answers", lambda self, inputs: texts)
    options = ["--coordinates", "thousand", "--image-size", "56", "84"]
    assert evaluate(tmp_path / "boxes", *argv, *options, baseline=None) == 0
    settings = summary_of(tmp_path / "boxes")["settings"]["predictor"]
    assert (settings["coordinates"], settings["image_size"]) == ("thousand", [56, 84])
    assert [(len(r["masks"]), r["text"]) for r in read_samples(tmp_path / "boxes")] == [
        (1, texts[0]),
        (0, texts[1]),
        (0, texts[2]),
    ]
    assert "  1 answers could not be understood" in capsys.readouterr().out


def test_bad_input_with_boxes_is_one_line(vlm_and_sam, tmp_path, capsys):
    start = ("--dataset", "scenes:val", "--num-samples", "1", "--output", tmp_path)
    assert "--boxes needs --sam" in fails(capsys, *start, *vlm_and_sam[:2])
    assert "--sam belongs to --boxes" in fails(capsys, *start, *vlm_and_sam[2:])
    assert "--image-size belongs to --boxes" in fails(capsys, *start, "--image-size", "8", "8")
    assert "not allowed with argument" in fails(capsys, *start, *vlm_and_sam, "--baseline", "nothing")
    assert "/no/where" in fails(capsys, *start, "--boxes", "/no/where", *vlm_and_sam[2:])


def test_example(tmp_path, capsys, monkeypatch):
    argv = ["--datasets", "scenes:val", "scenes:test_pairs", "--num-samples", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv, "--baselines", "nothing"])
    runpy.run_path(str(ROOT / "examples" / "evaluate.py"), run_name="__main__")
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [tuple(cell.strip() for cell in line[:3]) for line in table[2:]]
    assert rows == [
        (name, answers, "2") for name in ("scenes val", "scenes test_pairs") for answers in ("scenes-tiny", "nothing")
    ]
    assert (tmp_path / "scenes-test_pairs" / "nothing" / "samples.html").is_file()
    card = ModelCard(f"---\n{(tmp_path / 'model_index.yml').read_text()}---\n")
    values = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    for split in ("val", "test_pairs"):
        giou = summary_of(tmp_path / f"scenes-{split}" / "scenes-tiny")["metrics"]["gIoU"]["value"]
        assert values[split, "giou"] == pytest.approx(giou, abs=5e-5)


def test_pass_at_k_samples_a_model_and_writes_a_prediction(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    argv = [
        "--model",
        str(tmp_path / "model"),
        "--num-samples",
        "3",
        "--max-new-tokens",
        "12",
        "--pass-at-k",
        "1",
        "3",
    ]
    assert evaluate(tmp_path / "out", *argv, "--temperature", "0.7", baseline=None) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert figures["k"] == [1, 3] and figures["all"]["num_prompts"] == 3
    settings = figures["settings"]["predictor"]
    assert (settings["num_samples"], settings["temperature"], settings["decoding"]) == (3, 0.7, "sampled")
    assert "--pass-at-k 1 3" in figures["command"] and "pass@3" in shown and "prediction.md" in shown
    lines = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["right"]) for line in lines] == [3] * 3


def test_pass_at_k_belongs_to_a_model(tmp_path, capsys):
    asked = ["--dataset", "scenes:val", "--output", tmp_path / "out", "--num-samples", "2"]
    line = fails(capsys, *asked, "--baseline", "all-objects", "--pass-at-k")
    assert "--pass-at-k samples a checkpoint (--model); leave --baseline out" in line
    assert "--temperature belongs to --pass-at-k" in fails(capsys, *asked, "--temperature", "1")
    alone = ["--output", tmp_path / "out", "--compare", tmp_path]
    assert "leave --compare out" in fails(capsys, *alone, "--pass-at-k")
    assert "--temperature belongs to --pass-at-k" in fails(capsys, *alone, "--temperature", "1")
    assert "temperature is 0.0" in fails(capsys, *asked, "--pass-at-k", "2", "--temperature", "0")
