"""Explanations made by hand: what a page or a figure shows of them can be said beforehand."""

import numpy as np
from PIL import Image, ImageDraw

from segcompass_hf.explain.explanation import (
    Ablation,
    ConceptAttribution,
    Explanation,
    MaskExplanation,
    Token,
    TokenShare,
)

PATCH = 12  # pixels
INSTRUCTION = "the red circle left of the green square"
REASONING = (
    "candidates: red circle at b2, red circle at g2.\nthe one at b2 is left of the green square; the other is not."
)


def made_explanation(
    num_masks: int = 2,
    num_concepts: int = 12,
    num_ablations: int = 3,
    kept: bool = True,
    labels: tuple[str | None, ...] = ("red", "circle", None, "left of"),
    instruction: str = INSTRUCTION,
    reasoning: str = REASONING,
    cells: tuple[int, int] = (8, 6),
) -> Explanation:
    """An explanation whose mask m is a disc, and whose concept c (feature 100 m + c) fires on word c + 1 of
    the instruction (activation 2), word c + 1 of the reasoning (1) and two patches (2 and 1)."""
    width, height = cells[0] * PATCH, cells[1] * PATCH
    tokens = _tokens(instruction, reasoning, cells)
    masks = [_mask(m, num_concepts, num_ablations, labels, tokens, (width, height)) for m in range(num_masks)]
    for m, mask in enumerate(masks):
        mask.kept = kept
        for concept in mask.concepts[:num_ablations]:
            shrunk = [_disc(other, (width, height), 0.5 if other == m else 1.0) for other in range(num_masks)]
            iou = [
                float((one & two.mask).sum() / max(1, two.mask.sum())) for one, two in zip(shrunk, masks, strict=True)
            ]
            change = [-0.25 if other == m else 0.0 for other in range(num_masks)]
            concept.ablation = Ablation((concept.feature,), shrunk, iou, change)
    heatmaps = np.stack([_heat(slot, (width, height)) for slot in range(4)])
    return Explanation(
        image=_picture((width, height)),
        instruction=instruction,
        reasoning=reasoning,
        text=f"<think>{reasoning}</think><REF_POS><REF_POS><REF_POS><REF_POS>",
        tokens=tokens,
        masks=masks,
        slot_scores=[0.95 - 0.2 * slot if kept and slot < num_masks else 0.2 - 0.04 * slot for slot in range(4)],
        heatmaps=heatmaps,
        model_name="made-by-hand",
    )


def _tokens(instruction: str, reasoning: str, cells: tuple[int, int]) -> list[Token]:
    parts = [("<s>", "special", None)]
    parts += [
        ("<image>", "image", (x * PATCH, y * PATCH, (x + 1) * PATCH, (y + 1) * PATCH))
        for y in range(cells[1])
        for x in range(cells[0])
    ]
    parts += [(" " + word, "question", None) for word in instruction.split()]
    parts += [("<think>", "special", None)]
    parts += [(" " + word, "reasoning", None) for word in reasoning.split()]
    parts += [("</think>", "special", None)] + [("<REF_POS>", "reference", None)] * 4
    return [Token(position, text, kind, patch) for position, (text, kind, patch) in enumerate(parts)]


def _mask(m, num_concepts, num_ablations, labels, tokens, size) -> MaskExplanation:
    places = {
        kind: [token.position for token in tokens if token.kind == kind] for kind in ("question", "reasoning", "image")
    }
    shares = np.array([0.5**c for c in range(num_concepts)]) * np.where(np.arange(num_concepts) % 4 == 2, -1, 1)
    shares = shares / (shares.sum() or 1)
    concepts = []
    for c, share in enumerate(shares):
        fired = [
            (positions[(step * m + 2 * step + c + 1) % len(positions)], activation)
            for positions, step, activation in (
                (places["question"], 0, 2.0),
                (places["reasoning"], 0, 1.0),
                (places["image"], 4, 2.0),
                (places["image"], 5, 1.0),
            )
            if positions
        ]
        concepts.append(
            ConceptAttribution(
                feature=100 * m + c,
                share=float(share),
                contribution=float(4 * share),
                direction="for" if share > 0 else "against",
                activation=sum(activation for _, activation in fired),
                label=labels[c] if c < len(labels) else None,
                purity=0.9 if c < len(labels) and labels[c] else None,
                tokens=[TokenShare(position, value, value * share) for position, value in fired],
            )
        )
    return MaskExplanation(
        slot=m,
        score=0.95 - 0.2 * m,
        mask=_disc(m, size),
        heatmap=_heat(m, size),
        concepts=concepts,
        target="mask_logit",
        value=2.5,
        baseline_value=-1.5,
        completeness_error=0.002,
        num_concepts=num_concepts + 3,
    )


def _disc(m: int, size: tuple[int, int], scale: float = 1.0) -> np.ndarray:
    y, x = np.mgrid[: size[1], : size[0]]
    return (x - size[0] * (0.22 + 0.25 * m)) ** 2 + (y - size[1] * 0.4) ** 2 < (scale * 0.2 * min(size)) ** 2


def _heat(m: int, size: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: size[1], : size[0]]
    distance = (x - size[0] * (0.22 + 0.25 * m)) ** 2 + (y - size[1] * 0.4) ** 2
    return np.exp(-distance / (0.3 * min(size)) ** 2).astype(np.float32)


def _picture(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "#8b9199")
    draw = ImageDraw.Draw(image)
    for m, colour in enumerate(("#c9302c", "#c9302c", "#2f9e44", "#3b6fd4")):
        x, y, r = size[0] * (0.22 + 0.25 * m), size[1] * 0.4, 0.2 * min(size)
        (draw.ellipse if m < 2 else draw.rectangle)((x - r, y - r, x + r, y + r), fill=colour)
    return image
