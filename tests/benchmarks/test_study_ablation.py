"""The ablation's report: intervals and differences by hand, a table from records as evaluations write them."""

import json
import sys

import numpy as np
import pytest
import torch
from places import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("trl")

sys.path.insert(0, str(ROOT / "benchmarks" / "scenes_study"))
import ablation  # noqa: E402
import ablation_records  # noqa: E402
import ablation_report  # noqa: E402
import settings  # noqa: E402
import signal_share  # noqa: E402
import start  # noqa: E402

from segcompass_hf import bundled_checkpoint  # noqa: E402
from segcompass_hf.data import scenes  # noqa: E402


def test_every_arm_of_the_study_is_named_and_shares_its_sampling():
    used = {arm for its in settings.ROUNDS.values() for arm in its.seeds}
    assert used == set(settings.ARMS) == set(ablation_report.COLORS) <= set(ablation_report.NAMES)
    assert {its.start for its in settings.ROUNDS.values()} <= set(settings.STARTS)
    assert (
        len(set(settings.TAUGHT + settings.OTHERS)) == len(settings.TAUGHT) + len(settings.OTHERS) == len(scenes.KINDS)
    )
    sampling = {"per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "temperature"}
    assert not any(sampling & set(changes) for changes in settings.ARMS.values())


def test_a_start_takes_the_warm_up_it_goes_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "RUNS", tmp_path)
    monkeypatch.chdir(ROOT)  # where the recipe is named from
    assert {its.goes_on_from for its in settings.STARTS.values()} <= {None, *settings.STARTS}
    with pytest.raises(SystemExit, match="start-cold/warmup is not finished; run start.py cold first"):
        start.recipe_of("practised")
    warmup = tmp_path / "start-cold" / "warmup"
    warmup.mkdir(parents=True)
    (warmup / start.DONE).write_text("{}")
    assert start.recipe_of("practised").settings.vlm == str(warmup)


