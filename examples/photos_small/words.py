"""What photos-small says: the 80 categories of COCO with their plurals, other words, groups, uses and colours."""

from __future__ import annotations

import string
from collections.abc import Iterator

CATEGORIES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
).split(", ")
_PLURALS = {
    "person": "people",
    "knife": "knives",
    "mouse": "mice",
    "sheep": "sheep",
    "skis": "skis",
    "scissors": "scissors",
    "broccoli": "broccoli",
}
_ES = ("bus", "bench", "couch", "toothbrush", "sandwich", "wine glass")
# Category -> other words for one of it that mean nothing else among the 80.
SYNONYMS = {
    "person": ["human", "human being"],
    "bicycle": ["bike"],
    "car": ["automobile"],
    "motorcycle": ["motorbike"],
    "airplane": ["plane", "aircraft"],
    "truck": ["lorry"],
    "traffic light": ["traffic signal"],
    "fire hydrant": ["hydrant"],
    "cat": ["kitty"],
    "dog": ["hound"],
    "cow": ["cattle"],
    "backpack": ["rucksack"],
    "handbag": ["purse"],
    "tie": ["necktie"],
    "suitcase": ["luggage"],
    "sports ball": ["ball"],
    "cup": ["mug"],
    "donut": ["doughnut"],
    "couch": ["sofa"],
    "potted plant": ["houseplant"],
    "tv": ["television"],
    "laptop": ["notebook computer"],
    "remote": ["remote control"],
    "cell phone": ["mobile phone", "smartphone"],
    "refrigerator": ["fridge"],
    "teddy bear": ["stuffed bear"],
    "hair drier": ["blow dryer"],
}
# Group -> (categories in it, categories for which it is open to doubt: pictures with these are not asked).
GROUPS = {
    "animals": ("bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe", "teddy bear"),
    "vehicles": ("bicycle, car, motorcycle, airplane, bus, train, truck, boat", "skateboard"),
    "fruit": ("banana, apple, orange", ""),
    "food": ("banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake", "bowl"),
    "furniture": ("bench, chair, couch, bed, dining table", "toilet, potted plant"),
    "cutlery": ("fork, knife, spoon", ""),
    "luggage": ("backpack, handbag, suitcase", ""),
}
# Use -> (categories for it, categories for which it is open to doubt).
USES = {
    "something to drink from": ("wine glass, cup, bottle", "bowl"),
    "something to sit on": ("chair, couch, bench", "bed, toilet, suitcase, horse, motorcycle, bicycle"),
    "something to sleep in": ("bed", "couch, bench"),
    "something to eat soup with": ("spoon", ""),
    "something to cut with": ("knife, scissors", ""),
    "something to read": ("book", "laptop, tv, cell phone, stop sign"),
    "what tells the time": ("clock", "cell phone, laptop, microwave, oven, tv"),
    "what keeps food cold": ("refrigerator", ""),
    "what heats food": ("microwave, oven, toaster", ""),
    "something to watch a film on": ("tv, laptop", "cell phone"),
    "something to type on": ("keyboard, laptop", "cell phone, remote"),
    "something to call somebody with": ("cell phone", "laptop, remote"),
    "what keeps the rain off": ("umbrella", "car, bus, train, truck"),
    "something to carry things in": ("backpack, handbag, suitcase", "bowl, vase, cup, truck"),
    "where to wash your hands": ("sink", "bottle"),
    "what cleans teeth": ("toothbrush", ""),
    "what dries hair": ("hair drier", ""),
    "what flies passengers": ("airplane", "kite"),
    "what stops traffic": ("traffic light, stop sign", ""),
    "where to put money for parking": ("parking meter", ""),
    "where firemen get water": ("fire hydrant", "sink, truck"),
    "what holds flowers": ("vase", "potted plant, bottle, cup"),
    "what a child cuddles": ("teddy bear", "cat, dog"),
    "something to ride on waves with": ("surfboard", "boat"),
    "something to slide down snow with": ("skis, snowboard", ""),
    "something to hit a ball with": ("baseball bat, tennis racket", "baseball glove"),
    "what catches a baseball": ("baseball glove", "person"),
    "where to put plates for a meal": ("dining table", "bench, chair"),
    "what points at things on a screen": ("mouse", "remote, laptop"),
    "something to change the channel with": ("remote", "tv, cell phone"),
    "what gives milk": ("cow", "sheep, bottle"),
    "what gives wool": ("sheep", ""),
    "what has a long neck": ("giraffe", "bottle, vase, bird"),
    "what has a trunk": ("elephant", "car, potted plant"),
    "what has black and white stripes": ("zebra", "person, tie, umbrella, cat"),
    "what barks": ("dog", ""),
    "what says meow": ("cat", ""),
}
COLORS = ("black", "white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ONE = ("the {one}", "{one}", "find the {one}", "where is the {one}?", "show me the {one}")
ALL = ("{many}", "all {many}", "every {one}", "find the {many}", "where are the {many}?", "each {one} in the picture")
USED = ("{use}", "{use}, please", "find {use}", "show me {use}")
PLACES = ("on the left", "on the right", "leftmost", "rightmost", "second from the left", "largest", "smallest")
# Words of the reasoning; those of instructions that other people write are in the tokenizer's common tokens.
_OTHERS = "not wanted answer none many people only here nearest to and except but if there are exactly both also is"


def plural(category: str) -> str:
    return _PLURALS.get(category) or category + ("es" if category in _ES else "s")


def members(listed: str) -> tuple[str, ...]:
    """Categories of a table's entry."""
    return tuple(listed.split(", ")) if listed else ()


def texts() -> Iterator[str]:
    """Everything that instructions and reasoning are made of, with and without a space before it."""
    places = [f"{column}{row}" for column in string.ascii_lowercase[:8] for row in range(10)]
    templates = [text.replace("{one}", "").replace("{many}", "").replace("{use}", "") for text in (*ONE, *ALL, *USED)]
    words = [*CATEGORIES, *map(plural, CATEGORIES), *(word for found in SYNONYMS.values() for word in found)]
    words += [f"{word}s" for found in SYNONYMS.values() for word in found]
    words += [*GROUPS, *USES, *COLORS, *NUMBERS, *PLACES, *places, *templates, *_OTHERS.split(), *string.punctuation]
    yield from words
    yield from (f" {word}" for word in words)
    yield from ("user\nassistant\nsystem\n", "+1 +2 +3 +10")
