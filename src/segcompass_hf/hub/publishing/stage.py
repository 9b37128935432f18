# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint or adapter -> a folder that holds exactly what is published: weights, processor, code, card."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...loading_segcompass import CUSTOM_PIPELINES
from ...private_text import PICTURES, check_inside

PACKAGE = Path(__file__).parents[2]
_MODEL_CLASS = "modeling_segcompass.SegCompassForReasoningSegmentation"
AUTO_MAP = {
    "AutoConfig": "configuration_segcompass.SegCompassConfig",
    "AutoModel": _MODEL_CLASS,
    "AutoModelForImageTextToText": _MODEL_CLASS,
}
PROCESSOR_CLASS = "processing_segcompass.SegCompassProcessor"
# All that the processor imports of ours.
PROCESSOR_CODE = (
    "image_files_segcompass.py",
    "images_segcompass.py",
    "judging_segcompass.py",
    "patch_coverage_segcompass.py",
    "postprocessing_segcompass.py",
    "processing_segcompass.py",
    "prompts_segcompass.py",
    "segmenters_segcompass.py",
    "threads_segcompass.py",
    "token_grids_segcompass.py",
    "trained_words_segcompass.py",
    "vlm_calls_segcompass.py",
    "vlm_processors_segcompass.py",
)
SHARDS = "model-*-of-*.safetensors"
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
# Files of a folder that belong to what is published, besides weights and code.
KEPT = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "README.md",
    "concepts.safetensors",
    "concepts.parquet",
)
# Published too where the folder has them; what somebody put into the repository by hand stays where it has none.
GUESTS = (
    "handler.py",
    "handler_inputs.py",
    *(f"{name}{ending}" for name in ("LICENSE", "NOTICE") for ending in ("", ".txt", ".md")),
    ".eval_results/*.yaml",
)
EXAMPLES = "examples/*"  # pictures that the card names
CODE = ("configuration_*.py", "modeling_*.py", "*_segcompass.py")  # of this package, beside the weights
# What a push may remove from a repository: what an earlier push put there and this one does not.
OWNED = (*KEPT, EXAMPLES, *CODE, WEIGHTS, SHARDS, INDEX, ADAPTER)


@dataclass
class Stage:
    """A complete folder to publish.

    Args:
        folder (`Path`): Holds every file that is published; weights are links.
        kind (`str`): `"model"`, or `"adapter"`, which needs a base.
        base (`str`, *optional*): Hub id of an adapter's base.
        local_base (`Path`, *optional*): Folder where the base lies on this machine.
        left_behind (`list[str]`): Files of the source that are no part of it.
    """

    folder: Path
    kind: Literal["model", "adapter"]
    base: str | None
    local_base: Path | None
    left_behind: list[str]

    def files(self) -> dict[str, Path]:
        """Path in the repository -> file, weights last."""
        found = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        return {name: found[name] for name in sorted(found, key=lambda name: (name.endswith(".safetensors"), name))}


def core_files() -> list[Path]:
    """The files of this package that travel beside the weights: flat, and all that loading needs."""
    return sorted({path for pattern in CODE for path in PACKAGE.glob(pattern)})


def stage_checkpoint(
    source: str | os.PathLike, destination: str | os.PathLike, base_model: str | None = None
) -> Stage:
    """Put what of a folder is published into another one, completed by the code that loads it.

    Optimizer states, logs, pickles, notes and whatever else lies there are not taken along. Names of folders of this
    machine are taken out of the configurations.

    Args:
        source (`str` or `os.PathLike`): A saved model or adapter, its processor beside it.
        destination (`str` or `os.PathLike`): An empty or new folder.
        base_model (`str`, *optional*): Hub id of an adapter's base, where the adapter names a folder.

    Returns:
        [`Stage`]

    Raises:
        FileNotFoundError: There is no such folder, or it lacks the configuration, the processor or weights.
        ValueError: It is no SegCompass checkpoint, an adapter whose base nobody else can find, or a file of it is a
            link that leads out of the folder.
    """
    source, destination = Path(source).expanduser(), Path(destination)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {str(source)!r}.")
    kind = _kind_of(source)
    weights = _adapter_weights(source) if kind == "adapter" else _model_weights(source)
    destination.mkdir(parents=True, exist_ok=True)
    found = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    shown = _pictures_of_card(source)
    kept = [name for name in found if name not in weights and (name in shown or _matches(name, (*KEPT, *GUESTS)))]
    for name in (*kept, *weights):
        check_inside(source / name, source)
    if "processor_config.json" not in kept and kind == "model":
        raise FileNotFoundError(
            f"{str(source)!r} has no processor_config.json; save the processor beside the model with "
            "processor.save_pretrained(folder)."
        )
    for name in kept:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)
    for name in weights:
        _link(source / name, destination / name)
    base = local_base = None
    if kind == "adapter":
        base, local_base = _write_base(source, destination, base_model)
    _write_code(destination, kind)
    for path in (destination / name for name in kept if fnmatch.fnmatchcase(name, "*config.json")):
        write_json(path, _without_sources(_read_json(path)))
    ours = {*kept, *weights, *(path.name for path in core_files())}
    return Stage(destination, kind, base, local_base, [name for name in found if name not in ours])


