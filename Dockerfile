# Heatlens in a container.
#
#   docker build -t heatlens .                                  the torch that pip finds: CPU or GPU
#   docker build -t heatlens --build-arg VARIANT=cpu \
#     --build-arg TORCH_INDEX_URL=… .                           PyTorch's small CPU build
#   docker run --rm -p 8000:8080 heatlens                       add --gpus all for the GPU
#
# Without a network: `deploy/image/build.sh` builds from a folder of wheels.

ARG BASE_IMAGE=python:3.11-slim

# ---- what both stages start from: an empty environment, and a user who owns a cache alone, where what
# is proved of models and measured is kept (a volume there makes the next start quick)
FROM ${BASE_IMAGE} AS base

RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin heatlens \
    && install -d -o 10001 /tmp/.cache \
    && python3 -m venv --without-pip /opt/heatlens
ENV PATH=/opt/heatlens/bin:$PATH

# ---- pins: those of torch and what it needs, so that other ones do not install torch again
FROM base AS pins

COPY constraints.txt /
RUN grep -iE "^(torch|torchvision|numpy|pillow|sympy|mpmath|networkx|jinja2|markupsafe|filelock|fsspec|typing_extensions|setuptools)==" \
        /constraints.txt > /torch.txt

# ---- build: one folder a layer, what changes least first
FROM base AS build

# PIP_* as in pip's documentation, for mirrors and folders of wheels.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ARG TORCH_INDEX_URL
ARG VARIANT=cuda
# Of the package; without, "otel", and in images for CPUs "otel openvino".
ARG EXTRAS
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
RUN python3 -m venv /opt/pip
COPY --from=pins /torch.txt ./
COPY deploy/image/trim.sh ./
RUN /opt/pip/bin/pip --python /opt/heatlens/bin/python install --prefix /layers/torch -c torch.txt \
        ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch torchvision \
    && sh trim.sh "${VARIANT}" /layers/torch/lib/python*/site-packages

# Nothing may be in two layers: pins above that lack a package of torch's show here.
COPY constraints.txt pyproject.toml ./
ENV PIP_CONSTRAINT=/src/constraints.txt
RUN if [ -z "${EXTRAS}" ] && [ "${VARIANT}" = cpu ]; then EXTRAS="otel openvino"; fi \
    && python -c "import sys, tomllib; \
p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *(r for e in sys.argv[1:] for r in p['optional-dependencies'][e]), sep='\n')" \
        ${EXTRAS:-otel} > requirements.txt \
    && PYTHONPATH="$(echo /layers/torch/lib/python*/site-packages)" \
        /opt/pip/bin/pip --python /opt/heatlens/bin/python install --prefix /layers/packages \
        -r requirements.txt \
    && ! { basename -a /layers/*/lib/python*/site-packages/*.dist-info | sed "s/-[^-]*$//" | sort \
        | uniq -d | grep .; }

# For models/reductions.c and models/imaging/resampling.c; without them statistics of many layers and
# images take longer.
RUN command -v cc > /dev/null \
    || { apt-get -qq update && apt-get -qq install -y --no-install-recommends gcc libc6-dev; } \
    || echo "no C compiler: statistics of many layers and images will take longer"

COPY README.md LICENSE ./
COPY heatlens heatlens
COPY models models
COPY service service
RUN /opt/pip/bin/pip --python /opt/heatlens/bin/python install --prefix /layers/heatlens --no-deps .

# ---- runtime: no compiler, no pip, no source tree, no root
FROM base

LABEL org.opencontainers.image.title="heatlens" \
      org.opencontainers.image.description="Classifies images over REST and shows why" \
      org.opencontainers.image.licenses="Apache-2.0"

COPY --from=build /layers/torch /opt/heatlens
COPY --from=build /layers/packages /opt/heatlens
COPY --from=build /layers/heatlens /opt/heatlens

# 8080 is where KServe, SageMaker and Vertex AI look.
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HEATLENS_SERVER__HOST=0.0.0.0 \
    HEATLENS_SERVER__PORT=8080 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 10001
WORKDIR /etc/heatlens
EXPOSE 8080
STOPSIGNAL SIGTERM

# urlopen raises on 503, which is what /readyz says until a device has completed a real pass.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['HEATLENS_SERVER__PORT'] + '/readyz', timeout=4)"]

# The supervisor reaps its children and passes the signal on, so no init is needed.
ENTRYPOINT ["heatlens"]
CMD ["serve"]
