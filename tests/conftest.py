"""Shared set-up: `src`, `tests/support` and two folders of benchmarks can be imported, nothing reaches the network."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests" / "support", ROOT / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
sys.path += [str(ROOT / "benchmarks" / "parity"), str(ROOT / "benchmarks" / "scenes_study")]

import pytest  # noqa: E402
import torch  # noqa: E402

pytest.register_assert_rewrite("parity")


@pytest.fixture
def usual_signals():
    """Ctrl-C and SIGTERM as in a terminal: a shell starts with `&` what ignores Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
