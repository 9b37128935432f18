"""Instructions and reasoning for a photograph, written from its masks, categories and geometry alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image
from seen import Seen, Thing, color_of
from words import ALL, CATEGORIES, GROUPS, NUMBERS, ONE, SYNONYMS, USED, USES, members, plural

APART = 0.06  # of the picture's width: centres of objects that are to the left of each other
LARGER = 1.4  # times: areas of objects of which one is "the largest"
NEARER = 1.5  # times: distances of objects of which one is "nearest"
MOST_COMPARED = 6  # objects of a category that are compared or counted
MOST_NAMED = 6  # places in an answer
MOST_RULED_OUT = 3  # categories
NONE_BY_FAR = "none far"  # kind: a category that is not there and does not go with what is there


class Question(NamedTuple):
    """A row without its picture.

    Args:
        kind (`str`): What kind of instruction it is.
        instruction (`str`): What is asked.
        targets (`list[Thing]`): What is meant, the best known first; empty for none.
        because (`str`): Why, in words; a sentence without its period.
        ignored (`str`, *optional*): Category of crowds that neither count nor harm.
    """

    kind: str
    instruction: str
    targets: list[Thing]
    because: str
    ignored: str | None = None


def reasoning(seen: Seen, question: Question) -> str:
    """`person b3 d2, cup a5. cup wanted, not person. answer cup a5.`"""
    answer: dict[str, list[str]] = {}
    for thing in question.targets[:MOST_NAMED]:
        answer.setdefault(thing.category, []).append(thing.place)
    said = ", ".join(" ".join([name, *places]) for name, places in answer.items()) or "none"
    return f"{seen.listing()}. {question.because}. answer {said}."


def ruled_out(seen: Seen, wanted: Sequence[str]) -> str:
    """`, not person dining table`: the first listed categories that are not wanted."""
    others = [name for name in seen.said if name not in wanted][:MOST_RULED_OUT]
    return f", not {' '.join(others)}" if others else ""


def _asked(dice: random.Random, category: str, things: Sequence[Thing]) -> str:
    """The words for all of a category."""
    form = dice.choice(ONE if len(things) == 1 else ALL)
    return form.format(one=category, many=plural(category))


def _whole(seen: Seen, kind: str, instruction: str, category: str) -> Question:
    """All of a category, crowds ignored."""
    because = f"{category} wanted{ruled_out(seen, [category])}"
    return Question(kind, instruction, seen.of(category), because, category)


def all_of(seen: Seen, dice: random.Random) -> Iterator[Question]:
    for category in seen.said:
        if found := seen.of(category):
            yield _whole(seen, "all", _asked(dice, category, found), category)


def synonyms(seen: Seen, dice: random.Random) -> Iterator[Question]:
    for category in seen.said:
        if (found := seen.of(category)) and category in SYNONYMS:
            word = dice.choice(SYNONYMS[category])
            form = dice.choice(ONE if len(found) == 1 else ("every {one}", "each {one} in the picture"))
            yield _whole(seen, "synonym", form.format(one=word), category)


def _several(seen: Seen, kind: str, instruction: str, meant: str, wanted: Sequence[str]) -> Question | None:
    """All of several categories, largest first; `None` where crowds or unlisted ones would be among them."""
    crowds = {crowd.category for crowd in seen.crowds}
    if crowds & set(wanted) or (seen.present() & set(wanted)) - set(seen.said):
        return None
    targets = sorted(seen.of(*wanted), key=lambda thing: -thing.area)
    present = [name for name in seen.said if name in wanted]
    verb = f"{meant} is {' '.join(present)}" if present else f"{meant} is not here"
    return Question(kind, instruction, targets, f"{verb}{ruled_out(seen, wanted)}")


def uses(seen: Seen, dice: random.Random) -> Iterator[Question | None]:
    """Things by what they are for. Also none, of pictures without any; nothing is asked that is open to doubt."""
    for kind, table in (("use", USES), ("group", {name: value for name, value in GROUPS.items()})):
        absent = []
        for meant, (wanted, doubtful) in table.items():
            if seen.present() & set(members(doubtful)):
                continue
            form = dice.choice(USED).format(use=meant) if kind == "use" else dice.choice(ALL[:2]).format(many=meant)
            question = _several(seen, kind, form, meant, members(wanted))
            if question is None or question.targets:
                yield question
            else:
                absent.append(question._replace(kind=f"no {kind}"))
        yield dice.choice(absent) if absent and dice.random() < 0.5 else None


def sides(seen: Seen, dice: random.Random) -> Iterator[Question]:
    """One of several by its place: leftmost, rightmost, second from the left."""
    for category in seen.said:
        found = sorted(seen.told_apart(category), key=lambda thing: thing.center)[: MOST_COMPARED + 1]
        if not 2 <= len(found) <= MOST_COMPARED:
            continue
        across = [thing.center[0] for thing in found]
        gaps = [b - a for a, b in zip(across, across[1:], strict=False)]
        order = " ".join(thing.place for thing in found)
        chosen = [("leftmost", 0, gaps[0]), ("rightmost", -1, gaps[-1])]
        if len(found) > 2:
            chosen.append(("second from the left", 1, min(gaps[:2])))
        for which, index, gap in chosen:
            if gap >= APART:
                target = found[index]
                word = {"leftmost": f"the leftmost {category}", "rightmost": f"the rightmost {category}"}
                text = word.get(which, f"the second {category} from the left")
                if len(found) == 2 and dice.random() < 0.5:
                    text = f"the {category} on the {'left' if index == 0 else 'right'}"
                yield Question("place", text, [target], f"from the left {order}, {which} {target.place}")


def sizes(seen: Seen, dice: random.Random) -> Iterator[Question]:
    """The largest or smallest of a category, as it looks in the picture."""
    for category in seen.said:
        found = sorted(seen.told_apart(category), key=lambda thing: -thing.area)
        if not 2 <= len(found) <= MOST_COMPARED:
            continue
        ordered = " ".join(thing.place for thing in found)
        if found[0].area >= LARGER * found[1].area:
            word = dice.choice(("largest", "biggest"))
            yield Question("size", f"the {word} {category}", [found[0]], f"largest first {ordered}")
        if found[-2].area >= LARGER * found[-1].area:
            yield Question("size", f"the smallest {category}", [found[-1]], f"largest first {ordered}")


def nearest(seen: Seen, dice: random.Random) -> Iterator[Question]:
    """One of several by what it is next to, in the picture's plane."""
    single = [name for name in seen.said if len(seen.told_apart(name)) == 1]
    for category in seen.said:
        found = seen.told_apart(category)
        others = [name for name in single if name != category]
        if not 2 <= len(found) <= MOST_COMPARED or not others:
            continue
        other = seen.of(dice.choice(others))[0]
        height, width = other.mask.shape

        def distance(thing: Thing, other: Thing = other, size: tuple[int, int] = (width, height)) -> float:
            return sum(((a - b) * side) ** 2 for a, b, side in zip(thing.center, other.center, size, strict=True))

        first, second, *_ = sorted(found, key=distance)
        if distance(second) >= NEARER**2 * distance(first):
            because = f"{other.category} is at {other.place}, nearest {category} {first.place}"
            text = f"the {category} nearest to the {other.category}"
            yield Question("nearest", text, [first], because)


