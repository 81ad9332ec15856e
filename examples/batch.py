"""Explain a folder of pictures through a running service, and write a table and the overlays.

    heatlens serve
    python examples/batch.py photos out

The overlays are `out/NAME.jpg`; `out/table.csv` has a row for each picture: file, label, probability,
where the map is strongest, and the error of those that could not be explained. The exit code is 1
if there are such. `HEATLENS_URL` and `HEATLENS_API_KEY` name another service and its key.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from heatlens import Client

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    """Explain all pictures with eight requests in flight."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", default="gradcam")
    arguments = parser.parse_args()

    files = sorted(p for p in arguments.pictures.iterdir() if p.suffix.lower() in SUFFIXES)
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    with Client() as client, (arguments.output / "table.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("file", "label", "probability", "x", "y", "error"))
        for file, response, error in client.explain_many(
            files, in_flight=8, methods=[arguments.method], outputs=["overlay"]
        ):
            if response is None:
                failed += 1
                table.writerow((file.name, "", "", "", "", error))
                continue
            explanation = response.explanation
            target, peak = explanation.target, explanation.peak
            where = (peak.x, peak.y) if peak else ("", "")
            table.writerow((file.name, target.label, f"{target.probability:.3f}", *where, ""))
            explanation.overlay.save(arguments.output / f"{file.stem}.jpg")
    print(f"{len(files) - failed} of {len(files)} explained: {arguments.output / 'table.csv'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
