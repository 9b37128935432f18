# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What has to hold before a staged checkpoint is published: weights, loading, one answer, card, figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...private_text import PICTURES, check_file
from .stage import ADAPTER, INDEX, WEIGHTS, Stage

if TYPE_CHECKING:
    import torch
    from PIL import Image

PROBE_INSTRUCTION = "the largest object"
LICENSED = ("license", "license_name")


def check_stage(stage: Stage, evaluations: Sequence[dict[str, Any]] = (), device: Any = None) -> list[str]:
    """Look at what would be published as a stranger would use it.

    Every weight is there and finite; no text holds a key or a folder of this machine; the folder loads; it answers
    the card's examples (without any, a drawn image) with finite maps; the card's header is valid; figures belong to
    these weights.

    Args:
        stage ([`Stage`]): What would be published.
        evaluations (`Sequence[dict]`): Summaries of the evaluation runner that the card states.
        device (`torch.device` or `str`, *optional*): Where to run; a GPU where there is one by default.

    Returns:
        `list[str]`: What was checked, a line each.

    Raises:
        ValueError: Something does not hold, with what to do.
    """
    done = [check_weights(stage.folder), check_texts(stage)]
    examples, line = check_card(stage.folder)
    done.append(line)
    model, processor = load_stage(stage, device)
    done.append(f"loads as {type(model).__name__} in {str(model.dtype).removeprefix('torch.')}")
    done.append(_check_answers(model, processor, examples))
    if (stage.folder / "concepts.safetensors").is_file():
        done.append(_check_dictionary(stage.folder, model))
    done += [_check_figures(model, run) for run in evaluations]
    return done


def check_texts(stage: Stage) -> str:
    """No key, token or password and no folder of this machine stands in what would be published.

    Raises:
        ValueError: One does, with the file and line.
    """
    files = {name: path for name, path in stage.files().items() if path.suffix.lower() not in PICTURES}
    for name, path in files.items():
        check_file(path, name)
    return f"no key and no folder of this machine in {len(files)} files"


def check_weights(folder: Path) -> str:
    """Every tensor that the index names is in its file, and every number is finite.

    Raises:
        ValueError: A file is cut short, the index is not that of the files, or a weight is NaN or infinite.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    index = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else None
    names = sorted(set(index.values())) if index else [ADAPTER if (folder / ADAPTER).is_file() else WEIGHTS]
    found, total = {}, 0
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key)
                    found[key] = name
                    total += tensor.numel()
                    if tensor.is_floating_point() and not _is_finite(tensor, torch):
                        raise ValueError(f"{name}: {key} holds NaN or infinite values; publish an earlier checkpoint.")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} cannot be read ({error}); is it cut short?") from error
    if index is not None and index != found:
        wrong = sorted(key for key in index.keys() | found.keys() if index.get(key) != found.get(key))
        raise ValueError(
            f"{INDEX} does not describe the weight files: {len(wrong)} weights are elsewhere or missing "
            f"({', '.join(wrong[:3])}); save the model again."
        )
    return f"{len(found)} weights, {total:,} numbers, all finite, in {len(names)} file{'s' * (len(names) > 1)}"


def _is_finite(tensor: torch.Tensor, torch: Any) -> bool:
    """In parts: a comparison of a whole embedding matrix would take as much memory again."""
    if tensor.element_size() == 1:  # float8 has no isfinite
        tensor = tensor.to(torch.float16)
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(1 << 24))


def check_card(folder: Path) -> tuple[list[tuple[Path, str]], str]:
    """The header of README.md is valid, it states a licence, and the images of its examples are in the folder.

    Returns:
        `tuple`: (image file, instruction) of each example, and what was checked.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise ValueError("there is no README.md; write one with write_model_card(folder).")
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # whatever a header that is not ours makes the readers raise
        raise ValueError(f"the header of README.md is not valid: {type(error).__name__}: {error}") from error
    if not any(data.get(name) for name in LICENSED):
        raise ValueError("README.md states no licence; write `license: ...` into its header.")
    examples = []
    for example in data.get("widget") or []:
        source, text = example.get("src"), example.get("text")
        if not source or not text:
            raise ValueError(f"an example of README.md needs src (an image) and text (an instruction): {example}.")
        if "://" in source:
            continue
        if not (folder / source).is_file():
            raise ValueError(f"README.md shows {source} as an example, which is not in the folder.")
        examples.append((folder / source, text))
    results = len(data.eval_results or [])
    return examples, f"card: licence {data.get('license') or data.get('license_name')}, {results} results"


