"""Where the repository, the helpers of the tests and the real samples lie."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
FIXTURES = ROOT / "tests" / "fixtures"
SAMPLES = Path(os.environ.get("SEGCOMPASS_SAMPLES_DIR") or ROOT.parent / "shared" / "data" / "real_samples")
