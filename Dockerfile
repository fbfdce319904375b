# docker build --target serve-cpu -t timesformer:cpu .      serves on the CPU, no torch
# docker build --target serve-gpu -t timesformer:gpu .      serves on a GPU and builds its engines, no torch
# docker build --target train     -t timesformer:train .    trains, exports, refreshes
#
# BASE_IMAGE needs Python 3.11 to 3.13 as `python3`, with venv, and nothing else. CUDA_IMAGE is a
# Debian or Ubuntu that asks the container runtime for the driver; the CUDA libraries and cuDNN come
# from the lock.
ARG BASE_IMAGE=python:3.12-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

# Our code, once for all. Stages below install dependencies first, by their hashes: a change of our
# code does not install them again.
FROM ${BASE_IMAGE} AS wheel
WORKDIR /build
RUN python3 -m venv /opt/build
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY export export
COPY service service
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE} AS install-cpu
WORKDIR /build
RUN python3 -m venv /opt/timesformer
COPY requirements.lock requirements-objectstore.lock ./
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock
# For bundles at s3:// and gs://.
ARG OBJECTSTORE=no
RUN if [ "${OBJECTSTORE}" = yes ]; then /opt/timesformer/bin/pip install --no-cache-dir --no-deps \
    --require-hashes --requirement requirements-objectstore.lock; fi
COPY --from=wheel /wheels /wheels
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM ${BASE_IMAGE} AS serve-cpu
ARG REVISION=unknown
LABEL org.opencontainers.image.title="timesformer-service" \
      org.opencontainers.image.description="TimeSformer inference on CPU: video in, action labels out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
# A new named volume takes its owner from here, and a tmpfs its mode.
RUN install -d -o 10001 -g 10001 /bundles && install -d -m 1777 /spool
COPY --from=install-cpu /opt/timesformer /opt/timesformer
ENV PATH=/opt/timesformer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TIMESFORMER_HOST=0.0.0.0
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"TIMESFORMER_PORT\", 8000)}/health/ready', timeout=2)"]
ENTRYPOINT ["timesformer"]
CMD ["serve"]

FROM ${CUDA_IMAGE} AS cuda-python
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM cuda-python AS install-gpu
WORKDIR /build
RUN python3 -m venv /opt/timesformer
COPY requirements-gpu.lock requirements-objectstore.lock ./
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements-gpu.lock
# For bundles at s3:// and gs://.
ARG OBJECTSTORE=no
RUN if [ "${OBJECTSTORE}" = yes ]; then /opt/timesformer/bin/pip install --no-cache-dir --no-deps \
    --require-hashes --requirement requirements-objectstore.lock; fi
COPY --from=wheel /wheels /wheels
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM cuda-python AS serve-gpu
ARG REVISION=unknown
LABEL org.opencontainers.image.title="timesformer-service" \
      org.opencontainers.image.description="TimeSformer inference on NVIDIA GPUs: video in, action labels out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
RUN install -d -o 10001 -g 10001 /bundles && install -d -m 1777 /spool
COPY --from=install-gpu /opt/timesformer /opt/timesformer
ENV PATH=/opt/timesformer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TIMESFORMER_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Longer to start: a bundle is loaded onto the GPU and warmed up.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"TIMESFORMER_PORT\", 8000)}/health/ready', timeout=2)"]
ENTRYPOINT ["timesformer"]
CMD ["serve"]

FROM ${BASE_IMAGE} AS install-train
WORKDIR /build
RUN python3 -m venv /opt/timesformer
COPY requirements-train.lock .
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements-train.lock
# Apart and without a hash: which build of it is right, CPU or which CUDA, is the machine's matter.
ARG TORCH=torch==2.13.0
RUN /opt/timesformer/bin/pip install --no-cache-dir "${TORCH}"
COPY --from=wheel /wheels /wheels
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM ${BASE_IMAGE} AS train
ARG REVISION=unknown
LABEL org.opencontainers.image.title="timesformer-train" \
      org.opencontainers.image.description="TimeSformer training, export and refresh of served bundles" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
RUN install -d -o 10001 -g 10001 /bundles /work
COPY --from=install-train /opt/timesformer /opt/timesformer
# Libraries that want a home get one that is writable.
ENV PATH=/opt/timesformer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
WORKDIR /work
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["timesformer"]
CMD ["--help"]