def load_stage(stage: Stage, device: Any = None) -> tuple[Any, Any]:
    """Model in eval mode and processor of a staged folder.

    Raises:
        ValueError: Whatever keeps it from loading; also weights of the files that the model does not have.
    """
    import torch

    from ...modeling_segcompass import SegCompassForReasoningSegmentation
    from ...processing_segcompass import SegCompassProcessor
    from ...segmenters_segcompass import check_canvas, geometry_of

    try:
        if stage.kind == "adapter":
            model, processor = _load_adapter(stage)
        else:
            model = SegCompassForReasoningSegmentation.from_pretrained(stage.folder, local_files_only=True)
            processor = SegCompassProcessor.from_pretrained(stage.folder)
    except Exception as error:  # whatever damaged files make the readers raise
        raise ValueError(f"what would be published does not load: {error}") from error
    slots = getattr(model.config, "num_slots", processor.num_slots)
    if processor.num_slots != slots:
        raise ValueError(f"the processor is made for {processor.num_slots} slots, the model has {slots}.")
    check_canvas(processor.geometry, geometry_of(model.config.sam_config))
    image_token = getattr(model.config, "image_token_id", processor.image_token_id)
    if image_token != processor.image_token_id:
        raise ValueError(
            f"the processor writes token {processor.image_token_id} for image patches, the model reads {image_token} "
            "as image; set image_token_id in its config.json, or take the processor that belongs to it."
        )
    if not getattr(model, "hf_quantizer", None):
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), processor


def _load_adapter(stage: Stage) -> tuple[Any, Any]:
    """Base and adapter as `AutoModel` puts them together."""
    from peft import PeftConfig, get_peft_model_state_dict
    from safetensors import safe_open

    from ...modeling_segcompass import SegCompassForReasoningSegmentation
    from ...processing_segcompass import SegCompassProcessor
    from ...training.adapters import check_peft_config

    base = str(stage.local_base or stage.base)
    model = SegCompassForReasoningSegmentation.from_pretrained(base)
    check_peft_config(model, PeftConfig.from_pretrained(str(stage.folder)))
    model.load_adapter(str(stage.folder))
    with safe_open(stage.folder / ADAPTER, framework="pt") as file:
        stored = {key.removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118
    expected = set(get_peft_model_state_dict(model, adapter_name="default"))
    if stored != expected:
        wrong = sorted(stored ^ expected)
        raise ValueError(f"{ADAPTER} and the adapter's configuration differ in {len(wrong)} weights: {wrong[:3]}")
    has_processor = (stage.folder / "processor_config.json").is_file()
    return model, SegCompassProcessor.from_pretrained(str(stage.folder) if has_processor else base)


def _check_answers(model: Any, processor: Any, examples: list[tuple[Path, str]]) -> str:
    from ...images_segcompass import to_rgb_image

    loaded = [(to_rgb_image(path), text) for path, text in examples] or [(_probe(), PROBE_INSTRUCTION)]
    kept = []
    for image, instruction in loaded:
        inputs = processor(images=image, instruction=instruction, return_tensors="pt").to(model.device)
        answer = model.segment(**inputs)
        for name in ("heatmap_logits", "slot_logits", "pred_masks"):
            if not getattr(answer, name).isfinite().all():
                raise ValueError(f"{name} of an answer ({instruction!r}) are not finite; in which precision is it?")
        sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
        kept.append(len(processor.post_process_segmentation(answer, **sizes)[0]["scores"]))
    source = "examples of the card" if examples else "a drawn image"
    return f"answers {len(kept)} instruction{'s' * (len(kept) > 1)} on {source}: {kept} masks kept"


def _check_dictionary(folder: Path, model: Any) -> str:
    from ...explain.dictionary.dictionary import ConceptDictionary

    try:
        dictionary = ConceptDictionary.load(folder, model)
    except FileNotFoundError as error:
        raise ValueError(f"half of the concept dictionary is missing: {error}") from error
    return f"concept dictionary: {len(dictionary):,} features, of this SAE"


def _probe() -> Image.Image:
    """A light disc on a dark ground."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[:96, :128]
    inside = (rows - 40) ** 2 + (columns - 70) ** 2 < 400
    return Image.fromarray(np.where(inside[..., None], [220, 200, 60], [40, 60, 90]).astype(np.uint8))


def _check_figures(model: Any, run: dict[str, Any]) -> str:
    """The evaluation was of these weights; where it ran in another precision that cannot be compared."""
    from ...files import weights_digest

    settings = run.get("settings", {}).get("predictor", {})
    evaluated, precision = settings.get("weights"), str(model.dtype).removeprefix("torch.")
    if evaluated is None:
        raise ValueError(
            f"the evaluation on {run['dataset']} is not of a model's weights but of "
            f"{run.get('predictor', 'unknown')!r}; a card holds the results of its own checkpoint: leave those out."
        )
    if settings.get("dtype", "").removeprefix("torch.") != precision:
        return f"figures on {run['dataset']}: of {settings.get('dtype', 'unknown')} weights, not compared"
    published = weights_digest(model)
    if evaluated != published:
        raise ValueError(
            f"the evaluation on {run['dataset']} was of other weights (digest {evaluated}, these have {published}); "
            "evaluate this checkpoint, or leave those results out."
        )
    return f"figures on {run['dataset']}: of these weights"


__all__ = ["check_card", "check_stage", "check_texts", "check_weights", "load_stage"]
