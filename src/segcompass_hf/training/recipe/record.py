# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What is known of a stage on the disk: begun with which settings, and (written last) done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ...files import file_digest, json_digest, read_json_object, write_whole
from ...locks import alone_with
from .parts import Parts
from .settings import Recipe, RecipeError, Stage

BEGUN, DONE = "stage_begun.json", "stage_done.json"
_FIELDS = {"fingerprint": dict, "processes": int, "starts": list}  # of both records
_FIELDS_DONE = {"seconds": (int, float), "result": str, "log": list}
# What changes nothing of the result, and may be another when a run goes on.
WITHOUT_EFFECT = {"logging_steps", "save_steps", "save_total_limit", "save_strategy", "disable_tqdm", "report_to"}
WITHOUT_EFFECT |= {"dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "use_cpu"}
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "config.json", "adapter_config.json")


def weights_digest(source: str) -> str:
    """SHA-256 of the weights and configurations of a folder; of a Hub id the id itself."""
    folder = Path(source)
    if not folder.is_dir():
        return f"hub:{source}"
    names = {path.name for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    return json_digest({name: file_digest(folder / name) for name in names})[:16]


def expected_record(recipe: Recipe, stage: Stage, parts: Parts) -> dict[str, Any]:
    """What a stage's result follows from, as plain values by name: its settings and the recipe's that bear on it, but
    for those without effect, and digests of what it starts from."""
    settings = recipe.settings
    values = {f"{stage.name}.{name}": value for name, value in stage.written.items() if name not in WITHOUT_EFFECT}
    shared = ("dtype", "attn_implementation", "load_in_4bit", "processor")
    values |= {name: getattr(settings, name) for name in shared}
    has_heads = stage.name in ("segmentation", "grpo")
    of_config = settings.config if has_heads else {"num_slots": settings.config.get("num_slots")}  # <REF_POS> in texts
    values |= {f"config.{name}": value for name, value in of_config.items()}
    values |= {f"start:{part}": weights_digest(source) for part, source in parts.used_by(stage.name).items()}
    return json.loads(json.dumps(values))


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """A record of a stage's folder; `None` where there is none."""
    remedy = f"delete {folder} to train the stage again"
    try:
        record = read_json_object(folder / name, remedy)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecipeError(str(error)) from error
    kinds = _FIELDS | (_FIELDS_DONE if name == DONE else {})
    wrong = [field for field, kind in kinds.items() if not isinstance(record.get(field), kind)]
    if wrong:
        raise RecipeError(f"{folder / name} is damaged: {', '.join(wrong)} missing or of a wrong type; {remedy}.")
    return record


def write_record(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    write_whole(folder / name, json.dumps(content, indent=1) + "\n", durable=True)


@contextmanager
def alone_in(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder of a run; freed when the block or the process ends, however it ends.

    Raises:
        RecipeError: Another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            refusal = f"another process is training in {folder}; wait for it, or end it."
            stack.enter_context(alone_with(Path(folder) / ".lock", refusal))
        except FileExistsError as error:
            raise RecipeError(str(error)) from None
        yield


def check_unchanged(stage: Stage, record: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse to reuse, or go on with, what came from other settings.

    Raises:
        RecipeError: Names every setting that differs, with both values.
    """
    known = record["fingerprint"]
    changed = []
    for name in sorted({*known, *expected}):
        if known.get(name) != expected.get(name):
            was, is_now = (json.dumps(of[name]) if name in of else "not set" for of in (known, expected))
            what = f"what it starts from ({name[6:]})" if name.startswith("start:") else name
            changed.append(f"{what} was {was} and is {is_now}")
    if changed:
        state = "is done" if "seconds" in record else "has begun"
        raise RecipeError(
            f"stage {stage.name} {state} in {stage.folder} with other settings: {'; '.join(changed)}. Undo the "
            "change, delete that folder (and those of later stages) to train again, or name another output_dir."
        )


__all__ = [
    "BEGUN",
    "DONE",
    "alone_in",
    "check_unchanged",
    "expected_record",
    "read_record",
    "weights_digest",
    "write_record",
]
