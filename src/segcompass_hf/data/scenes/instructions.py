"""Scenes, second half: instructions over a layout, the objects they mean, and a reference chain of thought."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .drawing import COLORS, HELD_OUT_PAIRS, HELD_OUT_TRIPLES, SHAPES, SIZES, SceneObject

MAX_TARGETS = 4
KINDS = {  # share of the instructions
    "attribute": 0.15,
    "superlative": 0.15,
    "relation": 0.20,
    "same-as": 0.10,
    "ordinal": 0.10,
    "count": 0.05,
    "set": 0.15,
    "no-target": 0.10,
}
PREFIXES = ("find", "segment", "show me", "please segment", "highlight", "point to")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in (*SHAPES, "object")}
VALUES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# (words, value that the object meant has least of)
POSITIONS: dict[str, Callable[[SceneObject], int]] = {
    "leftmost": lambda o: o.column,
    "rightmost": lambda o: -o.column,
    "topmost": lambda o: o.row,
    "bottommost": lambda o: -o.row,
}
SIDES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
RELATIONS = {"left of": ("leftmost", "left", "right"), "right of": ("rightmost", "right", "left")}
RELATIONS |= {"above": ("topmost", "above", "below"), "below": ("bottommost", "below", "above")}

# Query forms that only `test_compositions` uses: (kind, operator, attributes of the filter).
HELD_OUT_FORMS = frozenset(
    {
        ("superlative", "leftmost", "shape"),
        ("superlative", "smallest", "color"),
        ("superlative", "bottommost", "color"),
        ("relation", "above", "shape"),
        ("relation", "right of", "color"),
        ("same-as", "color", "size"),
        ("same-as", "shape", "color"),
        ("ordinal", "second right", "color"),
        ("ordinal", "second top", "shape"),
        ("set", "", "size shape"),
        ("attribute", "", "size color"),
    }
)

Filter = dict[str, str]


@dataclass(frozen=True)
class Instruction:
    """An instruction over a layout. `targets` index the layout; `form` is what `HELD_OUT_FORMS` names."""

    kind: str
    text: str
    targets: tuple[int, ...]
    reasoning: str
    form: tuple[str, str, str]


def _fits(o: SceneObject, wanted: Filter) -> bool:
    return all(getattr(o, key) == value for key, value in wanted.items())


def _phrase(wanted: Filter, plural: bool = False) -> str:
    noun = wanted.get("shape", "object")
    return " ".join([*(wanted[k] for k in ("size", "color") if k in wanted), PLURALS[noun] if plural else noun])


class _Draft:
    """One attempt at an instruction; the method of a kind returns `None` where the layout does not allow it."""

    def __init__(self, rng: np.random.Generator, objects: list[SceneObject]):
        self.rng, self.objects = rng, objects

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def filter(self, *signatures: str) -> Filter:
        """A filter over the attributes of one signature, with the values of an object that is there."""
        like = self.pick(self.objects)
        return {key: getattr(like, key) for key in self.pick(signatures).split()}

    def anchor(self) -> tuple[int, Filter] | None:
        wanted = self.filter("shape", "color", "color shape", "size shape", "size color shape")
        found = [i for i, o in enumerate(self.objects) if _fits(o, wanted)]
        return (found[0], wanted) if len(found) == 1 else None

    def listing(self, wanted: Filter, anchor: int | None = None) -> str:
        """Every object with its place, ruled in or out as a candidate."""
        said = []
        for i, o in enumerate(self.objects):
            verdict = "anchor" if i == anchor else "yes" if _fits(o, wanted) else "no"
            said.append(f"{o.cell} {o.size} {o.color} {o.shape} {verdict}")
        return ", ".join(said) + "."

    def finish(
        self, kind: str, phrase: str, form: tuple[str, str, str], targets: Sequence[int], steps: Sequence[str | None]
    ) -> Instruction | None:
        if len(targets) > MAX_TARGETS:
            return None
        answer = ", ".join(f"{n} {self.objects[i].cell}" for n, i in enumerate(targets, start=1)) or "none"
        reasoning = " ".join([*(step for step in steps if step), f"answer {answer}."])
        return Instruction(kind, f"{self.pick(PREFIXES)} {phrase}", tuple(targets), reasoning, form)

    def cells(self, indices: Iterable[int]) -> str:
        return ", ".join(self.objects[i].cell for i in indices)

    def _attribute(self) -> Instruction | None:
        wanted = self.filter("color", "shape", "color shape", "size color", "size shape", "size color shape")
        targets = [i for i, o in enumerate(self.objects) if _fits(o, wanted)]
        if len(targets) != 1:
            return None
        form = ("attribute", "", " ".join(wanted))
        return self.finish("attribute", "the " + _phrase(wanted), form, targets, [self.listing(wanted)])

    def _set(self) -> Instruction | None:
        wanted = self.filter("color", "shape", "size", "color shape", "size color", "size shape")
        targets = [i for i, o in enumerate(self.objects) if _fits(o, wanted)]
        if len(targets) < 2:
            return None
        phrase = "every " + _phrase(wanted) if self.rng.random() < 0.3 else "all the " + _phrase(wanted, plural=True)
        return self.finish("set", phrase, ("set", "", " ".join(wanted)), targets, [self.listing(wanted)])

    def _no_target(self) -> Instruction | None:
        """What is asked for is not there, but something close to it often is."""
        if self.rng.random() < 0.25:
            relation = self._relation(empty=True)
            return relation and replace(relation, kind="no-target")
        wanted = self.filter("color", "shape", "color shape", "size color", "size shape", "size color shape")
        key = self.pick(sorted(wanted))
        wanted[key] = self.pick(VALUES[key])
        named = tuple(wanted.get(k) for k in ("size", "color", "shape"))
        if named in HELD_OUT_TRIPLES or named[1:] in HELD_OUT_PAIRS or any(_fits(o, wanted) for o in self.objects):
            return None  # naming a held-out combination as absent would teach that it never is there
        several = self.rng.random() < 0.3
        form = ("set" if several else "attribute", "", " ".join(wanted))
        phrase = "all the " + _phrase(wanted, plural=True) if several else "the " + _phrase(wanted)
        return self.finish("no-target", phrase, form, [], [self.listing(wanted)])

    def _superlative(self) -> Instruction | None:
        operator = self.pick((*POSITIONS, "largest", "smallest"))
        of_size = operator in ("largest", "smallest")
        wanted = self.filter("", "color", "shape") if of_size else self.filter("", "color", "shape", "size")
        candidates = [i for i, o in enumerate(self.objects) if _fits(o, wanted)]
        if len(candidates) < 2:
            return None
        if of_size:
            best = [i for i in candidates if self.objects[i].size == ("large" if operator == "largest" else "small")]
            said = ", ".join(f"{self.objects[i].cell} {self.objects[i].size}" for i in candidates)
        else:
            score = [POSITIONS[operator](self.objects[i]) for i in candidates]
            best = [i for i, s in zip(candidates, score, strict=True) if s == min(score)]
            said = self.cells(candidates)
        if len(best) != 1:
            return None
        steps = [self.listing(wanted), f"candidates {said}.", f"{operator} {self.cells(best)}."]
        form = ("superlative", operator, " ".join(wanted))
        return self.finish("superlative", f"the {operator} {_phrase(wanted)}", form, best, steps)

    def _relation(self, empty: bool = False) -> Instruction | None:
        found = self.anchor()
        if found is None:
            return None
        anchor, description = found
        operator = self.pick(tuple(RELATIONS))
        axis, word, opposite = RELATIONS[operator]
        wanted = self.filter("", "color", "shape", "size")
        candidates = [i for i, o in enumerate(self.objects) if i != anchor and _fits(o, wanted)]
        here = POSITIONS[axis](self.objects[anchor])
        delta = [POSITIONS[axis](self.objects[i]) - here for i in candidates]
        if not candidates or 0 in delta:
            return None
        targets = [i for i, d in zip(candidates, delta, strict=True) if d < 0]
        if bool(targets) == empty:
            return None
        verdicts = ", ".join(
            f"{self.objects[i].cell} {word if d < 0 else opposite}" for i, d in zip(candidates, delta, strict=True)
        )
        steps = [self.listing(wanted, anchor), f"anchor {self.objects[anchor].cell}.", f"candidates {verdicts}."]
        phrase = f"the {_phrase(wanted, plural=len(targets) > 1)} {operator} the {_phrase(description)}"
        return self.finish("relation", phrase, ("relation", operator, " ".join(wanted)), targets, steps)

    def _same_as(self) -> Instruction | None:
        found = self.anchor()
        if found is None:
            return None
        anchor, description = found
        key = self.pick(tuple(VALUES))
        if key in description and self.rng.random() < 0.7:
            return None
        wanted = self.filter("", "", "color", "shape", "size")
        if key in wanted:
            return None
        value = getattr(self.objects[anchor], key)
        candidates = [i for i, o in enumerate(self.objects) if i != anchor and _fits(o, wanted)]
        targets = [i for i in candidates if getattr(self.objects[i], key) == value]
        if not targets:
            return None
        verdicts = ", ".join(
            f"{self.objects[i].cell} {getattr(self.objects[i], key)} {'yes' if i in targets else 'no'}"
            for i in candidates
        )
        steps = [
            self.listing(wanted, anchor),
            f"anchor {self.objects[anchor].cell} {value}.",
            f"candidates {verdicts}.",
        ]
        phrase = f"the {_phrase(wanted, plural=len(targets) > 1)} with the same {key} as the {_phrase(description)}"
        return self.finish("same-as", phrase, ("same-as", key, " ".join(wanted)), targets, steps)

    def _ordinal(self) -> Instruction | None:
        wanted = self.filter("", "color", "shape")
        side, rank = self.pick(tuple(SIDES)), self.pick((2, 2, 3))
        score = POSITIONS[SIDES[side]]
        candidates = sorted(
            (i for i, o in enumerate(self.objects) if _fits(o, wanted)), key=lambda i: score(self.objects[i])
        )
        places = [score(self.objects[i]) for i in candidates]
        if len(candidates) < rank or len(set(places[: rank + 1])) < len(places[: rank + 1]):
            return None
        ranks = ("first", "second", "third")[:rank]
        word = ranks[-1]
        order = ", ".join(f"{w} {self.objects[i].cell}" for w, i in zip(ranks, candidates[:rank], strict=True))
        steps = [self.listing(wanted), f"from {side} {order}."]
        form = ("ordinal", f"{word} {side}", " ".join(wanted))
        return self.finish(
            "ordinal", f"the {word} {_phrase(wanted)} from the {side}", form, [candidates[rank - 1]], steps
        )

    def _count(self) -> Instruction | None:
        key, times = self.pick(("color", "shape")), self.pick((2, 2, 3))
        counts = Counter(getattr(o, key) for o in self.objects)  # in order of first appearance
        matching = [value for value, n in counts.items() if n == times]
        if len(matching) != 1:
            return None
        targets = [i for i, o in enumerate(self.objects) if getattr(o, key) == matching[0]]
        said = ", ".join(f"{value} {NUMBERS[n]}" for value, n in counts.items())
        phrase = f"the objects whose {key} appears {NUMBERS[times]} times"
        steps = [self.listing({}), f"count {said}.", f"{NUMBERS[times]} {matching[0]} {self.cells(targets)}."]
        return self.finish("count", phrase, ("count", f"{key} {NUMBERS[times]}", ""), targets, steps)


def sample_instruction(
    rng: np.random.Generator, objects: list[SceneObject], kind: str, held_out_forms: bool = False, tries: int = 8
) -> Instruction | None:
    """Draw an instruction of one kind for a layout, of a held-out form or not; `None` where none was found."""
    for _ in range(tries):
        draft = getattr(_Draft(rng, objects), "_" + kind.replace("-", "_"))()
        if draft is not None and (draft.form in HELD_OUT_FORMS) == held_out_forms:
            return draft
    return None


def words() -> list[str]:
    """Every word that instructions and reference reasoning are made of, sorted; the tiny vocabulary."""
    text = (
        " ".join(PREFIXES) + " the all every object objects size color shape appears times whose with same as from of"
    )
    text += " first second third candidates anchor count answer none yes no left right above below top bottom a an"
    text += " largest smallest in image is are and not " + " ".join((*POSITIONS, *NUMBERS, *PLURALS.values()))
    text += " " + " ".join(v for values in VALUES.values() for v in values) + " 1 2 3 4 , . ?"
    return sorted(set(text.split()) | {c + str(r) for c in "abcdefgh" for r in range(1, 9)})
