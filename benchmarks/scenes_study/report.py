"""All tables and plots of the study, from the records of its runs:

    python benchmarks/scenes_study/report.py

Nothing is trained or measured. Records of the ablation, the claims, the speed and the signal are in the repository
beside the tables; those of the concepts and of the sensitivity are read from `runs/scenes-study`, and their tables
stay as they are where it is not there.
"""

import subprocess
import sys
from pathlib import Path

from concepts_settings import FOLDER as CONCEPTS
from settings import RUNS

HERE = Path(__file__).parent


def main() -> None:
    reports = [["ablation_report.py"], *([f"{name}.py", "--report"] for name in ("claims", "speed", "signal_share"))]
    for folder, report in (
        (CONCEPTS, ["concepts_report.py"]),
        (RUNS / "sensitivity", ["sensitivity.py", "--report"]),
        (RUNS, ["budget.py"]),
    ):
        if folder.is_dir():
            reports.append(report)
        else:
            print(f"{report[0]}: {folder} is not there, its tables stay as they are")
    for script, *flags in reports:
        print(script, flush=True)
        if subprocess.call([sys.executable, HERE / script, *flags], stdout=subprocess.DEVNULL):
            sys.exit(f"{script} failed; fix what its log says and run the same command again.")


if __name__ == "__main__":
    main()
