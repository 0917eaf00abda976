"""The workbench as it is used: JupyterLab as `make lab` starts it, a browser, real clicks and real keys.

Lab runs on a copy of the tutorials, with settings of its own: nothing here changes the checkout or a user's Lab.
"""
import io, json, os, re, shutil, signal, subprocess, sys, time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import nbformat, numpy as np, pytest
from PIL import Image

chromium = Path('/usr/bin/chromium')
pytestmark = [pytest.mark.skipif(not chromium.exists(), reason='apt-get install chromium'),
              pytest.mark.skipif(not shutil.which('make'), reason='apt-get install make')]
sync_api = pytest.importorskip('playwright.sync_api', reason='pip install playwright (not `playwright install`)')

root = Path(__file__).resolve().parents[1]
tutorials = sorted(p.relative_to(root/'nbs') for p in (root/'nbs/tutorials').glob('[!._]*.ipynb'))
run_here = [p for p in tutorials if p.stem == 'add_a_relation'] # test_notebooks.py runs all; this one stands for them
flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking ' \
        '--disable-component-update --disable-sync'
plugins = {'notebook-extension/tracker': dict(windowingMode='none'),
           'docmanager-extension/plugin': dict(autosave=False),
           'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False)}

preamble = '''
import json, torch
from relvit import method_widgets as m, tasks, tokens, widgets as w
torch.manual_seed(0)
encoder = lambda p: tokens.TokenEncoder('vit_tiny_patch16_224', img_size=24, p=p, embed_dim=24, depth=2, num_heads=2)
model = tasks.RelViT(encoder(4), ['relations', 'positions'])
images = torch.rand(3, 1, 24, 24).expand(-1, 3, -1, -1)
'''.strip()
shown = dict(relations='w.RelationExplorer(model, images)', playground='w.PatchPlayground(images, 4)',
             attention='w.AttentionExplorer(model, images)', jigsaw='w.JigsawExplorer(model, images)',
             methods='w.MethodComparison(dict(fine=model, coarse=encoder(6)), images)',
             positives='m.PositivesExplorer(model, images)', self_relations='m.SelfRelationExplorer(model, images)')
say = f'print(json.dumps([[e.state, e.picture.cells] for e in [{", ".join(shown)}]]))'


def page_of(path, *sources):
    "Write a notebook of code cells"
    kernel = dict(name='python3', language='python', display_name='Python 3')
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    nb.cells = [nbformat.v4.new_code_cell(s) for s in sources]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)


