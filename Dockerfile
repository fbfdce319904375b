# docker build --target serve-cpu -t timesformer:cpu .
#
# The base needs Python 3.11 to 3.13 as `python3`, with venv, and nothing else.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS install-cpu
WORKDIR /build
RUN python3 -m venv /opt/timesformer
# Dependencies first, by their hashes: a change of our code does not install them again.
COPY requirements.lock .
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY export export
COPY service service
RUN /opt/timesformer/bin/pip install --no-cache-dir --no-deps .

FROM ${BASE_IMAGE} AS serve-cpu
LABEL org.opencontainers.image.title="timesformer-service" \
      org.opencontainers.image.description="TimeSformer inference on CPU: video in, action labels out" \
      org.opencontainers.image.licenses="Apache-2.0"
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
