"""Selection against masks in an evaluation: from rows to records, summary, table, page, card and command line."""

import json
import types

import numpy as np
import pytest
from made_rows import HEIGHT, WIDTH, box, make_row

from segcompass_hf.commands.evaluate import _print_summary
from segcompass_hf.data.schema import encode_mask
from segcompass_hf.evaluation import Prediction, evaluate_dataset, read_samples
from segcompass_hf.evaluation.records import CHECKSUM, RECORDS_FOLDER, SAMPLES_FILE, _checksum
from segcompass_hf.evaluation.tables import SELECTION_HOW, selection_markdown, selection_rows
from segcompass_hf.hub.publishing.card_facts import results_table

NOTHING = np.zeros((0, HEIGHT, WIDTH), dtype=bool)


class Given:
    name = "given"

    def __init__(self, answers):
        self.answers = answers

    def predict(self, rows):
        return [Prediction(np.reshape(self.answers[row["sample_id"]], (-1, HEIGHT, WIDTH))) for row in rows]


def rows_with(others):
    """Three kinds; the other objects of each row as given, `None` for not known."""
    rows = [
        make_row(0, [box(0, 4)], kind="drawn"),
        make_row(1, [box(0, 4)], kind="chosen"),
        make_row(2, [], kind="none"),
        make_row(3, [box(0, 4)], kind="drawn"),
    ]
    masks = [None if other is None else [encode_mask(mask) for mask in other] for other in others]
    return [row | {"distractor_masks": mask} for row, mask in zip(rows, masks, strict=True)]


ROWS = rows_with([[box(6, 4)], [box(4, 4)], [box(6, 4)], None])
# Half of the right object; a wrong one, drawn half; rightly nothing; of the last row nobody knows the other objects.
ANSWERS = {"made-0": box(0, 2), "made-1": box(4, 2), "made-2": NOTHING, "made-3": box(0, 4)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return evaluate_dataset(Given(ANSWERS), ROWS, tmp_path_factory.mktemp("evaluated"), 2, page_samples=2)


def test_the_summary_says_what_was_lost_to_what(evaluated):
    selection = json.loads((evaluated.output_dir / "summary.json").read_text())["selection"]
    values = {name: figure["value"] for name, figure in selection["all"].items()}
    assert selection["all"]["gIoU"]["num_samples"] == 3
    assert values == pytest.approx(
        {
            "gIoU": 1.5 / 3,
            "oracle_gIoU": 2 / 3,
            "lost_to_selection": 1 / 3,
            "lost_to_masks": 0.5 / 3,
            "right_choice": 2 / 3,
        }
    )
    by_kind = {
        kind: (figures["lost_to_selection"]["value"], figures["lost_to_masks"]["value"])
        for kind, figures in selection["by_kind"].items()
    }
    assert by_kind == {"chosen": (1.0, 0.0), "drawn": (0.0, 0.5), "none": (0.0, 0.0)}
    choices = [record["choice"] for record in read_samples(evaluated.output_dir)]
    assert [choice and choice["objects"] for choice in choices] == [[[0]], [[1]], [], None]
    assert (choices[1]["intersection"], choices[1]["union"]) == (0, 48)  # two objects of 24 pixels each


def test_tables_pages_and_the_terminal_show_it(evaluated, capsys):
    cells = ["0.000 [0.000, 0.000]", "1.000 [1.000, 1.000]", "0.500 [0.500, 0.500]"]
    assert [row[:2] for row in selection_rows(evaluated.figures)] == [
        ["all", 3], ["kind: chosen", 1], ["kind: drawn", 1], ["kind: none", 1],
    ]  # fmt: skip
    drawn = f"| kind: drawn | 1 | {cells[2]} | {cells[1]} | {cells[0]} | {cells[2]} | {cells[1]} |"
    markdown = (evaluated.output_dir / "summary.md").read_text()
    assert drawn in markdown and SELECTION_HOW in markdown
    page = (evaluated.output_dir / "samples.html").read_text()
    assert f"<td>kind: drawn</td><td>1</td><td>{cells[2]}</td>" in page
    assert "lost to selection 1.000, to masks 0.000" in page  # of row 1, among the worst
    _print_summary(evaluated)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "kind: drawn" in line]
    assert line.split() == f"kind: drawn 1 {cells[2]} {cells[1]} {cells[0]} {cells[2]} {cells[1]}".split()


def test_the_card_shows_each_data_set(evaluated):
    table = results_table([evaluated.figures, evaluated.figures | {"dataset": "other"}])
    assert table.count("| kind: drawn |") == 2 and "| other | kind: chosen | 1 |" in table
    assert SELECTION_HOW in table and SELECTION_HOW in results_table([evaluated.figures])


def test_without_other_objects_nothing_is_said(tmp_path, capsys):
    figures = evaluate_dataset(Given(ANSWERS), rows_with([None] * 4), tmp_path, page_samples=1)
    assert figures.figures["selection"] is None
    assert all(record["choice"] is None for record in read_samples(tmp_path))
    for text in ((tmp_path / "summary.md").read_text(), (tmp_path / "samples.html").read_text()):
        assert "selection" not in text
    assert "selection" not in results_table([figures.figures])
    old = {name: value for name, value in figures.figures.items() if name != "selection"}
    assert selection_markdown(old) == [] and "selection" not in results_table([old])
    _print_summary(figures)
    assert "choosing" not in capsys.readouterr().out


def test_records_of_an_older_version_are_completed_without_the_model(evaluated, tmp_path):
    """The model is not asked again; figures and records come out as if they had been there."""
    evaluate_dataset(Given(ANSWERS), ROWS, tmp_path, 2, page_samples=0)
    (path,) = (tmp_path / RECORDS_FOLDER).iterdir()
    old = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        del record["choice"], record[CHECKSUM]
        old.append(json.dumps(record | {CHECKSUM: _checksum(record)}) + "\n")
    path.write_text("".join(old))
    asked = types.SimpleNamespace(name="given", predict=lambda rows: pytest.fail("the model was asked"))
    figures = evaluate_dataset(asked, ROWS, tmp_path, 2, page_samples=0).figures
    assert figures["selection"] == evaluated.figures["selection"]
    assert (tmp_path / SAMPLES_FILE).read_bytes() == (evaluated.output_dir / SAMPLES_FILE).read_bytes()


def test_rows_without_a_part_in_the_metrics_have_none_here(tmp_path):
    rows = rows_with([[box(6, 4)], [box(4, 4)], [box(6, 4)], [box(6, 4)]])
    rows[1]["ignore"] = encode_mask(box(0, 4))  # all of its target
    rows[2]["image"] = b"no image"
    rows[3]["distractor_masks"][0] = {"size": [2, 2], "counts": "04"}  # of another image: as if not known
    figures = evaluate_dataset(Given(ANSWERS), rows, tmp_path, unreadable="count", page_samples=0).figures
    assert figures["selection"]["all"]["gIoU"]["num_samples"] == 1
    assert figures["metrics"]["gIoU"]["num_samples"] == 3  # the last row still counts
