"""What scenes are made of: classes with their drawings, contexts with their objects, pairs that exclude each other.

Drawings are named by OpenMoji's hexadecimal code points (``E...`` are OpenMoji's own extras). They were chosen by eye:
no drawing shows an object of another class (a cyclist would be a person too, a house with a garden a tree too). Parts
of a drawing, such as the cherry on a cake or the star on a Christmas tree, carry no label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """A kind of scene: how often it occurs and how its objects share the places in an image.

    Args:
        name: plain English name.
        weight: share of all scenes; the weights of all contexts sum to 1.
        shares: relative chance of each class; at least six, an exclusive pair counting once,
            since an image holds up to six objects.
    """

    name: str
    weight: float
    shares: Mapping[str, float]


def _codes(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DRAWINGS: Mapping[str, tuple[str, ...]] = {
    "person": _codes(
        "1F9CD 1F9CD-1F3FC 1F9CD-1F3FE 1F6B6-1F3FD 1F6B6-1F3FF 1F3C3 1F3C3-1F3FC 1F3C3-1F3FE 1F468-1F3FB "
        "1F468-1F3FD 1F468-1F3FF 1F469-1F3FC 1F469-1F3FE 1F474 1F475-1F3FE 1F467-1F3FF 1F466-1F3FC 1F9D3-1F3FD "
        "1F9D5-1F3FD 1F468-200D-1F9B1 1F469-200D-1F9B0"
    ),
    "dog": ("1F415", "1F436", "1F429", "1F9AE", "1F415-200D-1F9BA"),
    "cat": ("1F408", "1F431", "1F63A", "1F408-200D-2B1B"),
    "horse": ("1F40E", "1F434", "E001"),
    "cow": ("1F404", "1F42E", "1F402", "1F403"),
    "sheep": ("1F411", "1F40F"),
    "pig": ("1F416", "1F437", "1F417"),
    "bird": _codes(
        "1F426 1F985 1F989 1F54A 1F99C 1F426-200D-2B1B 1F986 1F9A2 1FABF 1F414 1F413 1F425 1F427 1F99A 1F9A9 1F983 "
        "E009 E010"
    ),
    "bear": ("1F43B", "1F43C", "1F43B-200D-2744-FE0F"),
    "deer": ("1F98C", "1FACE"),
    "insect": ("1F98B", "1F41D", "1F41E", "1FAB2", "1F41C", "1F997"),
    "fish": ("1F41F", "1F420", "1F421", "1F988", "E000"),
    "shellfish": ("1F980", "1F99E", "1F990"),
    "car": ("1F697", "1F698", "1F699", "1F695", "1F696", "1F6FB", "1F693", "1F3CE"),
    "bus": ("1F68C", "1F68D", "1F68E"),
    "truck": ("1F69A", "1F69B", "1F692"),
    "train": ("1F686", "1F682", "1F684", "1F685", "1F687", "1F68A", "1F683", "1F688"),
    "airplane": ("2708", "1F6E9", "1F6EB", "1F6EC"),
    "boat": ("26F5", "1F6A4", "1F6A2", "26F4", "1F6E5", "1F6F6"),
    "traffic light": ("1F6A5", "1F6A6"),
    "office building": ("1F3E2", "1F3E8", "1F3EC", "1F3E3", "1F3E5"),
    "house": ("1F3E0", "1F3DA", "1F6D6", "1F3D8"),
    "tree": ("1F332", "1F333", "1F334", "1F384"),
    "flower": ("1F339", "1F33B", "1F33C", "1F337", "1F33A", "1F338", "1FABB", "1FAB7", "1F490"),
    "mushroom": ("1F344", "1F344-200D-1F7EB", "E0C8", "E0C9"),
    "mountain": ("1F3D4", "26F0", "1F5FB", "1F30B"),
    "moon": ("1F314", "1F315", "1F316", "1F313", "1F319", "1F31B", "1F31C", "1F31D"),
    "star": ("2B50", "1F31F", "1F320"),
    "spacecraft": ("1F680", "1F6F0", "E20B"),
    "umbrella": ("2602", "2614", "26F1", "1F302"),
    "snowman": ("2603", "26C4"),
    "cup": ("2615", "1F964", "1F9CB"),
    "drinking glass": ("1F377", "1F378", "1F379", "1F37A", "1F942", "1F943", "1F95B"),
    "bottle": ("1F37E", "1F37C", "E0CB", "E0CC", "1F9F4"),
    "bowl": ("1F372", "1F35C", "1F963", "1F35A", "1F35D"),
    "bread": ("1F35E", "1F950", "1F956", "1F968", "E0CA", "1F96F"),
    "fruit": _codes("1F34E 1F34F 1F350 1F34A 1F34B 1F353 1F347 1F349 1F34D 1F34C 1F352 1F351 1F95D 1F96D"),
    "vegetable": _codes("1F955 1F96C 1F966 1F33D 1F952 1FAD1 1F346 1F9C5 1F9C4 1F336 1FADB 1FADC"),
    "cake": ("1F382", "1F370", "1F9C1"),
    "computer": ("1F4BB", "1F5A5"),
    "book": ("1F4D5", "1F4D7", "1F4D8", "1F4D9", "1F4D6", "1F4DA"),
    "pen": ("270F", "1F58A", "1F58B", "1F58D"),
    "clock": ("23F0", "1F570", "231A", "1F550", "1F553", "1F556", "23F1"),
    "bag": ("1F4BC", "1F392", "1F45C", "1F9F3", "1F45D", "1F45B", "1F6CD"),
    "musical instrument": ("1F3B8", "1FA95", "1F3BB", "1F3BA", "1F3B7", "1F941", "1FA97", "1F3B9", "1FA98"),
    "ball": ("26BD", "1F3C0", "1F3C8", "26BE", "1F3D0", "1F3BE"),
}

CONTEXTS: tuple[Context, ...] = (
    Context(
        "street",
        0.16,
        {
            "car": 26,
            "person": 17,
            "office building": 13,
            "traffic light": 11,
            "bus": 7,
            "truck": 6,
            "tree": 9,
            "dog": 7,
            "bag": 4,
        },
    ),
    Context(
        "kitchen",
        0.12,
        {"fruit": 18, "bowl": 16, "vegetable": 15, "bread": 14, "bottle": 12, "cup": 8, "drinking glass": 6, "cat": 6},
    ),
    Context(
        "garden",
        0.11,
        {"flower": 28, "tree": 16, "insect": 13, "bird": 14, "house": 9, "vegetable": 7, "cat": 7, "dog": 6},
    ),
    Context(
        "office",
        0.11,
        {"computer": 21, "book": 19, "pen": 14, "person": 12, "clock": 11, "cup": 9, "bag": 7, "office building": 4},
    ),
    Context(
        "beach",
        0.10,
        {
            "person": 14,
            "boat": 18,
            "umbrella": 13,
            "ball": 12,
            "fish": 11,
            "shellfish": 9,
            "bird": 9,
            "fruit": 7,
            "dog": 6,
        },
    ),
    Context(
        "farm",
        0.10,
        {
            "cow": 17,
            "horse": 15,
            "sheep": 12,
            "pig": 10,
            "bird": 14,
            "house": 11,
            "tree": 9,
            "dog": 6,
            "cat": 6,
            "truck": 3,
        },
    ),
    Context(
        "party",
        0.09,
        {
            "person": 15,
            "cake": 18,
            "musical instrument": 17,
            "drinking glass": 12,
            "bottle": 12,
            "ball": 6,
            "fruit": 6,
            "cup": 4,
        },
    ),
    Context(
        "forest",
        0.08,
        {"tree": 28, "bird": 15, "mushroom": 14, "insect": 12, "deer": 8, "bear": 7, "mountain": 10, "flower": 6},
    ),
    Context(
        "station",
        0.06,
        {"train": 26, "person": 13, "bag": 17, "clock": 12, "airplane": 13, "bus": 6, "book": 6, "umbrella": 4},
    ),
    Context(
        "night sky",
        0.04,
        {"moon": 26, "star": 24, "spacecraft": 17, "airplane": 12, "mountain": 11, "house": 10},
    ),
    Context(
        "winter",
        0.03,
        {"snowman": 24, "mountain": 22, "tree": 18, "person": 12, "house": 10, "deer": 6, "bear": 6},
    ),
)

EXCLUSIVE_PAIRS: tuple[tuple[str, str], ...] = (
    ("dog", "cat"),
    ("bus", "truck"),
    ("cup", "drinking glass"),
    ("deer", "bear"),
)
"""Pairs that share a context and yet never an image, as long as the image is drawn from a context."""

NUM_OBJECTS_SHARES: tuple[float, ...] = (0.24, 0.32, 0.24, 0.12, 0.06, 0.02)
"""Share of images with 1, 2, ... 6 objects, in every context; 2.5 on average."""

DISTRACTORS: tuple[str, ...] = _codes(
    "1F525 1F4A7 1F9E9 1F3B2 1F9F5 1FA81 1F9F2 1F9FB 1F6D2 2693 1F6A7 26FD 1F3AF 2699 1F9EF 1F6AA 1FA9E "
    "1F48E 1FA9C 1F511 1F512 2702 1F381 1F388 1F4A1 1FA91 1F56F 1F528 1F527 1F3A4 26FA E345 E327"
)
"""Drawings of no class."""
