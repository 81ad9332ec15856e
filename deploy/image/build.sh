#!/usr/bin/env bash
# build.sh [VARIANT]: builds the image `heatlens` with buildah where no registry of images can be
# reached. Debian's debootstrap makes the base, pip on this machine the wheels.
#
# Needs root and Debian's packages buildah, debootstrap and podman. PYTHON is a Python with pip, of the
# version that the base has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

variant=${1:-cpu}
suite=${SUITE:-bookworm}
python=${PYTHON:-python3}
if [ "$variant" = cpu ]; then extras=${EXTRAS:-otel openvino}; else extras=${EXTRAS:-otel}; fi
base=heatlens-base:$suite
wheels=$PWD/build/wheels
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}

if ! buildah inspect --type image "$base" > /dev/null 2>&1; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$root"
    rm -rf "$root"/var/{cache/apt,lib/apt/lists}/* "$root"/usr/share/{doc,locale,man}/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" /
    buildah commit --quiet --rm "$container" "$base"
fi

"$python" -m pip wheel --quiet --constraint constraints.txt --wheel-dir "$wheels" \
    ".[${extras// /,}]" setuptools

buildah build --quiet --format docker --layers --tag heatlens \
    --build-arg BASE_IMAGE="localhost/$base" --build-arg VARIANT="$variant" \
    --build-arg EXTRAS="$extras" --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels \
    --volume "$wheels:/wheels:ro" .

echo "layers of heatlens ($variant), the last one first:"
podman history --format '{{.Size}}\t{{.CreatedBy}}' localhost/heatlens | grep -v '^0 B' | cut -c -100
