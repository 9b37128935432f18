# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The controls as a table in Markdown, each with a sentence on what follows from its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Interval = tuple[float, float, float]
UNKNOWN = "nothing to measure"


def controls_markdown(figures: Mapping[str, Any], title: str, command: str) -> str:
    """The table.

    Args:
        figures (`Mapping[str, Any]`): From [`controls_figures`], and where other SAEs were given, `random_sae` and
            `reseeded_sae` from [`compared_figures`], `random_features` and `reseeded_features` from [`seed_figures`].
        title (`str`): What was measured.
        command (`str`): By what.
    """
    lines = [
        f"# Controls: {title}",
        "",
        f"{figures['masks']} masks of {figures['samples']} samples. `{command}`",
        "",
        "Means with 95 % intervals, bootstrap over images (of features that come again: over features).",
        "",
        "| control | measured | what follows |",
        "|---|---|---|",
    ]
    rows = [
        *_sae_rows(figures),
        _matched(figures["matched"]),
        _unions(figures["unions"]),
        _patches(figures["patches"]),
    ]
    rows += [_changed(figures["reasoning"]), _wrong(figures["reasoning"]), _named(figures["reasoning"])]
    lines += [f"| {name} | {measured} | {follows} |" for name, measured, follows in rows]
    for name, heading in (("random_sae", "a random SAE"), ("reseeded_sae", "an SAE of another seed")):
        if name in figures:
            lines += ["", f"The same pipeline with {heading}, on the same samples:", ""]
            lines += ["| figure | this | other | difference |", "|---|---|---|---|"]
            lines += [
                f"| {figure} | {_shown(of['this'])} | {_shown(of['other'])} | {_shown(of['difference'])} |"
                for figure, of in figures[name].items()
            ]
    return "\n".join([*lines, ""])


def _sae_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    if "random_sae" in figures:
        of = figures["random_sae"]
        measured = "; ".join(f"{name} {_shown(one['difference'])}" for name, one in of.items())
        better, equal = _split(of)
        follows = (
            f"The trained SAE is better in {better}." if better else "The trained SAE is better in nothing measured."
        )
        if equal:
            follows += f" A random one does as well in {equal}: what is said of these needs no trained SAE."
        rows.append(("random SAE of equal L0 and size, trained less random", measured, follows))
    for name, control in (
        ("reseeded_features", "second seed of the SAE"),
        ("random_features", "chance: a random SAE"),
    ):
        if name in figures:
            rows.append((control, *_seeds(figures[name])))
    return rows


def _split(compared: Mapping[str, Any]) -> tuple[str, str]:
    """Figures in which the first is better beyond its interval, and the others; deletion is better small."""
    better = [name for name, of in compared.items() if _sign(of["difference"]) == (-1 if "small" in name else 1)]
    return ", ".join(better), ", ".join(name for name in compared if name not in better)


def _seeds(of: Mapping[str, Any]) -> tuple[str, str]:
    again = {name.removeprefix("correlation_"): of[name] for name in of if name.startswith("correlation_0")}
    measured = "; ".join(
        [f"activations correlate {least} or more: {_share(share)}" for least, share in again.items()]
        + [
            f"decoder cosine {name.removeprefix('cosine_')} or more: {_share(of[name])}"
            for name in of
            if name.startswith("cosine_0")
        ]
    )
    first = next(iter(again.values()))
    follows = f"Of {of['features']} concepts that fire, {_share(first, False)} have a counterpart that fires alike"
    return measured, f"{follows}; the others are of this SAE alone."


def _matched(of: Mapping[str, Interval]) -> tuple[str, str, str]:
    measured = (
        f"IoU lost without the first 5 concepts {_shown(of['first'])}, without 5 of equal norm "
        f"{_shown(of['matched'])} (norm ratio {_shown(of['norm_ratio'])}), without any 5 {_shown(of['random'])}"
    )
    sign = _sign(of["difference"])
    follows = {
        1: f"The first concepts count beyond their norm, by {_shown(of['difference'])}.",
        0: "The first concepts count no more than others of equal norm: their effect may be their size.",
        -1: "Others of equal norm count more than the first ones: the ranking is not causal.",
        None: UNKNOWN,
    }[sign]
    return "ablations of equal norm", measured, follows


