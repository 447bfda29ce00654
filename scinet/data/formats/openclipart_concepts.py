"""What tags and folders of the Open Clip Art Library say is drawn: 49 plain concepts, some above others.

Chosen by the counts of Debian's package 0.18: what can be seen, on about 36 drawings or more that are no variants of a
few. Left out are tags that say what a drawing is for or where it is from (theme, work, europe), and species, which add
little to their folders and mislead: the hot dog is tagged `hot` and `dog`, the teddy bear `bear`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Concept:
    """What makes a drawing a positive of a concept: one of the tags, a folder or one below it, or a concept below it.

    Args:
        tags: in the form of :func:`normalised`, in the singular.
        folders: below ``png``.
        parents: concepts that a drawing of this one shows too.
    """

    tags: frozenset[str]
    folders: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()


def _concept(tags: str, folders: str = "", parents: str = "") -> Concept:
    words, places, above = (
        [part.strip() for part in text.split(",") if part.strip()] for text in (tags, folders, parents)
    )
    return Concept(frozenset(words), tuple(places), tuple(above))


CONCEPTS: Mapping[str, Concept] = {
    # animale, animali, felino, felini: the one author of many animals tags in Italian
    "animal": _concept("animal, animale, animali, reptile, dinosaur", "animals"),
    "mammal": _concept("mammal, feline, felino, felini", "animals/mammals", "animal"),
    "bird": _concept("bird, penguin, duck", "animals/birds", "animal"),
    "insect": _concept("insect, butterfly, ladybug", "animals/bugs", "animal"),
    "plant": _concept("plant, leaf, flower, tree, evergreen, mushroom, fungus", "plants"),
    "food": _concept("food, pizza, vegetable, meat, protein, carbohydrate, dairy", "food"),
    "fruit": _concept("fruit", "food/fruit", "food"),
    "dessert": _concept("dessert, icecream, cake, candy", "food/desserts", "food"),
    "drink": _concept("beverage, drink, alcohol, juice, tea, coffee", "food/beverages", "food"),
    "person": _concept(
        "people, person, human, man, woman, lady, boy, girl, baby, musician, fireman, stickmen", "people/stickmen"
    ),
    "face": _concept("face, smiley, mouth, eye, eyebrow", "people/smilies"),
    "smiley": _concept("smiley", "people/smilies", "face"),
    "body part": _concept("bodypart, mouth, eye, eyebrow, hand, foot, ear, brain, skull, anatomy", "people/bodypart"),
    "clothing": _concept("clothing, hat, shoe", "people/clothing"),
    "transport": _concept("transport, transportation, airtravel, roadtravel", "transportation"),
    "vehicle": _concept(
        "vehicle, car, automobile, hummer, truck, bus, wagon, bicycle, plane", "transportation/vehicles", "transport"
    ),
    "boat": _concept("boat, ship", "", "vehicle"),
    "road sign": _concept("roadsign", "transportation/roadsigns", "transport"),
    "map symbol": _concept("mapsym, map symbol", "signs_and_symbols/map_symbols"),
    "flag": _concept(
        "flag, signalflag, international flag, historic flag, united nations member", "signs_and_symbols/flags"
    ),
    "signal flag": _concept("signalflag", "", "flag"),
    "game": _concept("game, chess, dice, billiard", "recreation/games"),
    "playing card": _concept("", "recreation/games/cards", "game"),
    "shape": _concept("shape, geometry", "shapes"),
    "arrow": _concept("arrow, arrowshape", "shapes/arrows"),
    "button": _concept("button", "computer/buttons, buttons"),
    "pattern": _concept("pattern", "special/patterns"),
    "map": _concept("map, mapa, coastline"),
    "celestial body": _concept(
        "astronomy, moon, planet, lunar, eclipse, sun, space", "geography/astronomy, science/astronomy"
    ),
    "weather": _concept("weather, weathersym, cloud, lightning, rain, snow, rainbow", "signs_and_symbols/weather"),
    "music": _concept("music, musicstuff, musicsym, orchestra, instrument", "recreation/music"),
    "sport": _concept("sport, baseball, soccer, football, tennis, golf, billiard, yoga", "recreation/sports"),
    "toy": _concept("toy, rubik", "recreation/toys, tools/toys"),
    "holiday": _concept(
        "holiday, usholiday, religholiday, xmas, christmas, valentine, easter, halloween, thanksgiving",
        "recreation/holiday",
    ),
    "party": _concept("party, festive, balloon, firework", "recreation/party"),
    "religion": _concept("religion, christianity, religholiday, saint, angel", "recreation/religion"),
    "tool": _concept("tool", "tools"),
    "weapon": _concept("weapon, gun, bomb, bullethole", "tools/weapons"),
    "building": _concept("building, architecture", "buildings"),
    "house": _concept("house, maison", "buildings/homes", "building"),
    "office": _concept("office, pen, pencil, envelope", "office"),
    "education": _concept("education, study, book", "education"),
    "computer": _concept("hardware, pc, monitor, laptop, keyboard, printer, server, workstation", "computer/hardware"),
    "network": _concept("network, networksym, router, internet, satellite", "computer/network"),
    "electronic device": _concept(
        "device, electronic, television, camera, radio, pda", "electronics, computer/hardware"
    ),
    "LED": _concept("led", "signs_and_symbols/led"),
    "icon": _concept("icon, appicon", "computer/icons"),
    "hotel symbol": _concept("hotel"),
    "decoration": _concept("decoration, ornament, flourish, celtic, tribal", "decorations"),
}


def normalised(tag: str) -> str:
    """Return a tag as :class:`Concept` has it, but for a plural: small letters, blanks between the words."""
    return " ".join(re.sub(r"[_-]", " ", tag.lower()).split())


def concepts_of(tags: Iterable[str], folders: Iterable[str]) -> frozenset[str]:
    """Return the concepts that a drawing shows by its tags, by the folders it lies in, and those above them.

    Args:
        tags: as their authors wrote them.
        folders: below ``png``, with ``/``.
    """
    by_tag, by_folder = _index()
    found: set[str] = set()
    for tag in map(normalised, tags):
        found.update(by_tag.get(tag, ()), by_tag.get(tag.removesuffix("s"), ()))
    for folder in folders:
        parts = folder.split("/")
        for depth in range(1, len(parts) + 1):
            found.update(by_folder.get("/".join(parts[:depth]), ()))
    return frozenset().union(*map(_with_parents, found))


@lru_cache(maxsize=1)
def _index() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    by_tag: dict[str, list[str]] = {}
    by_folder: dict[str, list[str]] = {}
    for name, concept in CONCEPTS.items():
        for tag in concept.tags:
            by_tag.setdefault(tag, []).append(name)
        for folder in concept.folders:
            by_folder.setdefault(folder, []).append(name)
    return by_tag, by_folder


def _with_parents(name: str) -> frozenset[str]:
    return frozenset([name]).union(*map(_with_parents, CONCEPTS[name].parents))