def stored_images(nb):
    "Outputs of which Lab shows the picture"
    outputs = [o.get('data', {}) for c in nb.cells for o in c.get('outputs', [])]
    return sum('image/png' in o and 'text/html' not in o for o in outputs)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "What `make lab` starts, in a copy; its address and token"
    there = tmp_path_factory.mktemp('lab')
    for name in [*tutorials, *(p.relative_to(root/'nbs') for p in root.glob('nbs/images/*'))]:
        (there/'nbs'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/'nbs'/name, there/'nbs'/name)
    shutil.copy(root/'settings.ini', there) # or a cell with nbdev_export() raises
    (there/'.venv').symlink_to(sys.prefix)
    page_of(there/'nbs/made/widgets.ipynb', preamble, *(f'{k} = {v}\n{k}' for k, v in shown.items()), say)
    for name, settings in plugins.items():
        f = there/f'config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings'
        f.parent.mkdir(parents=True)
        f.write_text(json.dumps(settings))
    env = {k: v for k, v in os.environ.items() if not re.match('JUPYTER|MAKE|MFLAGS', k)}
    own = dict(CONFIG_DIR='config', DATA_DIR='data', RUNTIME_DIR='runtime')
    env |= {f'JUPYTER_{k}': str(there/v) for k, v in own.items()} | dict(IPYTHONDIR=str(there/'ipython'))
    args = 'ARGS=--no-browser --port=0 --LabApp.expose_app_in_browser=True' # the last lets a test call Lab's commands
    said = open(there/'said.txt', 'w+')
    make = ['make', '-f', str(root/'Makefile'), '-o', '.venv/.ready', 'lab', args]
    server = subprocess.Popen(make, cwd=there, env=env, stdout=said, stderr=said, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (found := list(there.glob('runtime/jpserver-*.json'))):
            assert server.poll() is None and time.monotonic() < end, (there/'said.txt').read_text()
            time.sleep(.1)
        info = json.loads(found[0].read_text())
        yield SimpleNamespace(url=info['url'], token=info['token'], nbs=there/'nbs')
    finally:
        with suppress(ProcessLookupError): # make goes at once, Lab when its kernels are gone
            os.killpg(server.pid, signal.SIGTERM)
            for _ in range(150): time.sleep(.1), server.poll(), os.killpg(server.pid, 0)
            os.killpg(server.pid, signal.SIGKILL)
        said.close()


class Bench:
    "A page of Lab with one notebook in front, and what went wrong there"
    cells = '.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell'

    def __init__(self, page, lab):
        self.page, self.lab, self.wrong = page, lab, []
        here = re.compile(rf'(https?|wss?)://{re.escape(lab.url.split("/")[2])}/|(data|blob):')
        asked = lambda url: here.match(url) or self.wrong.append(f'a request to elsewhere: {url}')
        page.on('request', lambda r: asked(r.url))
        page.on('websocket', lambda s: asked(s.url))
        left = lambda r: 'ABORTED' in r.failure # what a page still asked for when it was left
        page.on('requestfailed', lambda r: left(r) or self.wrong.append(f'{r.url}: {r.failure}'))
        page.on('response', lambda r: r.ok or r.status < 400 or self.wrong.append(f'{r.url}: {r.status}'))
        page.on('console', lambda m: m.type == 'error' and self.wrong.append(f'console: {m.text}'))
        page.on('pageerror', lambda e: self.wrong.append(f'uncaught: {e}'))

    def open(self, path):
        "As a link to it does"
        self.page.goto(f'{self.lab.url}lab/workspaces/{Path(path).stem}/tree/{path}?token={self.lab.token}')
        self.page.wait_for_function('p => window.jupyterapp?.shell.currentWidget?.context?.path == p', arg=str(path))

    def start(self):
        "All cells, by the menu's command, when the kernel is there"
        self.page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'")
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells').then(() => ran = true) }")

    def errors(self, seconds):
        "Wait for the end; tracebacks of cells, as Lab shows them, and cells that were not run"
        self.page.wait_for_function('window.ran', timeout=1000*seconds)
        return re.sub(r'\x1b\[[\d;]*m', '', self.page.evaluate('''() => {
            const cells = jupyterapp.shell.currentWidget.content.widgets.map(c => c.model.sharedModel.toJSON());
            const not_run = cells.filter(c => c.cell_type == 'code' && c.source.trim() && !c.execution_count);
            const errors = cells.flatMap(c => c.outputs ?? []).filter(o => o.output_type == 'error');
            const said = errors.map(o => [`${o.ename}: ${o.evalue}`, ...o.traceback].join('\\n'));
            return [...said, ...not_run.map(c => 'not run: ' + c.source)].join('\\n\\n') }'''))

    def images(self):
        "How many there are below cells; all of them are shown"
        found = self.page.locator(self.cells).locator('.jp-OutputArea img')
        broken = found.evaluate_all('all => all.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)')
        assert not broken
        return found.count()

    def ask(self):
        "What the last cell prints when it is run again, by the keyboard"
        last = self.page.locator(self.cells).last
        prompt = last.locator('.jp-InputPrompt').inner_text()
        last.locator('.cm-content').click()
        self.page.keyboard.press('Control+Enter')
        sync_api.expect(last.locator('.jp-InputPrompt')).not_to_have_text(re.compile(rf'{re.escape(prompt)}|\*'))
        return dict(zip(shown, json.loads(last.locator('.jp-OutputArea-output').inner_text())))


class Shown:
    "A widget of relvit, as it is seen"
    def __init__(self, bench, n): # it is the output of cell n
        self.bench, self.page, self.area = bench, bench.page, bench.page.locator(bench.cells).nth(n)
        self.img = self.area.locator('.relvit-picture img')

    def png(self): # its hash
        digest = "crypto.subtle.digest('SHA-256', await (await fetch(i.src)).arrayBuffer())"
        return self.img.evaluate(f'async i => new Uint8Array(await {digest}).join()')

    @contextmanager
    def changes(self):
        "There is another picture after this block"
        old, src = self.png(), self.img.get_attribute('src')
        yield
        sync_api.expect(self.img).not_to_have_attribute('src', src)
        assert self.png() != old

    def point(self, cell, row, col):
        "The middle of a cell on the screen, where Python says it lies"
        left, top, w, h, rows, cols = cell[1:]
        self.img.scroll_into_view_if_needed()
        at = self.img.bounding_box()
        return at['x'] + at['width']*(left + w*(col + .5)/cols), at['y'] + at['height']*(top + h*(row + .5)/rows)

    def slide(self, n): # n-th slider from the left
        handle = self.area.get_by_role('slider').nth(n)
        handle.focus()
        self.page.keyboard.press('ArrowRight')

    def patch(self): return int(self.area.get_by_role('spinbutton', name=re.compile('^(patch|point)$')).input_value())


@pytest.fixture(scope='module')
def browser(lab):
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=flags.split())
        def page():
            page = browser.new_page(viewport=dict(width=1280, height=900))
            page.set_default_timeout(10_000)
            return Bench(page, lab)
        yield page
        browser.close()


