"""A device worker with the fake engine, for `Supervisor(worker_command=...)`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import make_backend

from service.settings import Settings
from service.worker import process as worker


def backend(options: worker.WorkerOptions, _settings: Settings) -> object:
    journal = options.runtime.path / "journal"
    return make_backend(first_incarnation=options.incarnation == 1, journal=journal)


if __name__ == "__main__":
    os._exit(worker.main(make_backend=backend))
