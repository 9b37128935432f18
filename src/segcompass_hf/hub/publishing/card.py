# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a checkpoint is, how it was made, what was measured, what is only quoted, in one template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...pages import markdown_table
from ...printable import printable
from ...private_text import check_values, without_folders
from .card_facts import architecture_table, base_of_adapter, results_how, results_table

TEMPLATES = Path(__file__).parent / "templates"
LIBRARY = "transformers"
# Image and text go in, so that is the task that it is found and tried under, as are other models of its kind on the
# Hub. `image-segmentation` has a widget that takes no text: it would ask the model for nothing.
PIPELINE_TAG = "image-text-to-text"
TAGS = (
    "reasoning-segmentation",
    "referring-expression-segmentation",
    "image-segmentation",
    "sparse-autoencoder",
    "interpretability",
    "custom_code",
    "segcompass",
)
UNKNOWN_ID = "OWNER/NAME"  # in a card that was written before anybody knew where to; a push replaces it
DEFAULT_RECIPE = "checkpoint"
EXAMPLES_FOLDER = "examples"
_HEADER_FACTS = ("license", "base_model", "language")  # of a recipe, for the header alone


def write_model_card(
    folder: str | os.PathLike,
    recipe: str | Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    evaluations: Sequence[dict[str, Any]] = (),
    training: str | None = None,
    examples: Sequence[tuple[Any, str]] = (),
    figure: str | None = None,
    space: str | None = None,
    details: str = "",
) -> Any:
    """Write the README of a checkpoint or adapter, and the images of its examples beside it.

    What a README that is there states in its header (licence, base, data sets, language, examples) stays where
    nothing else is said.

    Args:
        folder (`str` or `os.PathLike`): Of a saved model or adapter.
        recipe (`str` or `Mapping`, *optional*): What there is to tell about it: the name of one of
            [`recipe_names`], a YAML file, or its content (`title`, `summary`, `use`, `limits`, `training`, `licence`,
            `quoted` figures, ...).
        repo_id (`str`, *optional*): Where it will be, for the example of use; a push fills it in.
        base_model (`str` or `Sequence[str]`, *optional*): Hub ids of what it was trained from.
        license (`str`, *optional*): Identifier of the Hub, such as `apache-2.0`; needed where recipe and README name
            none.
        datasets (`Sequence[str]`, *optional*): Hub ids of what it was trained on.
        evaluations (`Sequence[dict]`, *optional*): Summaries of the evaluation runner (`summary.json`).
        training (`str`, *optional*): How it was trained, in Markdown; the recipe's text by default.
        examples (`Sequence[tuple]`, *optional*): (`PIL.Image` or file, instruction) for the header's `widget`; saved
            upright, as 8-bit RGB.
        figure (`str`, *optional*): Picture of answers, by its path in the folder.
        space (`str`, *optional*): Hub id of a Space to try it in.
        details (`str`, *optional*): More results, in Markdown.

    Returns:
        `huggingface_hub.ModelCard`: as written.

    Raises:
        FileNotFoundError: There is no such folder or recipe.
        ValueError: No licence is known, an adapter names no base, or what was given holds a key or a folder of this
            machine; from the commands of evaluations folders are taken out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    given = {"training": training, "details": details, "base_model": base_model, "license": license, "figure": figure}
    given |= {"datasets": datasets, "space": space, "examples": [instruction for _, instruction in examples]}
    for name, value in given.items():
        check_values(name, value)
    if not isinstance(recipe, str) or Path(recipe).is_file():
        check_values(f"the recipe {recipe}" if isinstance(recipe, str) else "the recipe", load_recipe(recipe or {}))
    for number, run in enumerate(evaluations):
        check_values(f"evaluations[{number}]", without_folders(run))
    stated = _stated_header(folder / "README.md")
    widget = _write_examples(folder, examples) or stated.get("widget") or []
    base = base_model or stated.get("base_model") or base_of_adapter(folder)
    header = {"base_model": base, "license": license or stated.get("license"), "widget": widget}
    header |= {"datasets": list(datasets) or stated.get("datasets"), "language": stated.get("language")}
    header |= {name: stated[name] for name in ("license_name", "license_link") if name in stated}
    text = {"training": training} if training else {}
    card = render_model_card(
        recipe or DEFAULT_RECIPE,
        repo_id=repo_id or UNKNOWN_ID,
        header={name: value for name, value in header.items() if value},
        evaluations=evaluations,
        architecture=architecture_table(folder),
        adapter=(folder / "adapter_config.json").is_file(),
        dictionary=(folder / "concepts.safetensors").is_file(),
        figure=figure,
        space=space,
        details=details.strip(),
        **text,
    )
    card.save(folder / "README.md")
    return card


def render_model_card(
    recipe: str | Mapping[str, Any],
    repo_id: str = UNKNOWN_ID,
    header: Mapping[str, Any] | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
    **text: Any,
) -> Any:
    """Render a card; without results and `architecture`, the one of a model that is planned.

    Args:
        recipe (`str` or `Mapping`): See [`write_model_card`].
        repo_id (`str`): Where the model is, or will be.
        header (`Mapping`, *optional*): Fields of `huggingface_hub.ModelCardData`, over the recipe's.
        evaluations (`Sequence[dict]`, *optional*): Summaries of the evaluation runner.
        text: Further variables of the template, over the recipe's.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: No licence is known.
    """
    from huggingface_hub import ModelCard, ModelCardData

    facts, evaluations = load_recipe(recipe), [without_folders(dict(run)) for run in evaluations]
    own = {name: facts[name] for name in _HEADER_FACTS if name in facts}
    header = own | dict(header or {})
    if not header.get("license"):
        raise ValueError(
            'no licence is known; pass license="..." (--license), an identifier of the Hub: that of the base model, '
            "unless you have the right to another."
        )
    if evaluations:
        from ...evaluation.report import model_index

        header["model-index"] = model_index(*evaluations)
    data = ModelCardData(library_name=LIBRARY, pipeline_tag=PIPELINE_TAG, tags=list(TAGS), **header)
    example = (header.get("widget") or [{"src": "image.jpg", "text": "the mug that is easiest to reach"}])[0]
    quoted = facts.get("quoted") or []
    values = {
        "title": "SegCompass" if repo_id == UNKNOWN_ID else repo_id.split("/")[-1],
        "architecture": "",
        "licence": f"`{header['license']}`.",
        "adapter": False,
        "quoted_title": "Quoted from the paper, not measured by us",
        "measured": results_table(evaluations),
        "measured_how": results_how(evaluations),
        "planned": "architecture" not in text,
        "recipe": recipe if isinstance(recipe, str) else "FILE",
    }
    values |= {name: value for name, value in facts.items() if name not in _HEADER_FACTS}
    values |= text
    table = markdown_table(["data set", "metric", "value"], quoted)
    values["quoted"] = table if quoted else facts.get("quoted_missing")
    values |= {"repo_id": repo_id, "base": header.get("base_model")}
    values["example_image"] = _literal(_address(example["src"], repo_id))
    values["example_instruction"] = _literal(example["text"])
    # What the template tests for has to be there: without a name it would read the header's field of that name.
    values = {"space": None, "figure": None, "dictionary": False, "details": ""} | values
    card = ModelCard.from_template(data, template_path=str(TEMPLATES / "model_card.md"), **values)
    card.text = card.text.rstrip() + "\n"
    return card


def _literal(text: str) -> str:
    """A text as Python writes it in code, whatever quotes and line breaks it holds."""
    return printable(json.dumps(str(text), ensure_ascii=False))


def _address(source: str, repo_id: str) -> str:
    """Where the pipeline finds an image of the repository."""
    is_file = source.startswith(f"{EXAMPLES_FOLDER}/")
    return f"https://huggingface.co/{repo_id}/resolve/main/{source}" if is_file else source


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in TEMPLATES.glob("*.yml") if path.stem != "paper")


def load_recipe(recipe: str | Mapping[str, Any]) -> dict[str, Any]:
    """What there is to tell about a model, from a name, a YAML file or a mapping; `extends` names one to add to."""
    facts = _read_recipe(recipe)
    for blank in ("config", "training_note"):  # what recipes that extend one another fill in
        for name, value in facts.items():
            if isinstance(value, str):
                facts[name] = value.replace(f"{{{blank}}}", str(facts.get(blank, "")))
    return facts


def _read_recipe(recipe: str | Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    if isinstance(recipe, Mapping):
        own = dict(recipe)
    else:
        path = TEMPLATES / f"{recipe}.yml"
        path = path if path.is_file() else Path(recipe)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no recipe {recipe!r}: neither a YAML file nor one of {', '.join(recipe_names())}."
            )
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(own, dict):
            raise ValueError(f"the recipe {recipe} holds no fields such as `summary: ...`.")
    base = _read_recipe(own.pop("extends")) if "extends" in own else {}
    return {**base, **own}


def _stated_header(path: Path) -> dict[str, Any]:
    """Header of a card that is there; none where it has none that can be read."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever a header that is not ours makes the readers raise
        return {}


def _write_examples(folder: Path, examples: Sequence[tuple[Any, str]]) -> list[dict[str, str]]:
    from ...images_segcompass import to_rgb_image

    widget = []
    for number, (image, instruction) in enumerate(examples):
        name = f"{EXAMPLES_FOLDER}/example_{number}.png"
        (folder / EXAMPLES_FOLDER).mkdir(exist_ok=True)
        to_rgb_image(image, f"example {number}").save(folder / name)
        widget.append({"src": name, "text": instruction, "example_title": instruction})
    return widget


__all__ = ["load_recipe", "recipe_names", "render_model_card", "write_model_card"]
