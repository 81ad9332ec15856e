"""Runs a supervisor: `run_service.py SETTINGS_JSON [real-http] [real-worker] [config=PATH]`.

With `config` the settings come from that file, and can be read from it again.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from service.configuration import ConfigurationSource
from service.settings import Settings
from service.supervisor.supervisor import HTTP_COMMAND, Supervisor

HERE = Path(__file__).parent

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(message)s")
    flags = sys.argv[2:]
    paths = [Path(flag.removeprefix("config=")) for flag in flags if flag.startswith("config=")]
    source = ConfigurationSource(path=paths[0] if paths else None)
    small = (sys.executable, str(HERE / "small_http.py"))
    faulty = (sys.executable, str(HERE / "faulty_worker.py"))
    supervisor = Supervisor(
        source.read() if paths else Settings.model_validate_json(sys.argv[1]),
        source=source,
        worker_command=None if "real-worker" in flags else faulty,
        http_command=HTTP_COMMAND if "real-http" in flags else small,
    )
    sys.exit(supervisor.run())
