# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""SegCompass for Hugging Face transformers: reasoning segmentation through sparse, named concepts.

An image and an instruction go in; reasoning and one mask per object come out. Each arrow is one file::

    image, instruction
        |  processing_segcompass     instruction template, inputs of VLM and segmenter
        v
    VLM: "<think> ... </think>" + K x <REF_POS>        generation_segcompass   well-formed, states captured on the way
        |                                  |
        |  states after layer L            |  last states at <REF_POS>
        v                                  |
    modeling_sae            sparse feature activations of every token
        v                                  |
    modeling_concepts       threshold, interventions, codebook -> concept embeddings
        v                                  |
    modeling_slots          K concept slots|
        v                                  v
    modeling_heatmaps       slots + reference states + image embedding -> heatmaps, slot logits
        v
    modeling_masks          heatmaps as mask prompts -> the segmenter's mask decoder -> masks
        v
    scoring_segcompass      confidence, surprisal of the words, certainty of the mask -> calibrated scores
        v
    postprocessing_segcompass   masks at image size, without empty and double ones, scores, reasoning

`reading_segcompass` runs the stages from states to masks, `modeling_segcompass` composes them with VLM and segmenter,
`losses_segcompass` trains them, `pipeline_segcompass` wraps them for `pipeline("reasoning-segmentation")`. What VLM
families differ in: `vlm_calls_segcompass` asks their own processors for inputs, `prompts_segcompass` writes the texts
for these, `token_rows_segcompass` gives the added tokens rows, `text_stack_segcompass` finds the decoder whose states
are read, `vlm_inputs_segcompass` prepares whole sequences as generation does, `token_grids_segcompass` measures where
image tokens lie, and `concept_grids_segcompass` lays their concepts beside the image embedding. Which segmenters there
are says `segmenters_segcompass`; the one that transformers does not have is `modeling_mobile_sam`. What all ask of
files, memory and threads: `weight_files_segcompass`, `offloading_segcompass`, `threads_segcompass`.
Importing this package is cheap: classes are loaded when first used, and `AutoModel`, `AutoProcessor` and `pipeline`
learn about them the same way.
"""

from __future__ import annotations

from pathlib import Path

from ._lazy import lazy_names
from ._registration import register_when_needed

__version__ = "0.2.0"


def bundled_checkpoint(name: str = "scenes-tiny") -> Path:
    """Folder of a checkpoint that comes with this project.

    Args:
        name (`str`, *optional*, defaults to `"scenes-tiny"`): `scenes-tiny` ships with the package. It was trained
            from scratch on procedural scenes of coloured shapes, and knows nothing else. `photos-small` was trained on
            photographs of people and everyday things; for its size it lies in a clone of the repository only.

    Returns:
        `pathlib.Path`: a folder for `from_pretrained`.

    Raises:
        FileNotFoundError: This installation does not hold it.
        ValueError: There is no checkpoint of that name.
    """
    package = Path(__file__).parent
    remedies = {
        "scenes-tiny": (package, "reinstall the package, or train the checkpoint with `make checkpoint`"),
        "photos-small": (
            package.parents[1],  # of `src` in a clone
            "it is too large for the package and lies in its repository: clone that and install it by `pip install -e "
            ".`, or pass the folder checkpoints/photos-small of a clone where a model is asked for",
        ),
    }
    if name not in remedies:
        raise ValueError(f"there is no bundled checkpoint {name!r}; the names are {' and '.join(remedies)}.")
    root, remedy = remedies[name]
    path = root / "checkpoints" / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"this installation holds no bundled checkpoint {name}: {path / 'config.json'} does not exist; {remedy}."
        )
    return path


__getattr__, __dir__, __all__ = lazy_names(__name__)
__all__ += ["bundled_checkpoint"]


register_when_needed()