def counts(seen: Seen, dice: random.Random) -> Iterator[Question]:
    """All of a category if they are as many as is said; half of the numbers are wrong."""
    for category in seen.said:
        found = seen.told_apart(category)
        if not 1 < len(found) <= MOST_COMPARED:
            continue
        right = len(found)
        number = right if dice.random() < 0.5 else dice.choice([n for n in range(2, 7) if n != right])
        text = f"the {plural(category)}, if there are exactly {NUMBERS[number]}"
        because = (
            f"there are {NUMBERS[right]}, not {NUMBERS[number]}" if number != right else f"{NUMBERS[right]} are here"
        )
        yield Question("count", text, found if number == right else [], because)


def colors(seen: Seen, dice: random.Random, image: Image.Image) -> Iterator[Question]:
    """Those of a category that have a colour, where the colour of each is known. Persons have none of their own."""
    for category in seen.said:
        found = seen.told_apart(category)
        of = [(color_of(image, thing), thing) for thing in found if category != "person"]
        if not of or any(color is None for color, _ in of):
            continue
        color = dice.choice(of)[0]
        if color in (None, category):  # an orange is
            continue
        targets = [thing for own, thing in of if own == color]
        form = f"the {color} {category if len(targets) == 1 else plural(category)}"
        told = ", ".join(f"{thing.place} {own}" for own, thing in of)
        yield Question("color", form, targets, f"{category} {told}")


