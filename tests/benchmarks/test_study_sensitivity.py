"""Scripts of the study on Scenes for sensitivity and speed: settings that can be built, sharing, tables by hand."""

import json
import sys

import numpy as np
import pytest
from places import ROOT

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

pytest.importorskip("trl")

from segcompass_hf.training.recipe.parts import PartLoader, Parts  # noqa: E402

sys.path.insert(0, str(ROOT / "benchmarks" / "scenes_study"))
import sensitivity  # noqa: E402
import sensitivity_report  # noqa: E402
import speed  # noqa: E402


def test_every_setting_changes_one_thing_and_can_be_built(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the recipe is named from
    settings = list(sensitivity.settings())
    names = [name for name, *_ in settings]
    assert names[0] == "default" and len(set(names)) == len(names)
    assert not any(set(name) & set(' ()/,"') for name in names), "names of folders"
    made = {}
    for name, factor, value, changes in settings:
        assert factor is None or value != sensitivity.DEFAULTS[factor]
        recipe = sensitivity.recipe_of(tmp_path / name, "bundled", changes)
        assert [stage.name for stage in recipe.stages] == ["sae", "segmentation"]
        arguments = recipe.stages[0].arguments()
        config = PartLoader(recipe.settings).configuration(Parts.of(recipe.settings), arguments)
        made[name] = config.to_dict()
    for name in names[1:]:
        assert made[name] != made["default"], name


def test_a_setting_is_run_by_one_process_and_once(tmp_path):
    folder = tmp_path / "l1-4.0"
    with sensitivity.claimed(folder) as ours:
        assert ours
        with sensitivity.claimed(folder) as theirs:
            assert not theirs
    with sensitivity.claimed(folder) as ours:
        assert ours, "freed by whoever had it"
    (folder / "record.json").write_text("{}")
    with sensitivity.claimed(folder) as ours:
        assert not ours, "done"


def write_record(folder, factor, value, ious):
    folder.mkdir(parents=True)
    record = {
        "factor": factor,
        "value": value,
        "stages": {"sae": {"steps": 10}},
        "commit": "abc",
        "giou": {"value": float(np.mean(ious)), "low": 0.1, "high": 0.9},
        "ious": ious,
        "features_per_token": 7.25,
        "sae": {"explained_variance": 0.9, "l0": 13.0, "dead_features": 0.125},
        "cpu_minutes": 3.0,
    }
    (folder / "record.json").write_text(json.dumps(record))


def test_report_of_what_is_done(tmp_path, capsys):
    runs, output = tmp_path / "runs", tmp_path / "out" / "sensitivity"
    names, defaults = ["default", "l1-4.0", "l1-0.25"], {"l1": 1.0}
    sensitivity_report.report(runs, names, defaults, output)
    assert not output.parent.exists(), "nothing to compare with"
    write_record(runs / "default", None, None, [0.5, 0.5, 0.5])
    write_record(runs / "l1-4.0", "l1", 4.0, [0.75, 0.75, 0.75])
    sensitivity_report.report(runs, names, defaults, output)
    text = output.with_suffix(".md").read_text()
    # better by 0.25 on every scene: whatever is drawn
    assert "| l1 | 4.0 | 0.900 | 13.0 | 12.5% | 7.2 | 0.750 [0.100, 0.900] | +0.250 [+0.250, +0.250] |" in text
    assert "Not done: l1-0.25." in text and "6 CPU" in text and "steps: sae 10;" in text
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "not done: l1-0.25" in capsys.readouterr().out
    write_record(tmp_path / "elsewhere" / "l1-0.25", "l1", 0.25, [0.25, 0.5, 0.75])  # the other runs are gone
    sensitivity_report.report(tmp_path / "elsewhere", names, defaults, output)
    text = output.with_suffix(".md").read_text()
    assert "| l1 | 4.0 |" in text and "| l1 | 0.25 |" in text and "Not done" not in text


def test_figures_of_speed_by_hand():
    lists = {"iou": [1.0, 0.5, 0.6], "wall": [0.1, 0.3, 0.2], "cpu": [0.2, 0.2, 0.2], "tokens": [10, 20, 30]}
    short = {"iou": [0.5, 0.0, 0.1], "wall": [0.05] * 3, "cpu": [0.1] * 3, "tokens": [5, 5, 5]}
    figures = speed.figures_of({"short (4)": short, "full": lists})
    assert figures["full"]["giou"]["value"] == pytest.approx(0.7) and figures["full"]["latency"]["value"] == 0.2
    assert figures["short (4)"]["less_full"] == pytest.approx({"value": -0.5, "low": -0.5, "high": -0.5})
    assert figures["full"]["less_full"] == {"value": 0, "low": 0, "high": 0}
    row = speed.table(figures).splitlines()[2]
    assert row.startswith("| short (4) | 5 | 50 [50, 50] | 100 [100, 100] | 0.200 [")
    assert "-0.500 [-0.500, -0.500]" in row
    assert len(speed.plot(figures).axes[0].texts) == 2


def test_speed_measures_every_setting_on_every_sample():
    from tiny import tiny_image, tiny_mask, tiny_model, tiny_processor

    from segcompass_hf.data.schema import encode_mask

    model, processor = tiny_model(), tiny_processor()
    row = {"instruction": "the red one", "masks": [encode_mask(tiny_mask()[0])]}
    rows = [{"image": tiny_image(index), **row} for index in (0, 1)]
    measured = speed.measure(model, processor, rows, {"none": ("none", None), "short (3)": ("short", 3)})
    # tags, four <REF_POS> and the end, with no or at most three tokens between
    assert measured["none"]["tokens"] == [7, 7] and max(measured["short (3)"]["tokens"]) == 10
    for values in measured.values():
        assert {len(of) for of in values.values()} == {2} and min(values["wall"]) > 0
