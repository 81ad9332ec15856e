"""What serving platforms hand to a container, as our configuration.

KServe and SageMaker mount a folder with a model, KServe appends arguments, and Vertex AI sets
`AIP_*` variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.configuration import ConfigurationError, ConfigurationSource, load_settings

MOUNTED = (Path("/mnt/models"), Path("/opt/ml/model"))
"""Where KServe and SageMaker put a model."""
CONFIG_NAME = "heatlens.toml"

_LABEL_FILES = ("labels.txt", "labels.json", "index_to_name.json")
_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_WHOLE = {".pt2": "export", ".onnx": "onnx"}
"""Files that hold the network as well as its weights, by suffix: the source that reads them."""
_OWN_ROUTES = ("/v1/", "/v2/")
_VERTEX_DEFAULT = "/v1/endpoints/"


def mounted_folder() -> Path | None:
    """The folder that a platform mounted, if it holds anything."""
    return next((f for f in MOUNTED if f.is_dir() and any(f.iterdir())), None)


def hosted_configuration(
    *,
    config: Path | None,
    folder: Path | None,
    name: str | None,
    server: Mapping[str, Any],
    environment: Mapping[str, str],
) -> ConfigurationSource:
    """Merge what a platform says with the flags of the command line, which take precedence.

    Args:
        config: a configuration file; None = that in `folder`.
        folder: a folder with a configuration file or one model; its paths start there.
        name: the name that the platform calls the model by.
        server: flags of `[server]`.
        environment: variables, of which those of Vertex AI are read.

    Raises:
        ConfigurationError: there is no model in the folder, or more than one, or none that could be
            called `name`.
    """
    overrides: dict[str, Any] = {"server": {**_vertex_port(environment), **server}}
    if folder is not None and config is None:
        if (folder / CONFIG_NAME).is_file():
            config = folder / CONFIG_NAME
        else:
            overrides |= {"models": [model_in(folder)], "base_dir": folder.absolute()}
    settings = load_settings(config, overrides=overrides)
    if name is not None:
        names = list(dict.fromkeys(spec.name for spec in settings.models))
        if name not in names:
            if len(names) > 1:
                raise ConfigurationError(
                    f"--model_name {name}: the configuration has {', '.join(names)}."
                )
            specs = [spec.model_dump(exclude_unset=True) for spec in settings.models]
            overrides["models"] = [{**spec, "name": name} for spec in specs]
        overrides["default_model"] = name
    aliases = _vertex_aliases(environment, name or settings.default_model)
    if aliases:
        overrides["server"]["aliases"] = aliases
    path = config.absolute() if config else None
    return ConfigurationSource(path=path, overrides=overrides)


def model_in(folder: Path) -> dict[str, Any]:
    """The `[[models]]` entry of the one model in a folder; its paths start from the folder.

    Raises:
        ConfigurationError: there is not exactly one model, or it does not say what it is.
    """
    labels = next((name for name in _LABEL_FILES if (folder / name).is_file()), None)
    entry: dict[str, Any] = {"name": "model"} | ({"labels": labels} if labels else {})
    saved = _saved_by(folder / "config.json")
    if saved is not None:
        return entry | {"source": f"{saved}:."}
    suffixes = (*_WEIGHTS, *_WHOLE)
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise ConfigurationError(
            f"{folder} has no {CONFIG_NAME}, so it must hold one model in a file "
            f"({', '.join(suffixes)}) or in a folder saved by transformers or timm; found: {found}."
        )
    return entry | {"source": source_of(files[0])}


def source_of(file: Path) -> str:
    """The source that reads a single file, by its suffix; the path starts from the file's folder."""
    return f"{_WHOLE.get(file.suffix, 'checkpoint')}:{file.name}"


def _saved_by(file: Path) -> str | None:
    """The library whose `config.json` this is; None = neither of the known ones."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    # timm names one architecture, transformers a list of them.
    return (
        "timm" if "architecture" in content else "transformers" if "model_type" in content else None
    )


def _vertex_port(environment: Mapping[str, str]) -> dict[str, str]:
    port = environment.get("AIP_HTTP_PORT")
    return {"port": port} if port else {}


def _vertex_aliases(environment: Mapping[str, str], model: str) -> dict[str, str]:
    """The routes that Vertex AI chose, unless they are ours already."""
    chosen = {
        environment.get("AIP_HEALTH_ROUTE"): "/readyz",
        environment.get("AIP_PREDICT_ROUTE"): f"/v1/models/{model}:predict",
    }
    return {
        route: ours
        for route, ours in chosen.items()
        if route and (route.startswith(_VERTEX_DEFAULT) or not route.startswith(_OWN_ROUTES))
    }
