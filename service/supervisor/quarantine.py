"""Jobs that are refused for a while, because two workers exited while running them."""

from __future__ import annotations

from service.devices.status import MAX_QUARANTINED


class Quarantine:
    """Digests of jobs, each until its time is over.

    Args:
        seconds: that time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[str, float] = {}

    def add(self, digest: str, now: float) -> None:
        """Refuse a job from now on, or again from now on."""
        self._until.pop(digest, None)
        self._until[digest] = now + self._seconds

    def digests(self, now: float) -> tuple[str, ...]:
        """The jobs that are refused, oldest first."""
        kept = [(digest, until) for digest, until in self._until.items() if until > now]
        self._until = dict(kept[-MAX_QUARANTINED:])
        return tuple(self._until)