@pytest.fixture(scope='module')
def in_full(browser, request):
    "Tutorials that were asked for run from the beginning, while the other tests click"
    wanted = [i.callspec.params['path'] for i in request.session.items if i.name.startswith('test_a_tutorial_runs')]
    running = {path: browser() for path in wanted}
    for path, b in running.items():
        b.open(path)
        b.start()
    return running


@pytest.fixture(scope='module')
def window(browser, in_full): return browser()


@pytest.fixture
def bench(window):
    "Whatever a test does, Lab's console is silent, no request fails, and none goes elsewhere"
    yield window
    wrong, window.wrong[:] = window.wrong[:], []
    assert not wrong


@pytest.fixture(scope='module')
def widgets(window):
    window.open('made/widgets.ipynb')
    window.start()
    failed = window.errors(90)
    assert not failed, failed
    return SimpleNamespace(**{k: Shown(window, n) for n, k in enumerate(shown, 1)})


def orange(shot):
    "The rectangle (left, top, right, bottom) around what has the colour of a chosen patch"
    off = np.abs(np.asarray(shot)[..., :3].astype(int) - [245, 133, 24]).max(-1)
    rows, cols = np.nonzero(off < 50)
    return cols.min(), rows.min(), cols.max() + 1, rows.max() + 1


def test_all_pictures_are_there(bench, widgets):
    for name, w in vars(widgets).items():
        assert w.img.evaluate('i => i.complete && i.naturalWidth') > 300, name
        assert w.img.get_attribute('alt') and w.area.locator('.relvit-picture').get_attribute('aria-label'), name


def test_a_click_chooses_the_patch_below_the_mouse(bench, widgets):
    "In the picture, in the controls and in the kernel; and the frame is drawn around the very place"
    w = widgets.relations
    _, cells = bench.ask()['relations']
    x, y = w.point(cells[0], 1, 4)
    with w.changes(): w.page.mouse.click(x, y)
    hover = w.area.locator('.hover').bounding_box()
    assert hover['x'] < x < hover['x'] + hover['width'] and hover['y'] < y < hover['y'] + hover['height']
    w.page.mouse.move(5, 5)
    sync_api.expect(w.area.locator('.hover')).to_be_hidden()
    assert w.patch() == 10
    at = w.img.bounding_box()
    shot = Image.open(io.BytesIO(w.page.screenshot(clip=at))).crop((0, 0, int(at['width']*.24), int(at['height']/2)))
    left, top, right, bottom = orange(shot)
    assert abs((left + right)/2 - (x - at['x'])) < 2.5 and abs((top + bottom)/2 - (y - at['y'])) < 2.5
    assert abs(right - left - hover['width']) < 6 and abs(bottom - top - hover['height']) < 6
    assert bench.ask()['relations'][0]['patch'] == 10