def _unions(of: Mapping[str, Interval]) -> tuple[str, str, str]:
    measured = (
        f"pairs that do together what they do singly (within 10 % of the change) {_share(of['additive'])}; that stand "
        f"in for each other {_share(of['stand_ins'])}; that overlap {_share(of['overlap'])}; without any effect "
        f"{_share(of['idle'])}"
    )
    if not _known(of["additive"]):
        return "unions of two concepts", measured, UNKNOWN
    acting = 1 - of["idle"][0]
    follows = "No two concepts do anything."
    if acting > 0:
        follows = f"Of the pairs that do something {of['additive'][0] / acting:.0%} do what single ablations say."
    if of["idle"][0] > 0.5:
        follows += " Most do nothing: others carry the mask without them."
    return "unions of two concepts", measured, follows


def _patches(of: Mapping[str, Interval]) -> tuple[str, str, str]:
    inside, area = _share(of["effect_inside"]), _share(of["area"])
    left = [_shown(of[f"without_{which}"]) for which in ("firing", "causal", "random")]
    measured = (
        f"of what single patches take from a concept, {inside} is of those where it fires, {area} of all; left of "
        f"its activation without these {left[0]}, without those that take most {left[1]}, without others {left[2]}"
    )
    if not _known(of["effect_inside"]):
        return "causal patches", measured, UNKNOWN
    inside, area = of["effect_inside"], of["area"]
    if inside[1] > area[2]:
        follows = f"Where a concept fires is what makes it fire, for {_share(inside, False)} of the effect."
    else:
        follows = "Where a concept fires does not tell which pixels made it fire."
    return "causal patches", measured, follows


def _changed(of: Mapping[str, Any]) -> tuple[str, str, str]:
    measured = "IoU to the answer: " + ", ".join(
        f"{name} {_shown(value)}" for name, value in of["iou_to_answer"].items()
    )
    none, moved = (of["iou_to_answer"].get(name) for name in ("none", "reordered"))
    if none is None or not _known(none):
        return "reasoning changed", measured, UNKNOWN
    follows = (
        "Masks do without the words."
        if none[1] > 0.9
        else f"Without the words masks keep IoU {none[0]:.2f}: they need them."
    )
    if moved is not None and _known(moved):
        follows += f" With the same parts in another order they keep {moved[0]:.2f}."
    return "reasoning changed", measured, follows


def _wrong(of: Mapping[str, Any]) -> tuple[str, str, str]:
    followed, ignored = of["error_followed"], of["error_ignored"]
    measured = f"a mask shows the object named in error {_share(followed)}, the one named before {_share(ignored)}"
    if not _known(followed):
        return "error in the reasoning", measured, UNKNOWN
    if followed[1] > ignored[2]:
        follows = "The mask follows the words."
    elif followed[2] < ignored[1]:
        follows = "The mask does not follow the words: it was found without what the reasoning's end says."
    else:
        follows = "The mask follows the words about as often as not."
    return "error in the reasoning", measured, follows


def _named(of: Mapping[str, Any]) -> tuple[str, str, str]:
    value = of["shows_what_is_named"]
    follows = f"{_share(value, False)} of the masks agree with the reasoning's end." if _known(value) else UNKNOWN
    return (
        "object named, object shown",
        f"masks that show an object that the reasoning's end names {_share(value)}",
        follows,
    )


def _known(value: Interval) -> bool:
    return math.isfinite(value[0])


def _sign(value: Interval) -> int | None:
    """1 or -1 where the interval leaves out 0, 0 where it does not, `None` where nothing was measured."""
    return None if not _known(value) else int(value[1] > 0) - int(value[2] < 0)


def _shown(value: Interval) -> str:
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" if _known(value) else "–"


def _share(value: Interval, bounds: bool = True) -> str:
    if not _known(value):
        return "–"
    mean, low, high = (100 * number for number in value)
    return f"{mean:.0f} % [{low:.0f}, {high:.0f}]" if bounds else f"{mean:.0f} %"


__all__ = ["controls_markdown"]
