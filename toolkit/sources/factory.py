"""`PACKAGE.MODULE:FACTORY` and `FILE.py:FACTORY`: a network that the user's own code makes."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.exporters.source import Source
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadRequest, VitkitError, first_line
from vitkit.sources.card_values import CardValues
from vitkit.sources.network import wrap_network

_log = logging.getLogger("vitkit")


def load(word: str, values: CardValues, keep_float: Sequence[str] = ()) -> Source:
    """The network that a function without arguments returns; a class is such a function.

    Importing the module and calling the function run the user's code, which the log names. A network that
    comes in training mode as a whole is set to eval mode, and its card records that. Raises BadRequest, also
    for what the code raises.
    """
    where, _, name = word.rpartition(":")
    _log.info("running your code: %s() of %s", name, where)
    network = _call(_find(_import(where), name, where), word)
    in_training = _is_fresh(network)
    if in_training:
        network.eval()
    source = wrap_network(network, name, values, {"factory": f"{Path(where).name}:{name}"}, keep_float)
    return Source(source.module, _note_eval(source.card)) if in_training else source


def _import(where: str) -> ModuleType:
    file = Path(where)
    try:
        if file.suffix == ".py":
            return _import_file(file)
        # The console script leaves out the current folder, which `python -m` has.
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return import_module(where)
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            raise BadRequest(
                f"there is no module {where!r}; name a module that Python can import from this folder, or a "
                "file: FILE.py:FACTORY"
            ) from None
        raise BadRequest(_failure(f"importing {where}", error)) from error
    except VitkitError:
        raise
    # Any error may come out of the user's code, sys.exit() included.
    except (Exception, SystemExit) as error:
        raise BadRequest(_failure(f"importing {where}", error)) from error


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise BadRequest(f"there is no file {file}; the form is FILE.py:FACTORY")
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # As `python FILE` does, so that it finds the modules beside it; and pickles and dataclasses find it.
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules.setdefault(file.stem, module)
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, name: str, where: str) -> Any:
    found = getattr(module, name, None)
    if callable(found):
        return found
    callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    what = "is not callable" if hasattr(module, name) else "does not exist"
    raise BadRequest(f"{name!r} in {where} {what}; it has {', '.join(callables[:10]) or 'no function'}")


def _call(factory: Any, word: str) -> Any:
    try:
        network = factory()
    except VitkitError:
        raise
    except (Exception, SystemExit) as error:
        raise BadRequest(_failure(f"calling {word}", error)) from error
    from torch import nn

    if not isinstance(network, nn.Module):
        raise BadRequest(f"{word} returned a {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _failure(what: str, error: BaseException) -> str:
    """An error of the user's code in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{what} failed: {type(error).__name__}: {first_line(error)}{place}"


def _is_fresh(network: Any) -> bool:
    """Whether a network is in training mode as a whole, as a module is made."""
    return all(module.training for module in network.modules())


def _note_eval(card: ModelCard) -> ModelCard:
    assumed = {**card.provenance["assumed"], "mode": "eval(), since it came in training mode"}
    return replace(card, provenance={**card.provenance, "assumed": assumed})