def write_json(path: Path, content: Any) -> None:
    """As transformers writes its configurations."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits one of the patterns; `*` does not reach into folders."""
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def is_owned(name: str) -> bool:
    """Whether a file of a repository is of the kind that a push writes."""
    return _matches(name, OWNED)


def _pictures_of_card(source: Path) -> list[str]:
    """Pictures below `examples/` that the card of a folder shows."""
    card = source / "README.md"
    if not card.is_file():
        return []
    check_inside(card, source)
    text = card.read_text(encoding="utf-8", errors="replace")
    names = (path.relative_to(source).as_posix() for path in source.glob(EXAMPLES) if path.suffix.lower() in PICTURES)
    return [name for name in names if re.search(rf"(?<![\w/]){re.escape(name)}(?![\w.])", text)]


def _kind_of(source: Path) -> Literal["model", "adapter"]:
    if (source / "adapter_config.json").is_file() and not (source / WEIGHTS).is_file():
        return "adapter"
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(source)!r} has neither config.json nor adapter_config.json; is it a folder of save_pretrained?"
        )
    model_type = _read_json(source / "config.json").get("model_type")
    if model_type != "segcompass":
        raise ValueError(f"{str(source)!r} holds a {model_type!r} model, not a SegCompass one.")
    return "model"


def _model_weights(source: Path) -> list[str]:
    """Names of the weight files; of both forms loading prefers the one file, and so is the one file published."""
    if (source / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (source / INDEX).is_file():
        pickles = sorted(path.name for path in source.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, load it and save it as safetensors" if pickles else ""
        raise FileNotFoundError(f"{str(source)!r} has neither {WEIGHTS} nor {INDEX}{hint}.")
    shards = _read_json(source / INDEX).get("weight_map")
    shards = list(shards.values()) if isinstance(shards, dict) else [shards]
    odd = [shard for shard in shards if not isinstance(shard, str) or not _matches(shard, (SHARDS,))]
    if odd or not shards:
        named = f"{odd[0]!r:.80}" if odd else "nothing"
        raise ValueError(
            f"{INDEX} names {named} as a weight file; expected names such as {SHARDS.replace('*', '00001')}."
        )
    shards = sorted(set(shards))
    missing = [shard for shard in shards if not (source / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(source)!r} lacks {len(missing)} of the {len(shards)} weight files that {INDEX} names: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )
    return [INDEX, *shards]


def _adapter_weights(source: Path) -> list[str]:
    if not (source / ADAPTER).is_file():
        raise FileNotFoundError(f"{str(source)!r} has an adapter_config.json but no {ADAPTER}.")
    return [ADAPTER]


def _write_base(source: Path, destination: Path, base_model: str | None) -> tuple[str, Path | None]:
    """Let an adapter name its base by a Hub id: a folder is there on one machine only."""
    config = _read_json(source / "adapter_config.json")
    named = config.get("base_model_name_or_path") or ""
    local = Path(named).expanduser() if named and Path(named).expanduser().is_dir() else None
    base = base_model or named
    try:
        if base.count("/") != 1 or Path(base).is_dir():
            raise HFValidationError
        validate_repo_id(base)
    except HFValidationError:
        raise ValueError(
            f"the adapter names {base!r} as its base model, which is no Hub id, so nobody else could load it; publish "
            'the base and pass base_model="owner/name" (--base-model).'
        ) from None
    config["base_model_name_or_path"] = base
    write_json(destination / "adapter_config.json", config)
    return base, local


def _write_code(destination: Path, kind: str) -> None:
    """Copy the code, and name it where the Auto classes and `pipeline` look."""
    for path in core_files():
        if kind == "model" or path.name in PROCESSOR_CODE:
            shutil.copyfile(path, destination / path.name)
    if kind == "model":
        config = _read_json(destination / "config.json")
        config.update(auto_map=AUTO_MAP, custom_pipelines=CUSTOM_PIPELINES)
        write_json(destination / "config.json", config)
    processor = destination / "processor_config.json"
    if processor.is_file():
        write_json(processor, _read_json(processor) | {"auto_map": {"AutoProcessor": PROCESSOR_CLASS}})
    elif kind == "adapter":
        for name in PROCESSOR_CODE:
            (destination / name).unlink()


def _without_sources(value: Any) -> Any:
    """A configuration without where its parts came from."""
    if isinstance(value, list):
        return [_without_sources(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = ((name, item) for name, item in value.items() if name not in ("_name_or_path", "name_or_path"))
    return {name: _without_sources(item) for name, item in kept}


def _link(source: Path, destination: Path) -> None:
    """A link where the file system has them, else a copy: weights are large."""
    try:
        destination.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, destination)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, expected an object.")
    return content


__all__ = ["Stage", "core_files", "is_owned", "stage_checkpoint"]
