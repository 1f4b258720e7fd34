"""One self-contained page that compares artifacts and devices, made from measured results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitkit.report.page import is_page, page
from vitkit.report.results import read_results
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.files import check_writable, write_text


def write_report(results: Sequence[Path], out: Path) -> Path:
    """Write the page for JSON files of `vitkit bench --json` and `vitkit evaluate --json`; returns `out`.

    The page needs no network: styles, script and plots are inside, and the same results give the same
    bytes. Only an earlier page may be replaced. Raises BadRequest if `out` cannot be written or holds
    anything else, BadInput for results that are damaged or contradict each other, and MissingBackend
    without matplotlib.
    """
    if out.resolve() in {path.resolve() for path in results}:
        raise BadRequest(f"the page {out} is also one of the results; name another file with -o")
    if out.is_dir():
        raise BadRequest(f"the page {out} is a folder; name a file, such as: -o {out / 'report.html'}")
    if out.exists() and not is_page(out):
        raise BadRequest(f"{out} is no page of vitkit report and would be lost; name another file with -o")
    check_writable(out)
    write_text(out, page(read_results(results)))
    return out
