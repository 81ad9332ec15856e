"""Reading the configuration again: what a running service takes over and what has to wait."""

from __future__ import annotations

from pathlib import Path

from service.settings import ConfigurationSource, Settings, reloaded


def test_a_source_travels_and_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "heatlens.toml"
    path.write_text("[limits]\nmax_images = 4\n")
    source = ConfigurationSource(path=path, overrides={"server": {"port": 9000}})
    there = ConfigurationSource.model_validate_json(source.model_dump_json())
    assert there.read() == source.read()
    assert there.read().server.port == 9000
    assert there.read().limits.max_images == 4
    path.write_text("[limits]\nmax_images = 5\n[server]\nport = 1\n")
    assert there.read().limits.max_images == 5
    assert there.read().server.port == 9000, "what the command line says still wins"


def test_what_is_taken_over() -> None:
    running = Settings()
    read = Settings(
        limits={"max_images": 4, "timeout_s": 5},
        security={"api_keys": ["k"]},
        server={"grace_s": 3, "log_level": "debug", "ready_within_s": 7},
        metrics={"nv_aliases": True},
        models=[{"name": "m", "source": "timm:resnet10t"}],
    )
    taken, late = reloaded(running, read)
    assert taken == read
    assert late == ()


def test_what_has_to_wait() -> None:
    running = Settings()
    read = Settings(
        server={"host": "::1", "port": 1, "http_workers": 3, "devices": ["cpu:7"], "grace_s": 3},
        limits={"max_wait_s": 1, "max_images": 4},
        workers={"threads": 3},
        tracing={"enabled": True},
        base_dir="/elsewhere",
    )
    taken, late = reloaded(running, read)
    assert set(late) == {
        "server.host",
        "server.port",
        "server.http_workers",
        "server.devices",
        "limits.max_wait_s",
        "workers",
        "tracing",
        "base_dir",
    }
    assert taken.server == running.server.model_copy(update={"grace_s": 3.0})
    assert taken.limits == running.limits.model_copy(update={"max_images": 4})
    assert (taken.workers, taken.tracing) == (running.workers, running.tracing)
    assert taken.base_dir == running.base_dir
