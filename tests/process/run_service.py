"""A supervisor as its own process: `run_service.py SETTINGS_JSON [real-http]`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from service.settings import Settings
from service.workers.supervisor import HTTP_COMMAND, Supervisor

HERE = Path(__file__).parent

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(message)s")
    small = (sys.executable, str(HERE / "small_http.py"))
    supervisor = Supervisor(
        Settings.model_validate_json(sys.argv[1]),
        worker_command=(sys.executable, str(HERE / "faulty_worker.py")),
        http_command=HTTP_COMMAND if "real-http" in sys.argv else small,
    )
    sys.exit(supervisor.run())
