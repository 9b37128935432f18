"""CPU time of the study, added up from the records of its runs:

    python benchmarks/scenes_study/budget.py

Every folder under `runs/scenes-study` with an `attempts` folder counts, stopped attempts and pilots included. The two
stages shared with the bundled checkpoint (vision, masks) have no record where they were copied from its own run.
"""

from collections import defaultdict

from runs import cpu_minutes, write_json
from settings import RESULTS, RUNS


def main() -> None:
    minutes = defaultdict(float)
    for attempts in RUNS.rglob("attempts"):
        minutes[attempts.relative_to(RUNS).parts[0]] += cpu_minutes(attempts.parent)
    record = {part: round(value, 1) for part, value in sorted(minutes.items())}
    record["all"] = round(sum(minutes.values()), 1)
    for part, value in record.items():
        print(f"{part:20} {value:8.1f} CPU minutes  ({value / 60:.2f} h)")
    write_json(RESULTS / "budget.json", {"cpu_minutes": record})


if __name__ == "__main__":
    main()
