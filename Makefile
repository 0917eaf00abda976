# make demo | test | lab | docs: each sets up .venv first. PYTHON=python3.12 make test takes another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# torch's threads spin: with two of them anything else on two cores crawls (and so do they)
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

.PHONY: demo test lab docs setup benchmark record study notebooks readme clean
demo: setup
	$(BIN)/python -W ignore -m relvit.demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lab: setup
	cd nbs && env -u MPLBACKEND ../$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# the site, into _docs; nbdev_docs makes it with Quarto
docs: setup
	$(BIN)/python -W ignore tools/site.py $(ARGS)

setup: .venv/.ready
.venv/.ready: constraints.txt settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
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

benchmark: setup
	$(BIN)/python benchmarks/patches.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/widgets.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/train.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/methods.py
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore benchmarks/detect.py
	$(if $(DAVIS),$(BIN)/python -W ignore benchmarks/video.py $(DAVIS),@echo 'video: DAVIS=folder make benchmark')

# execute every notebook in place, keep light outputs, export the package, write README.md
notebooks: setup
	$(BIN)/python tools/notebooks.py run
	$(BIN)/python tools/notebooks.py readme

readme: setup
	$(BIN)/python tools/notebooks.py readme

clean:
	rm -rf .venv demo runs _docs