def combinations(seen: Seen, dice: random.Random) -> Iterator[Question | None]:
    """Two categories, and a group without one of its members."""
    listed = [name for name in seen.said if seen.told_apart(name)]
    if len(listed) > 1:
        one, other = dice.sample(listed, 2)
        words = [plural(name) if len(seen.of(name)) > 1 else name for name in (one, other)]
        yield _several(seen, "both", f"the {words[0]} and the {words[1]}", f"{one} and {other}", (one, other))
    for group, (wanted, doubtful) in GROUPS.items():
        present = [name for name in listed if name in members(wanted)]
        if len(present) > 1 and not seen.present() & set(members(doubtful)):
            but = dice.choice(present)
            rest = [name for name in members(wanted) if name != but]
            yield _several(seen, "except", f"all {group} except the {plural(but)}", f"{group} but {but}", rest)


def absent(seen: Seen, dice: random.Random) -> Iterator[Question]:
    """A category that is not there: one that goes with what is there, and any other."""
    groups = [members(wanted) for wanted, _ in (*GROUPS.values(), *USES.values())]
    near = {name for group in groups if seen.present() & set(group) for name in group} - seen.present()
    far = set(CATEGORIES) - seen.present() - near
    for kind, pool in (("none", near), (NONE_BY_FAR, far)):
        if pool:
            category = dice.choice(sorted(pool))
            form = dice.choice((*ONE, *ALL)).format(one=category, many=plural(category))
            yield Question(kind, form, [], f"{category} wanted{ruled_out(seen, [])}")


KINDS = (all_of, synonyms, uses, sides, sizes, nearest, counts, combinations, absent)
OF_PEOPLE = {"all": "people", "place": "one person", "size": "one person", "nearest": "one person"}
COMPARING = ("place", "size", "count", "nearest")  # kinds that need every object of a category


def questions(seen: Seen, image: Image.Image, dice: random.Random, guessed: bool = False) -> list[Question]:
    """All questions to a photograph.

    Args:
        guessed (`bool`, *optional*): Every person is annotated, but other objects may be missing, as
            `guesses.py` leaves it: then nothing is asked that a missing object would make wrong.
    """
    found = [question for kind in KINDS for question in kind(seen, dice)]
    found = [question for question in (*found, *colors(seen, dice, image)) if question is not None]
    return [with_people_apart(question) for question in found if not guessed or holds_with_guesses(question)]


def with_people_apart(question: Question) -> Question:
    """Persons alone are meant by kinds of their own: they are most common, and the easiest."""
    alone = bool(question.targets) and all(thing.category == "person" for thing in question.targets)
    return question._replace(kind=OF_PEOPLE[question.kind]) if alone and question.kind in OF_PEOPLE else question


def holds_with_guesses(question: Question) -> bool:
    """Whether the answer is right even if objects other than persons are missing."""
    if question.kind in COMPARING:
        return bool(question.targets) and question.targets[0].category == "person" and question.kind != "nearest"
    return bool(question.targets) or question.kind == NONE_BY_FAR
