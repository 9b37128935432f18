# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Parts of a recipe: whose pixels a model reads, and what is refused."""

import json

import pytest

pytest.importorskip("trl")

from tiny import tiny_model, tiny_processor, tiny_segmenter  # noqa: E402

from segcompass_hf.training.inputs import load_processor  # noqa: E402
from segcompass_hf.training.recipe.parts import PartLoader, Parts  # noqa: E402
from segcompass_hf.training.recipe.settings import RecipeError, RecipeSettings  # noqa: E402

OF_WHOLE, OF_SAM = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.7, 0.8, 0.9), (0.3, 0.2, 0.1))


@pytest.fixture
def folders(tmp_path):
    """A SegCompass and a SAM 2, both with statistics of pixels of their own."""
    tiny_model().save_pretrained(tmp_path / "whole")
    processor = tiny_processor()
    processor.sam_image_processor.image_mean, processor.sam_image_processor.image_std = OF_WHOLE
    processor.save_pretrained(tmp_path / "whole")
    tiny_segmenter("sam2").save_pretrained(tmp_path / "sam")
    fields = dict(zip(("image_mean", "image_std"), OF_SAM, strict=True))
    (tmp_path / "sam" / "preprocessor_config.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.mark.parametrize("changes", [{}, {"num_slots": 4, "instruction_template": "Find {instruction}."}], ids=str)
@pytest.mark.parametrize(("sam", "expected"), [(None, (*OF_WHOLE, "pad")), ("sam", (*OF_SAM, "stretch"))])
def test_pixels_are_those_of_the_model_or_of_the_sam_named(sam, expected, changes, folders):
    slots = changes.pop("num_slots", None)
    config = {} if slots is None else {"num_slots": slots}
    loader = PartLoader(RecipeSettings(output_dir="out", config=config, processor=dict(changes)))
    parts = Parts(model=str(folders / "whole"), sam=None if sam is None else str(folders / sam))
    processor = loader.processor(parts)
    pixels = processor.geometry
    assert (pixels.image_mean, pixels.image_std, pixels.fit) == expected
    model = loader.model(parts, processor)
    assert model.config.sam_config.model_type == ("sam" if sam is None else "sam2")


def test_a_sam_that_is_none_is_named(folders):
    loader = PartLoader(RecipeSettings(output_dir="out", config={}, processor={}))
    parts = Parts(model=str(folders / "whole"), sam=str(folders / "whole"))
    with pytest.raises(RecipeError, match="sam: .*'segcompass' model; expected a SAM"):
        loader.processor(parts)


def test_heatmap_concepts_are_switched_on_in_parts_and_in_a_whole_model(folders):
    settings = RecipeSettings(output_dir="out", config={"heatmap_concepts": True}, processor={})
    loader = PartLoader(settings)
    for parts in (Parts(model=str(folders / "whole")), Parts(model=str(folders / "whole"), sam=str(folders / "sam"))):
        processor = loader.processor(parts)
        model = loader.model(parts, processor)
        assert model.config.heatmap_concepts and loader.configuration(parts).heatmap_concepts
        assert not model.slot_mapper.concept_proj.weight.any()
        assert load_processor(processor, model).image_token_grids is True
