"""Classify many files, several in one call: python batch.py ARTIFACT FILE...

An unreadable file is reported and left out.
"""

import sys

import vitkit


def main(artifact: str, *files: str, together: int = 8) -> None:
    with vitkit.open_engine(artifact, task="classification") as engine:
        for start in range(0, len(files), together):
            names = list(files[start : start + together])
            results: list[vitkit.Classification | str]
            try:
                results = [*engine(names)]
            except vitkit.BadInput:
                # One of them; alone, each file gets its own result or its own error.
                results = [alone(engine, name) for name in names]
            for name, result in zip(names, results, strict=True):
                print(name, result if isinstance(result, str) else f"{result.label} {result.probability:.3f}")


def alone(engine: vitkit.Engine[vitkit.Classification], name: str) -> vitkit.Classification | str:
    try:
        return engine(name)
    except vitkit.BadInput as error:
        return f"left out: {error}"


if __name__ == "__main__":
    main(*sys.argv[1:])
