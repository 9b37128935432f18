"""Controls of a data set: files, records that are taken up again, and what other checkpoints add."""

import json

import pytest
import torch

from segcompass_hf.explain import target_objects
from segcompass_hf.explain.controls import running
from segcompass_hf.explain.controls.measure import ControlRecord
from segcompass_hf.explain.controls.seeds import FeatureMatches

ROWS = [{"sample_id": f"row {number}"} for number in range(3)]


class Model(torch.nn.Linear):
    device = torch.device("cpu")

    def __init__(self, iou: float):
        super().__init__(1, 1, bias=False)
        torch.nn.init.constant_(self.weight, iou)
        self.iou = iou


@pytest.fixture
def measured(monkeypatch):
    """Which model's rows were measured, and with which seed; a model's answers have its own IoU."""
    calls = []

    def measure(model, processor, row, objects, seed):
        calls.append((model.iou, row["sample_id"], seed))
        assert objects is target_objects
        return ControlRecord(row["sample_id"], model.iou, 0)

    monkeypatch.setattr(running, "measure_controls", measure)
    monkeypatch.setattr(running, "load_checkpoint", lambda name, device: (Model(float(name)), None, name))
    matches = FeatureMatches(torch.arange(2), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    monkeypatch.setattr(running, "match_features", lambda first, second, processor, rows: matches)
    return calls


def run(folder, **options):
    words = {"title": "made on nothing", "command": "segcompass explain --controls"}
    return running.run_controls(Model(0.75), None, ROWS, folder, target_objects, **words, **options)


def test_records_figures_and_table_are_written_and_taken_up_again(measured, tmp_path):
    told = []
    figures = run(tmp_path, seed=5, report=lambda name, number: told.append((name, number)))
    assert measured == [(0.75, f"row {number}", 5 + number) for number in range(3)]
    assert told == [("this", 1), ("this", 2), ("this", 3)]
    assert figures["pipeline"]["gIoU"][0] == 0.75 and "random_sae" not in figures
    written = json.loads((tmp_path / "controls.json").read_text())
    assert written["pipeline"]["gIoU"] == [0.75, 0.75, 0.75]
    assert written["matched"]["first"] == [None, None, None]  # nothing measured: no NaN in JSON
    assert (tmp_path / "controls.md").read_text().startswith("# Controls: made on nothing")
    run(tmp_path, seed=5)
    assert len(measured) == 3
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        run(tmp_path, seed=6)


def test_other_checkpoints_are_measured_on_the_same_rows(measured, tmp_path):
    figures = run(tmp_path, others={"random_sae": "0.25", "reseeded_sae": "0.5"})
    assert [iou for iou, *_ in measured] == [0.75] * 3 + [0.25] * 3 + [0.5] * 3
    assert figures["random_sae"]["gIoU"]["difference"][0] == 0.5
    assert figures["reseeded_features"]["correlation_0.9"][0] == 0.5
    table = (tmp_path / "controls.md").read_text()
    assert "The trained SAE is better in gIoU." in table and "second seed of the SAE" in table


def test_without_rows(measured, tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        running.run_controls(Model(1.0), None, [], tmp_path, target_objects, title="", command="")
