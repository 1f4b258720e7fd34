"""One word for any network that can be exported: a run, a file, a name of timm, a function."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitkit.runtimes.errors import BadRequest
from vitkit.sources.card_values import CardValues

if TYPE_CHECKING:
    from vitkit.exporters.source import Source

FORMS = (
    "a run folder, timm:NAME, timm:NAME=FILE, hf:FOLDER, FILE.pt2, FILE.py:FACTORY, PACKAGE.MODULE:FACTORY, "
    "or the name of a model with --untrained"
)
_FACTORY = re.compile(r"(.+\.py|[^\W\d][\w.]*):[^\W\d]\w*")
Kind = Literal["timm", "hf", "program", "factory", "run"]


class SourceWord(NamedTuple):
    """A word taken apart: its kind, what is behind the kind's prefix, and the file or folder that it names.

    `name` is a name for files and folders made of it.
    """

    kind: Kind
    rest: str
    name: str
    path: Path | None


def parse_word(word: str) -> SourceWord:
    """Take a word apart, without a look at what it names."""
    prefix, _, rest = word.partition(":")
    if prefix == "timm":
        name, _, file = rest.partition("=")
        return SourceWord("timm", rest, re.sub(r"[/:]", "_", name), Path(file) if file else None)
    if prefix == "hf":
        return SourceWord("hf", rest, Path(rest).resolve().name, Path(rest))
    path = Path(word)
    if path.suffix == ".pt2":
        return SourceWord("program", word, path.stem, path)
    if _FACTORY.fullmatch(word):
        where, _, name = word.rpartition(":")
        return SourceWord("factory", word, name, Path(where) if where.endswith(".py") else None)
    return SourceWord("run", word, path.resolve().name, path)


def check_word(word: SourceWord, values: CardValues) -> None:
    """Refuse at once what would be refused later, before torch is imported and user code runs.

    Raises BadRequest for a file or folder that does not exist, and for a card whose size, mean or standard
    deviation neither `values` nor the network can say.
    """
    if word.path is not None and word.kind != "run" and not word.path.exists():
        raise BadRequest(f"{word.path} does not exist. A source is {FORMS}")
    if word.kind == "factory":
        values.image()
    elif word.kind == "program":
        values.over(CardValues(size=(1, 1))).image()


def resolve(
    word: str,
    values: CardValues | None = None,
    *,
    keep_float: Sequence[str] = (),
    untrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Source:
    """The float network that a word names, checked, with its card.

    `values` are what the user says of the card; what is missing comes from the network's own configuration.
    `keep_float` are glob patterns over module paths. `untrained` makes random weights (seed 0), for words of
    timm and names of vitkit's models, which take `options` of their architecture. Raises BadRequest,
    BadInput, BadArtifact or MissingBackend, each with the cure.
    """
    given, found = values or CardValues(), parse_word(word)
    check_word(found, given)
    if found.kind == "run":
        return _own(word, given, keep_float, untrained, options or {})
    if options:
        raise BadRequest(f"--option changes the architecture of vitkit's own models, not of {word}")
    if found.kind == "timm":
        from vitkit.sources import timm_models

        return timm_models.load(found.rest, given, keep_float, untrained=untrained)
    if untrained:
        raise BadRequest(f"--untrained is for timm:NAME and vitkit's own models; {word} brings its weights")
    if found.kind == "factory":
        from vitkit.sources import factory

        return factory.load(found.rest, given, keep_float)
    assert found.path is not None
    if found.kind == "program":
        from vitkit.sources import program

        return program.load(found.path, given, keep_float)
    from vitkit.sources import huggingface

    return huggingface.load(found.path, given, keep_float)


def _own(
    word: str, values: CardValues, keep_float: Sequence[str], untrained: bool, options: Mapping[str, Any]
) -> Source:
    """A run, or one of vitkit's models with random weights."""
    if values != CardValues() or keep_float:
        raise BadRequest(
            f"{word} has a card, and its model says what stays float; --keep-float and the flags of cards, "
            "such as --size and --mean, are for networks from outside"
        )
    if options and not untrained:
        raise BadRequest("--option changes the architecture, which a run has fixed; it goes with --untrained")
    if not untrained and not Path(word).exists():
        raise BadRequest(_unknown(word))
    from vitkit.exporters.source import Source
    from vitkit.runs import load_run, untrained_run

    run = untrained_run(word, options) if untrained else load_run(Path(word))
    return Source(run.model, run.card)


def _unknown(word: str) -> str:
    from vitkit.models import MODELS

    if word in MODELS:
        return f"there is no run {word!r}; add --untrained to export it with random weights"
    near = get_close_matches(word, MODELS, 1)
    also = f"; did you mean the model {near[0]}?" if near else ""
    return f"there is no run {word!r}{also}. A source is {FORMS}"


def said_by(network: Any, task: str | None) -> CardValues:
    """What a module in memory says of its card: the configuration of timm's modules, nothing of others."""
    if not hasattr(network, "pretrained_cfg"):
        return CardValues()
    from vitkit.sources import timm_models

    return timm_models.configured(network, task)
