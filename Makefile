# make demo | test | lab | docs: each sets up .venv first. PYTHON=python3.12 make test takes another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# torch's threads spin: with two of them anything else on two cores crawls (and so do they)
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg
# where it is set, every process that a test starts would compile the package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lab docs setup benchmark record study bad_input notebooks readme coverage mutants lowest newest runtime constraints quarto dist torture guard clean
demo: setup
	$(BIN)/python -W ignore -m relvit.demo $(ARGS)

# a file of tests on each core, on four at most. ARGS=-n0: one after the other, as a debugger wants it
test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lab: setup
	cd nbs && env -u MPLBACKEND ../$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# the site, into _docs; nbdev_docs makes it with Quarto
docs: setup
	$(BIN)/python -W ignore tools/site.py $(ARGS)

# the same pages with Quarto itself, where it is installed
quarto: setup
	$(BIN)/python -W ignore tools/site.py --quarto $(ARGS)

# archive of sources and wheel, into dist; TAG=v0.1.0: only where it is the version of settings.ini and of the package
dist:
	$(PYTHON) tools/dist.py $(TAG)
	rm -rf dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build
	.venv-dist/bin/python -m build --outdir dist .

setup: .venv/.ready
.venv/.ready: constraints.txt settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --refresh-package relvit --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

record: setup
	$(BIN)/python -W ignore -m relvit.demo --all --first 10 --record results/demo.json
	cp demo/demo.png nbs/images/demo.png

# four hours on 2 cores; a second call goes on where the first was stopped
study: setup
	$(BIN)/python -W ignore -m relvit.photos $(DATA) --first 10 --record results/photos.json --keep runs/photos
	$(BIN)/python -W ignore -m relvit.photos $(DATA) --first 10 --modern --record results/modern.json --keep runs/photos
	$(BIN)/python -W ignore -m relvit.methods $(DATA) --record results/methods.json --keep runs/methods
	$(BIN)/python -W ignore -m relvit.scenes --first 10 --record results/scenes.json --keep runs/scenes
	$(BIN)/python -W ignore -m relvit.scenes --first 10 --lr .003 --record results/scenes_high.json --keep runs/scenes_high
	$(BIN)/python -W ignore -m relvit.dense --record results/dense.json --keep runs/dense

# what each bad input of tests/bad_input.py is told
bad_input: setup
	$(BIN)/python -W ignore tests/bad_input.py results/bad_input.json

benchmark: setup
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/patches.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/widgets.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/train.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/methods.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/detect.py
	$(if $(DAVIS),$(BIN)/python -W ignore benchmarks/video.py $(DAVIS),@echo 'video: DAVIS=folder make benchmark')

# kill training at 30 random moments and inside every write, go on, compare to the bit; minutes on one core
torture: setup
	$(BIN)/python -W ignore tests/torture.py --record results/torture.json $(ARGS)

# what it costs to stop at a loss that is no number
guard: setup
	$(BIN)/python -W ignore benchmarks/guard.py --record results/guard.json

# execute every notebook in place, keep light outputs, export the package, write README.md
notebooks: setup
	$(BIN)/python tools/notebooks.py run
	$(BIN)/python tools/notebooks.py readme

readme: setup
	$(BIN)/python tools/notebooks.py readme

# which lines of the package run in tests/, and in the notebooks when they import it: 40 minutes of one core
coverage: setup
	$(BIN)/python tools/covered.py run tests
	$(BIN)/python tools/covered.py run notebooks
	$(BIN)/python tools/covered.py report results/coverage.json

# the tests with the lowest versions that settings.ini admits, with the newest that there are (notebooks too), and with nothing but what
# is needed to run: an environment each, .venv-NAME, an hour of one core each; nbdev is in none. All write to results/dependencies.json
lowest newest runtime:
	$(PYTHON) tools/dependencies.py $@ $(ARGS)

# pins for every Python and platform from settings.ini; those that stand are kept where they can be (rm constraints.txt: all anew)
constraints: setup
	$(BIN)/uv pip compile --quiet --refresh-package relvit --universal --python-version 3.10 --all-extras --no-annotate --custom-compile-command 'make constraints' setup.py -o constraints.txt

# small mistakes in floors 0 to 2, and which are noticed; after coverage. ARGS=--again: only those that were not
mutants: setup
	$(BIN)/uv pip install --quiet --refresh-package relvit --python $(BIN)/python -c constraints.txt -e '.[mutants]'
	$(BIN)/python tools/mutants.py results/mutants.json $(ARGS)

clean:
	rm -rf .venv .venv-* demo runs _docs dist