def test_rows_of_a_start_are_of_its_kinds_but_for_every_so_manieth(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = start.recipe_of("cold")
    rows = start.rows_of(settings.STARTS["cold"], recipe)
    assert list(rows) == ["warmup", "sae", "segmentation"] and len(rows["warmup"].train) == 1500 * 32
    kinds = [rows["warmup"].train[index]["kind"] for index in range(1, 32)]
    assert set(kinds) == set(settings.TAUGHT)
    free = {rows["warmup"].train[index]["kind"] for index in range(0, 32 * 40, 32)}
    assert free & set(settings.OTHERS)
    seeds = {stage: of.train.seed for stage, of in rows.items()}
    assert len(set(seeds.values())) == 3, "each stage has scenes of its own"


def test_prompts_of_some_kinds_are_the_stream_without_the_others():
    every = [row["sample_id"] for row in scenes.iterate("train", 40, seed=101) if row["kind"] in settings.OTHERS]
    found = ablation.prompts_of(8, settings.OTHERS, seed=101)
    assert found["sample_id"] == every[:8] and set(found["kind"]) <= set(settings.OTHERS)
    assert found.features == ablation.prompts_of(8, None, seed=101).features


def test_intervals_pair_scenes_and_draw_seeds_apart():
    hard = np.linspace(0, 0.8, 50)
    one, other = [np.stack([hard + 0.2, hard + 0.2])], [hard[None]]
    assert ablation_report.interval(one, other) == pytest.approx([0.2, 0.2]), "the same scenes: nothing left to vary"
    low, high = ablation_report.interval(one, None)
    assert 0.45 < low < 0.6 < high < 0.75, "scenes vary"
    low, high = ablation_report.interval([np.stack([hard, hard + 0.2])], other)
    assert low == pytest.approx(0.0) and high == pytest.approx(0.2), "seeds vary"


def write_run(folder, ious, trained=True):
    for split in settings.SPLITS:
        (folder / "evaluation" / split).mkdir(parents=True)
        records = [
            {
                "index": index,
                "kind": ("attribute", "count")[index % 2],
                "intersection": round(1000 * iou),
                "union": 1000,
                "predicted_pixels": 1000,
                "target_pixels": 1000,
                "sample_id": f"scenes-{split}-7-{index:06d}",
                "text": "<think> a1 small red ring yes. answer 1 a1. </think>"
                if iou > 0.5
                else "<think> no. </think>",
            }
            for index, iou in enumerate(ious)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "evaluation" / split / "samples.jsonl").write_text(lines)
    if trained:
        entries = [{"step": step, **dict.fromkeys(ablation_report.CURVES, 0.5)} for step in (1, 2)]
        entries[1]["kl"] = None
        (folder / "history.json").write_text(json.dumps(entries))


def test_tables_of_the_runs_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_records, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(ablation_report, "RESULTS", tmp_path / "results")
    answers = ({f"scenes-{split}-7-{index:06d}": ("1", "a1") for index in range(2)} for split in settings.SPLITS)
    by_split = dict(zip(settings.SPLITS, answers, strict=True))
    monkeypatch.setattr(ablation_records, "_references", by_split.get)
    arms = tmp_path / "runs" / "arms" / "cold"
    write_run(arms / "start", [0.5, 0.25], trained=False)
    write_run(arms / "both-0", [0.75, 0.25])
    write_run(arms / "both-2", [0.75, 0.75])
    write_run(arms / "seg_only-2", [0.25, 0.25])
    (arms / "seg_only-1").mkdir()  # not finished
    ablation_report.main()
    record = json.loads((tmp_path / "results" / "ablation.json").read_text())
    assert list(record["runs"]) == ["cold/seg_only-2", "cold/both-0", "cold/both-2"], "as they stand in the tables"
    cold = record["cold"]
    assert cold["gIoU"]["start"]["mean"][0] == pytest.approx(0.375)
    assert cold["seeds"]["both"] == pytest.approx([0.5, 0.75])
    differences = cold["differences"]
    compared = ["both - start", "seg_only - start", "both - seg_only"]
    assert list(differences) == compared, "arms that are not finished are not compared"
    assert differences["both - start"]["first three kinds"] == [pytest.approx(0.25), pytest.approx([0.25, 0.25])]
    assert differences["both - start"]["other kinds"] == [pytest.approx(0.25), pytest.approx([0.0, 0.5])]
    assert differences["both - start"]["each seed"] == pytest.approx([0.125, 0.375])
    assert differences["both - seg_only"]["each seed"] == pytest.approx([0.5]), "only of seeds that both have"
    assert cold["kinds"]["both"] == pytest.approx({"attribute": 0.75, "count": 0.5})
    right = cold["answers right"]
    assert right["start"]["all kinds"] == 0 and right["both"]["all kinds"] == pytest.approx(0.75)
    assert right["both"]["less the start"][0] == pytest.approx(0.75)
    assert cold["answers by kind"]["both"] == pytest.approx({"attribute": 1.0, "count": 0.5})
    text = (tmp_path / "results" / "ablation.md").read_text()
    assert "| both - shared start | +0.250 [" in text and "| both | 0.500, 0.750 |" in text
    assert "| both (2 seeds) | 0.750 | 1.000 | 0.500 | +0.750 [" in text
    assert (tmp_path / "results" / "ablation_cold.png").stat().st_size > 1000

    # without the runs the kept records say the same; a run that is here replaces what was kept of it
    monkeypatch.setattr(ablation_records, "RUNS", tmp_path / "elsewhere")
    ablation_report.main()
    assert (tmp_path / "results" / "ablation.md").read_text() == text
    write_run(tmp_path / "elsewhere" / "arms" / "cold" / "both-2", [0.25, 0.25])
    ablation_report.main()
    again = json.loads((tmp_path / "results" / "ablation.json").read_text())
    assert again["cold"]["seeds"]["both"] == pytest.approx([0.5, 0.25])


def test_answers_are_compared_with_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_records, "EVALUATION_SAMPLES", 2)
    rows = list(scenes.iterate("val", 2, seed=settings.EVALUATION_SEED))
    ablation_records._references.cache_clear()
    found = ablation_records._references("val")
    ablation_records._references.cache_clear()
    assert list(found) == [row["sample_id"] for row in rows]
    assert all(words and words != ("no", "answer") for words in found.values())


def test_share_of_signal_is_that_of_gradients_made_so():
    generator = torch.Generator().manual_seed(0)
    signal, noise = torch.randn(20_000, generator=generator), torch.randn(16, 20_000, generator=generator)
    found = signal_share.share_of_signal(signal + 2 * noise)  # |s|^2 / (|s|^2 + |n|^2) = 1 / 5
    assert found["rho"] == pytest.approx(0.2, abs=0.01) and found["standard_error"] < 0.01
    assert abs(signal_share.share_of_signal(noise)["rho"]) < 0.01
    cells = {"some": {"rho": 0.2, "standard_error": 0.01}, "none": {"rho": 0.0, "standard_error": 0.1}}
    rows = list(signal_share.rows_of(cells))
    assert rows[0] == "| some | 0.2000 [0.1804, 0.2196] | 32 |"
    assert rows[1].endswith("| more than 33 |"), "8 (1 - 0.196) / 0.196"


def test_reference_arm_trains_the_reasoning_and_leaves_the_heads(tmp_path, monkeypatch):
    start = bundled_checkpoint()
    monkeypatch.setattr(ablation, "start_of", lambda name, arm: start)
    its = settings.Round("a step", "cold", {"reference": (0,)}, steps=1, kinds=("count",), changes={"warmup_steps": 0})
    ablation.train(its, "reference", 0, tmp_path, {})
    before = ablation.load("reference", start).state_dict()
    after = ablation.load("reference", tmp_path / "model").state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("vlm.") for name in changed)
    history = json.loads((tmp_path / "history.json").read_text())
    assert [entry["step"] for entry in history] == [1] and history[0]["learning_rate"] > 0
