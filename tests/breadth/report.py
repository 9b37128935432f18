#!/usr/bin/env python
# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Try VLM families, all that can be built here or those named; renew `record.json` and docs/reference/backbones.md.

python tests/breadth/report.py [FAMILY ...]
"""

import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "src")]

import transformers  # noqa: E402
from breadth.families import FAMILIES  # noqa: E402
from breadth.record import SYMBOLS, missing_packages, save  # noqa: E402
from breadth.steps import outcomes_of  # noqa: E402


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown:
        raise SystemExit(f"unknown families {unknown}; known: {', '.join(FAMILIES)}.")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for name in names or FAMILIES:
        missing = missing_packages(FAMILIES[name])
        if missing:
            print(f"{name:24} needs {', '.join(missing)}; left as it is", flush=True)  # noqa: T201
            continue
        start = time.monotonic()
        found = outcomes_of(name, FAMILIES[name])
        save({name: found})
        symbols = "".join(SYMBOLS[outcome.kind] for outcome in found.values())
        print(f"{name:24} {symbols} {time.monotonic() - start:.1f} s", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
