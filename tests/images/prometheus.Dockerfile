# Where no registry is reached: Debian's Prometheus, from `make deploy-tools`, with the user, folder and
# entry point of prom/prometheus. The context is the folder of the binary.
ARG BASE_IMAGE=debian:12-slim
FROM ${BASE_IMAGE}
COPY prometheus /bin/prometheus
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["/bin/prometheus"]
