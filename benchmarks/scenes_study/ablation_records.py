"""What the ablation's tables rest on: IoU and answer of every scene, curves and settings of every finished run."""

import functools
import gzip
import json
import sys
from pathlib import Path
from typing import Any

from runs import attempts, cpu_minutes
from settings import ARMS, EVALUATION_SAMPLES, EVALUATION_SEED, ROUNDS, RUNS, SPLITS

from segcompass_hf.data import scenes
from segcompass_hf.evaluation import read_samples
from segcompass_hf.evaluation.records import score_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes_evaluation import read_steps  # noqa: E402


@functools.lru_cache
def _references(split: str) -> dict[str, tuple[str, ...]]:
    rows = scenes.iterate(split, EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    return {row["sample_id"]: read_steps(row["reasoning"])[1] for row in rows}


def _read(folder: Path, seed: int | None, trained: bool) -> dict[str, Any]:
    """One finished run."""
    samples = {split: read_samples(folder / "evaluation" / split) for split in SPLITS}
    references = {split: _references(split) for split in SPLITS}
    found = {
        "seed": seed,
        "kinds": {split: [sample["kind"] for sample in samples[split]] for split in SPLITS},
        "iou": {split: [round(score_of(sample).iou, 6) for sample in samples[split]] for split in SPLITS},
        "right": {
            split: [int(read_steps(sample["text"])[1] == references[split][sample["sample_id"]]) for sample in of]
            for split, of in samples.items()
        },
        "cpu_minutes": round(cpu_minutes(folder), 1),
        "commits": sorted({attempt["commit"] for attempt in attempts(folder)}),
        "settings": (attempts(folder) or [{"settings": None}])[-1]["settings"],
    }
    if trained:
        entries = json.loads((folder / "history.json").read_text())
        found["history"] = {key: [_short(entry[key]) for entry in entries] for key in entries[0]}
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def collect(file: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs of every round and arm, by seed: those kept in `file`, and in their place and beside them those that are
    here and finished; `file` is brought up to date."""
    kept = json.loads(gzip.decompress(file.read_bytes())) if file.is_file() else {}
    for name, its in ROUNDS.items():
        found = kept.get(name, {})
        trained = [(arm, seed) for arm in ARMS for seed in its.seeds.get(arm, ())]
        places = {(arm, seed): RUNS / "arms" / name / f"{arm}-{seed}" for arm, seed in trained}
        places |= {(start, None): RUNS / "arms" / its.start / start for start in ("start", "start-latent")}
        for (arm, seed), folder in places.items():
            if not all((folder / "evaluation" / split / "samples.jsonl").is_file() for split in SPLITS):
                continue
            others = [run for run in found.get(arm, []) if run["seed"] != seed]
            found[arm] = sorted([*others, _read(folder, seed, arm in ARMS)], key=lambda run: run["seed"] or 0)
        if found:
            kept[name] = found
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept, separators=(",", ":"), sort_keys=True).encode()
    part = file.with_name(file.name + ".part")
    part.write_bytes(gzip.compress(text, mtime=0))
    part.replace(file)
    return {name: kept[name] for name in ROUNDS if name in kept}