def test_a_column_of_a_matrix_is_a_patch(bench, widgets):
    w = widgets.relations
    cells = bench.ask()['relations'][1]
    with w.changes(): w.page.mouse.click(*w.point(next(c for c in cells if c[0] == 'column'), 30, 3))
    assert w.patch() == 3


def test_keys_walk_from_patch_to_patch(bench, widgets):
    "By Tab from the last control; at the border nothing happens, and Lab takes none of the keys"
    w = widgets.relations
    field = w.area.get_by_role('spinbutton', name='patch')
    with w.changes():
        field.fill('28')
        field.press('Enter')
    w.page.keyboard.press('Tab')
    sync_api.expect(w.area.locator('.relvit-picture')).to_be_focused()
    for key, patch in dict(ArrowRight=29, ArrowUp=23, ArrowLeft=22, ArrowDown=28).items():
        with w.changes(): w.page.keyboard.press(key)
        assert w.patch() == patch, key
    with w.changes(): w.page.keyboard.press('ArrowDown')
    w.page.keyboard.press('ArrowDown')
    assert bench.ask()['relations'][0]['patch'] == 34


def test_a_slider_shows_another_image(bench, widgets):
    w = widgets.relations
    with w.changes(): w.slide(0)
    assert bench.ask()['relations'][0]['image'] == 1
    with w.changes(): w.area.get_by_label('task').select_option('positions')
    with w.changes(): w.area.get_by_label('task').select_option('relations')


@pytest.mark.parametrize('name, kind, row, col, patch, below', [
    ('playground', 'slot', 2, 3, 15, 21), ('attention', 'patch', 1, 2, 8, 14), ('jigsaw', 'patch', 0, 5, 5, 11),
    ('methods', '4x4', 2, 3, 23, 29), ('positives', 'patch', 1, 2, 8, 14), ('self_relations', 'photo', 0, 0, 0, 5)])
def test_every_widget_hears(name, kind, row, col, patch, below, bench, widgets):
    "A click, an arrow key and its first slider"
    w, cells = getattr(widgets, name), bench.ask()[name][1]
    with w.changes(): w.page.mouse.click(*w.point(next(c for c in cells if c[0] == kind), row, col))
    assert w.patch() == patch
    with w.changes(): w.page.keyboard.press('ArrowDown')
    with w.changes(): w.slide(0)
    state = bench.ask()[name][0]
    assert (state.get('patch', state.get('point')), state['image']) == (below, 1)


@pytest.mark.parametrize('path', tutorials, ids=[p.stem for p in tutorials])
def test_a_tutorial_opens(path, bench):
    bench.open(path)
    nb, cells = nbformat.read(bench.lab.nbs/path, 4), bench.page.locator(bench.cells)
    sync_api.expect(cells).to_have_count(len(nb.cells))
    sync_api.expect(cells.locator('h1')).to_contain_text(re.match('# (.*)', nb.cells[0].source)[1])
    assert bench.images() >= stored_images(nb)


@pytest.mark.parametrize('path', run_here, ids=[p.stem for p in run_here])
def test_a_tutorial_runs_from_top_to_bottom(path, in_full):
    bench = in_full[path]
    failed = bench.errors(600)
    assert not failed, failed
    cells = bench.page.locator(bench.cells)
    w = Shown(bench, cells.evaluate_all("all => all.findIndex(c => c.querySelector('.relvit-picture'))"))
    w.area.locator('.relvit-picture').focus()
    with w.changes(): w.page.keyboard.press('ArrowLeft')
    assert bench.images() >= stored_images(nbformat.read(bench.lab.nbs/path, 4)) > 0 and not bench.wrong
