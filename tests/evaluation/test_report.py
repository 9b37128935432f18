"""What the runner writes beside its records: numbers, table, plots, page, block of a model card, comparisons."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import ModelCard
from made_rows import HEIGHT, WIDTH, box, make_row  # noqa: E402
from PIL import Image

from segcompass_hf.evaluation import Prediction, compare_runs, environment, evaluate_dataset, read_samples
from segcompass_hf.evaluation.html_page import PREDICTION_COLOUR, TARGET_COLOUR, worst_and_best
from segcompass_hf.evaluation.plots import iou_histogram

NOTHING = np.zeros((0, HEIGHT, WIDTH), dtype=bool)
INSTRUCTION = "the <script>alert(1)</script> box"


class Fixed:
    name = "fixed"
    settings = {"threshold": 0.5}

    def __init__(self, answers):
        self.answers = answers

    def predict(self, rows):
        masks = [self.answers[int(row["image_id"])] for row in rows]
        return [Prediction(m, [0.75] * len(m), "first & <b>then</b>", f"text of {len(m)}") for m in masks]


def rows_of(kinds=("box", "box", "none", "box")):
    """IoU with `ANSWERS`: 12 / 36, 1, 1 (rightly nothing), 0."""
    rows = [make_row(0, [box(0, 4)]), make_row(1, [box(0, 5)]), make_row(2, []), make_row(3, [box(0, 5)])]
    rows[0]["instruction"] = INSTRUCTION
    return [row | {"kind": kind} for row, kind in zip(rows, kinds, strict=True)]


ANSWERS = {0: box(2, 4)[None], 1: box(0, 5)[None], 2: NOTHING, 3: box(5, 5)[None]}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    notes = {"command": "segcompass evaluate ...", "dataset_type": "owner/boxes", "dataset_split": "val"}
    rows = rows_of()
    return evaluate_dataset(Fixed(ANSWERS), rows, folder, 2, dataset_name="boxes val", notes=notes, page_samples=1)


def records_of(*scores):
    """Records of samples with the counts (intersection, union, predicted, target)."""
    names = ("intersection", "union", "predicted_pixels", "target_pixels")
    return [{"index": i, **dict(zip(names, counts, strict=True))} for i, counts in enumerate(scores)]


def test_summary_says_how_it_was_made(evaluated):
    figures = json.loads((evaluated.output_dir / "summary.json").read_text())
    assert figures == evaluated.figures
    assert evaluated.metrics["gIoU"] == pytest.approx((1 / 3 + 1 + 1 + 0) / 4)
    assert evaluated.metrics["precision@0.5"] == pytest.approx(1 / 3)  # of the three samples with a target
    assert figures["settings"]["predictor"] == {"name": "fixed", "threshold": 0.5}
    assert figures["settings"]["batch_size"] == 2 and figures["settings"]["num_samples"] == 4
    assert {"python", "torch", "transformers", "segcompass_hf", "numpy"} <= set(figures["versions"])
    assert figures["timing"]["processes"] == 1 and figures["timing"]["process_seconds"] >= 0
    assert sorted(figures["files"]) == sorted(
        p.name for p in evaluated.output_dir.iterdir() if p.is_file() and p.name != "run.json"
    )


def test_commit(monkeypatch):
    assert environment.commit() is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", environment.commit())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("no git")))
    assert environment.commit() is None


def test_markdown_table(evaluated):
    page = (evaluated.output_dir / "summary.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert table[0][:6] == ["", "samples", "gIoU", "cIoU", "N-acc", "T-acc"]
    by_name = {line[0]: dict(zip(table[0], line, strict=True)) for line in table[2:]}
    assert list(by_name) == ["all", "kind: box", "kind: none"]  # one source only: no rows by source
    # gIoU 2.3333 / 4; cIoU (12 + 30 + 0) / (36 + 30 + 60)
    assert by_name["all"]["gIoU"].startswith("0.583 [") and by_name["all"]["cIoU"].startswith("0.333 [")
    assert by_name["kind: box"]["N-acc"] == "–" and by_name["kind: none"]["T-acc"] == "–"  # nothing bears on them
    assert by_name["kind: none"]["N-acc"] == "1.000 [1.000, 1.000]"
    assert "![giou by kind](giou_by_kind.png)" in page and "segcompass evaluate ..." in page


def test_model_index_is_one_that_a_card_takes(evaluated):
    block = (evaluated.output_dir / "model_index.yml").read_text()
    results = ModelCard(f"---\nlicense: apache-2.0\n{block}---\n# A card\n").data.eval_results
    values = {result.metric_type: result.metric_value for result in results}
    assert values["giou"] == 0.5833 and values["ciou"] == 0.3333 and values["precision-at-0.5"] == 0.3333
    assert {result.dataset_type for result in results} == {"owner/boxes"}
    assert {(r.dataset_name, r.dataset_split, r.task_type) for r in results} == {
        ("boxes val", "val", "image-segmentation")
    }


def test_plots(evaluated):
    for name in ("iou_histogram.png", "giou_by_kind.png"):
        pixels = np.asarray(Image.open(evaluated.output_dir / name).convert("RGB"))
        assert pixels.shape[1] > 500 and pixels.std() > 20  # wide, and not blank
    # 3 / 5 belongs to the bin that starts at 12 / 20; 1 to the last one; no target, rightly or wrongly, on its own.
    target, none = iou_histogram(records_of((3, 5, 4, 4), (5, 5, 5, 5), (0, 9, 4, 5), (0, 0, 0, 0), (0, 3, 3, 0)))
    assert target.nonzero()[0].tolist() == [0, 12, 19] and none.nonzero()[0].tolist() == [0, 19]
    assert target.sum() == 3 and none.sum() == 2


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figures = evaluate_dataset(Fixed(ANSWERS), rows_of(), tmp_path, page_samples=0).figures
    assert "pip install 'segcompass_hf[demo]'" in figures["plots_skipped"]
    assert "No plots: " in (tmp_path / "summary.md").read_text() and not list(tmp_path.glob("*.png"))


def test_worst_and_best():
    records = records_of((5, 5, 5, 5), (0, 0, 0, 0), (1, 5, 3, 3), (0, 4, 0, 4), (4, 4, 4, 4), (0, 3, 3, 0))
    worst, best = worst_and_best(records, 2)
    assert [record["index"] for record in worst] == [3, 5]  # both IoU 0, in their order
    assert [record["index"] for record in best] == [0, 4]  # IoU 1 too, but with a target
    worst, best = worst_and_best(records, 5)
    assert [record["index"] for record in worst] == [3, 5, 2] and [record["index"] for record in best] == [0, 4, 1]


class Pictures(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            kind, data = dict(attributes)["src"].split(",")
            assert kind == "data:image/jpeg;base64"
            self.found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int))


def test_page_of_samples(evaluated):
    page = (evaluated.output_dir / "samples.html").read_text()
    assert "made-3" in page and "made-1" in page  # the worst and the best one
    assert "http" not in page  # nothing is fetched
    pictures = Pictures(page).found
    assert len(pictures) == 4 and all(picture.shape == (HEIGHT, WIDTH, 3) for picture in pictures)
    # Row 3: the target in the left half, the prediction in the right one; half image (grey 3), half tint.
    for picture, place, colour in ((pictures[0], 2, TARGET_COLOUR), (pictures[1], 7, PREDICTION_COLOUR)):
        assert np.abs(picture[3, place] - (np.array(colour) + 3) / 2).max() < 40  # JPEG
        assert picture[3, 9 - place].max() < 60  # the other half is the image
    page = evaluate_page(evaluated, 2)
    assert INSTRUCTION not in page and "the &lt;script&gt;alert(1)&lt;/script&gt; box" in page
    assert "first &amp; &lt;b&gt;then&lt;/b&gt;" in page and not {"script", "link"} & set(Pictures(page).tags)


def evaluate_page(evaluated, num_samples):
    from segcompass_hf.evaluation.html_page import samples_page
    from segcompass_hf.evaluation.rows import EvaluationRows

    records = read_samples(evaluated.output_dir)
    return samples_page(evaluated.figures, records, EvaluationRows(rows_of()), num_samples)


def test_unreadable_rows_have_no_picture(tmp_path):
    rows = rows_of()
    rows[3]["image"] = b"no image"
    evaluate_dataset(Fixed(ANSWERS), rows, tmp_path, unreadable="count", page_samples=1)
    page = (tmp_path / "samples.html").read_text()
    assert "made-3" in page and "unreadable: " in page and len(Pictures(page).found) == 2  # of the best one


def test_compare_lists_what_differs(evaluated, tmp_path):
    others = ANSWERS | {1: box(0, 4)[None], 2: box(0, 1)[None]}
    evaluate_dataset(Fixed(others), rows_of(), tmp_path / "other", page_samples=0)
    comparison = compare_runs(evaluated.output_dir, tmp_path / "other")
    # Row 2: rightly nothing against a false alarm; row 1: 30 pixels against 24 of them.
    assert [(row.index, row.iou, row.other_iou) for row in comparison.differences] == [(2, 1, 0), (1, 1, 0.8)]
    assert [row.differs for row in comparison.differences] == [["masks", "text", "scores"], ["masks"]]
    assert comparison.metrics["gIoU"] == pytest.approx((1 + 0.2) / 4)
    assert comparison.metrics["N-acc"] == 1
    assert (
        "2 of 4 samples differ" in comparison.to_text()
        and "1 made-1: IoU 1.0000 against 0.8000" in comparison.to_text()
    )
    assert "... and 1 more" in comparison.to_text(limit=1)
    assert compare_runs(evaluated.output_dir, evaluated.output_dir).differences == []


def test_compare_refuses_other_samples_and_unfinished_runs(evaluated, tmp_path):
    rows = rows_of()
    rows[1]["instruction"] = "another one"
    evaluate_dataset(Fixed(ANSWERS), rows, tmp_path / "other", page_samples=0)
    with pytest.raises(ValueError, match="sample 1 is .*'box 1'.* in one and .*'another one'"):
        compare_runs(evaluated.output_dir, tmp_path / "other")
    evaluate_dataset(Fixed(ANSWERS), rows_of()[:2], tmp_path / "short", page_samples=0)
    with pytest.raises(ValueError, match="holds 4 samples and .* 2"):
        compare_runs(evaluated.output_dir, tmp_path / "short")
    with pytest.raises(FileNotFoundError, match="no finished evaluation"):
        compare_runs(evaluated.output_dir, tmp_path)


def test_names_and_problems_cannot_act_on_a_terminal_or_a_page(tmp_path):
    """Sample ids, kinds, sources and problems are somebody else's words."""
    rows = rows_of(("$x^{$", "a\n# b\x1b[2J", "none", "c|d"))
    rows[3] |= {"image": b"no image", "sample_id": "`s`\n## t\x1b]0;title\x07", "source": "e\x1b[1A"}
    notes = {"command": "segcompass ```"}
    evaluate_dataset(Fixed(ANSWERS), rows, tmp_path, unreadable="count", notes=notes, page_samples=0)
    text = (tmp_path / "summary.md").read_text()
    assert not set(map(chr, range(32))) - {"\n"} & set(text)
    assert r"`'s'\n## t\x1b]0;title\x07`: " in text and r"| kind: a\n# b\x1b[2J |" in text
    assert r"| source: e\x1b[1A |" in text and r"| kind: c\|d |" in text and "````\nsegcompass ```\n````" in text
    assert (tmp_path / "giou_by_kind.png").is_file()  # "$" starts no formula
    others = [row | {"image": rows_of()[0]["image"]} for row in rows]
    evaluate_dataset(Fixed(ANSWERS), others, tmp_path / "other", page_samples=0)
    compared = compare_runs(tmp_path, tmp_path / "other").to_text()
    assert r"3 `s`\n## t\x1b]0;title\x07: IoU" in compared and "\x1b" not in compared
