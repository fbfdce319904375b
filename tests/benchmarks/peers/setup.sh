#!/bin/sh
# Makes build/peers: an environment with the peers, and a store with the bundles that are served: the
# toy, and TimeSformers of random weights.
set -eu
python=${1:-.venv/bin/python}
mkdir -p build/peers
"$python" -m venv build/peers/venv
build/peers/venv/bin/pip --disable-pip-version-check install --quiet \
    --requirement tests/benchmarks/peers/requirements.in
"$python" -m tests.benchmarks.peers.toy build/peers/store
for variant in tiny base; do
    "$python" -m tests.benchmarks.peers.random_weights build/peers $variant
done
