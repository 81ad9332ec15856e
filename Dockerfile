# Heatlens in a container.
#
#   docker build -t heatlens .                                      the torch that pip finds; runs on a CPU or a GPU
#   docker build -t heatlens --build-arg TORCH_INDEX_URL=… .        a torch of your choice, such as the small CPU build
#   docker run --rm -p 8000:8000 heatlens                           add --gpus all for the GPU

ARG BASE_IMAGE=python:3.11-slim

# ---- build: a virtual environment that the runtime stage copies whole
FROM ${BASE_IMAGE} AS build

ARG TORCH_INDEX_URL=""
ARG EXTRAS="otel"
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/src/constraints.txt \
    PATH=/opt/heatlens/bin:$PATH

WORKDIR /src
RUN python -m venv /opt/heatlens

# Dependencies before the code: a change of the code does not install torch again.
COPY pyproject.toml constraints.txt ./
RUN if [ -n "${TORCH_INDEX_URL}" ]; then pip install --index-url "${TORCH_INDEX_URL}" torch torchvision; fi
RUN python -c "import sys, tomllib; \
p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *(r for e in sys.argv[1:] for r in p['optional-dependencies'][e]), sep='\n')" \
    ${EXTRAS} > requirements.txt \
    && pip install -r requirements.txt

COPY README.md LICENSE ./
COPY models models
COPY service service
RUN pip install --no-deps . \
    && python -m compileall -q /opt/heatlens/lib

# ---- runtime: no compiler, no source tree, no root
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="heatlens" \
      org.opencontainers.image.description="Classifies images over REST and shows why" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin heatlens
COPY --from=build /opt/heatlens /opt/heatlens

ENV PATH=/opt/heatlens/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HEATLENS_SERVER__HOST=0.0.0.0 \
    HEATLENS_SERVER__PORT=8000

USER 10001
WORKDIR /etc/heatlens
EXPOSE 8000
STOPSIGNAL SIGTERM

# urlopen raises on 503, which is what /readyz says until a device has completed a real pass.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['HEATLENS_SERVER__PORT'] + '/readyz', timeout=4)"]

# The supervisor reaps its children and passes the signal on, so no init is needed.
ENTRYPOINT ["heatlens"]
CMD ["serve"]
