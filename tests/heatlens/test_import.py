"""Importing the package is quick, and needs neither torch nor FastAPI."""

import subprocess
import sys

import heatlens


def test_importing_loads_neither_torch_nor_fastapi():
    code = (
        "import sys, heatlens; print([m for m in ('torch', 'fastapi', 'numpy', 'httpx', 'PIL') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_client_needs_neither_torch_nor_fastapi():
    code = (
        "import sys; from heatlens import Client, AsyncClient; "
        "print([m for m in ('torch', 'fastapi', 'models', 'service') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_name_can_be_imported():
    for name in heatlens.__all__:
        assert getattr(heatlens, name).__name__ == name
    assert set(heatlens.__all__) <= set(dir(heatlens))
    assert heatlens.__version__
