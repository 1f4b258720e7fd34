"""Which class of a network is meant: by a class folder's name, by a category of a panoptic data set.

Names are compared in Unicode's normal form NFC: file systems and archives store the same name in two forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from unicodedata import normalize

from vitkit.data.coco import Category
from vitkit.data.coco.ids import first_few
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadInput

# A class index as it is usually written; 01 and digits of other scripts are names.
_INDEX = re.compile("0|[1-9][0-9]*")


def class_indices(card: ModelCard, names: Sequence[str]) -> list[int]:
    """Names of class folders -> class indices, by the card's label ids, its labels, or as plain numbers.

    If all names are label ids, or all are labels, that decides; otherwise each is looked up in both. Numbers
    (0, 1, 2 ...) are class indices only if every name is one and no label and no label id is a number.
    Raises BadInput naming folders that are no class, that fit several classes, or that are one class
    together.
    """
    folders = sorted(set(names))
    schemes = [_indices_by_name(scheme) for scheme in (card.label_ids, card.labels) if scheme]
    if all(map(_INDEX.fullmatch, folders)) and not any(_is_number(n) for table in schemes for n in table):
        schemes = [{str(i): [i] for i in range(_class_count(card))}]
    found = {name: _candidates(name, folders, schemes) for name in folders}
    if unknown := [name for name, indices in found.items() if not indices]:
        raise BadInput(_describe_unknown(card, unknown, schemes))
    owners: dict[int, str] = {}
    for name, indices in found.items():
        if len(indices) > 1:
            raise BadInput(
                f"the folder {name!r} fits several classes of {card.name} (from 0: {first_few(indices)}); "
                "name all folders by its label ids, or all by labels that occur once"
            )
        if indices[0] in owners:
            raise BadInput(
                f"the folders {owners[indices[0]]!r} and {name!r} are one class of {card.name}, number "
                f"{indices[0]} counted from 0; move the images of both into one folder"
            )
        owners[indices[0]] = name
    return [found[name][0] for name in names]


def _indices_by_name(names: Sequence[str]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        table.setdefault(normalize("NFC", name), []).append(i)
    return table


def _is_number(text: str) -> bool:
    """Whether a label reads as a number: in any script, with a sign, a point or a comma."""
    return text.isnumeric() or re.fullmatch(r"\s*[+\-\u2212]?\d[\d.,_\s]*", text) is not None


def _class_count(card: ModelCard) -> int:
    """The number of classes; of a card without labels, the last dimension of its scores."""
    return len(card.labels) or int(card.outputs[0].shape[-1] or 0)


def _candidates(
    folder: str, folders: Sequence[str], schemes: Sequence[Mapping[str, Sequence[int]]]
) -> list[int]:
    """The classes that a folder may be: by the schemes that name every folder once, else by any."""
    complete = [s for s in schemes if all(len(s.get(normalize("NFC", name), ())) == 1 for name in folders)]
    name = normalize("NFC", folder)
    return sorted({i for scheme in complete or schemes for i in scheme.get(name, ())})


def _describe_unknown(
    card: ModelCard, unknown: Sequence[str], schemes: Sequence[Mapping[str, Sequence[int]]]
) -> str:
    known = {name.casefold(): name for scheme in schemes for name in scheme}
    shown = [
        f"{name!r} (a class is {known[name.casefold()]!r})" if name.casefold() in known else repr(name)
        for name in unknown
    ]
    choices = ", or ".join(first_few(list(scheme)) for scheme in schemes if scheme)
    return (
        f"folders are no class of {card.name}: {first_few(shown)}; its classes are "
        f"{choices or 'unknown: the card has no labels'}"
    )


def matching_categories(card: ModelCard, categories: Sequence[Category]) -> list[Category]:
    """The data set's category of each of a panoptic network's classes, in the order of the classes.

    They are found by name, or all by id if some name is missing and no name contradicts an id. Raises
    BadInput naming the classes that the data set lacks, or two that have one category.
    """
    by_name = {normalize("NFC", category.name): category for category in categories}
    by_id = {str(category.id): category for category in categories}
    found = [by_name.get(normalize("NFC", label)) for label in card.labels]
    alike = [by_id.get(i) for i in card.label_ids or card.labels]
    if None in found and all(b is not None and a in (None, b) for a, b in zip(found, alike, strict=True)):
        found = alike
    if missing := [name for name, category in zip(card.labels, found, strict=True) if category is None]:
        raise BadInput(
            f"the data set lacks {len(missing)} of the {len(found)} classes of {card.name}: "
            f"{first_few(missing)}; its categories are {first_few([c.name for c in categories])}"
        )
    matched = [category for category in found if category is not None]
    owners: dict[int, int] = {}
    for index, category in enumerate(matched):
        first = owners.setdefault(category.id, index)
        if first != index:
            raise BadInput(
                f"the classes {first} and {index} of {card.name}, counted from 0, are one category of the "
                f"data set: {category.name!r} (id {category.id}); give the labels of the card different names"
            )
    return matched
