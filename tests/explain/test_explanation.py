# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What an explanation shows of itself at the end of a notebook's cell."""

from explanations import made_explanation


def test_explanations_and_their_parts_are_shown_in_a_few_lines():
    explanation = made_explanation(num_masks=2, num_concepts=12)
    assert "made-by-hand" in repr(explanation) and len(repr(explanation)) < 1500
    concept = explanation.concepts[0][0]
    assert all(f"{name}=" in repr(concept) for name in ("feature", "share", "direction", "label"))
    assert "tokens" not in repr(concept) and "array" not in repr(concept.ablation)
    assert f"iou={concept.ablation.iou}" in repr(concept.ablation)
