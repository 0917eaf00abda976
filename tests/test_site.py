"""The documentation site as `make docs` builds it: whole, closed in itself, and looked at in a browser."""
import ast, functools, os, re, shutil, subprocess, sys, tempfile, threading
from configparser import ConfigParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

pytest.importorskip('smalldocs', reason='smalldocs needs Python 3.11')

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (n.relative_to(root/'nbs') for n in (root/'nbs').rglob('*.ipynb'))
                   if not re.search(r'/[._]', f'/{p.as_posix()}'))
chromium = shutil.which('chromium') or '/usr/bin/chromium'
flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking ' \
        '--disable-component-update --disable-sync'


def page_of(notebook): return notebook.with_name(re.sub(r'^\d+_', '', notebook.stem) + '.html').as_posix()


def state(): return subprocess.run(['git', 'status', '--porcelain'], cwd=root, capture_output=True, text=True).stdout


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the site, built as `make docs` does"
    out, before = tmp_path_factory.mktemp('docs')/'site', state()
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} # with it nbdev builds no index
    command = [sys.executable, '-W', 'ignore', root/'tools/site.py', out]
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert state() == before, 'building the docs changed the working tree'
    return out


@pytest.fixture(scope='module')
def pages(site):
    "Path in the site -> parsed page"
    parse = lambda p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
    return {p.relative_to(site).as_posix(): parse(p) for p in site.rglob('*.html')}


# what must be there

def test_every_notebook_has_a_page_that_leads_to_it(site, pages):
    settings = ConfigParser()
    settings.read(root/'settings.ini')
    settings = settings['DEFAULT']
    assert {page_of(n) for n in notebooks} == set(pages)
    for n in notebooks:
        links = {a['href'] for a in pages[page_of(n)].select('main a[href]')}
        assert {f"{settings['git_url']}/blob/{settings['branch']}/nbs/{n.as_posix()}", n.name} <= links, n
        assert (site/n).read_bytes() == (root/'nbs'/n).read_bytes()


def test_every_page_is_in_the_sidebar(pages):
    links = pages['index.html'].select('.sidebar-menu-container a.sidebar-link[href]')
    missing = set(pages) - {a['href'].removeprefix('./') for a in links}
    assert not missing


def public():
    "Module, name of everything in `__all__` that is defined with def or class"
    for path in sorted((root/'relvit').glob('[!_]*.py')):
        body = ast.parse(path.read_text(encoding='utf-8')).body
        names = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__']
        defined = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        yield from ((path.stem, n) for n in defined if n in ast.literal_eval(names[0]))


def test_everything_public_is_documented(pages):
    "Under a heading of its name: its signature, with a link to its source"
    for module, name in public():
        heading = pages[f'{module}.html'].find('h3', string=name)
        assert heading, f'{module}.{name}'
        assert name in heading.find_next(class_='signature').get_text(), f'{module}.{name}'
        assert re.search(rf'/{module}\.py\b', heading.find_previous('a', string='source')['href']), f'{module}.{name}'


def test_docments_are_shown(pages):
    "Of a function, a class, and of a dataclass, for which fastcore finds none by itself"
    for page, remark in dict(patches='# (b,c,H,W) images', tokens='# side in pixels of what one token covers',
                             training='# passes over the training images').items():
        assert remark in ' '.join(s.get_text() for s in pages[f'{page}.html'].select('.signature')), page


def test_maths_needs_no_script(pages):
    assert pages['relations.html'].find('math', display='block') and pages['losses.html'].find('math', display='inline')
    said = lambda page: ''.join(s for s in page.strings if not s.find_parent(['pre', 'code'])) # code may hold regular expressions
    assert [name for name, p in pages.items() if re.search(r'\\\(|\\\[|\$\$', said(p))] == []


# closed in itself

def dead_links(pages, site):
    "Links to files or anchors of the site that are not there"
    anchors = {name: {t['id'] for t in page.find_all(id=True)} for name, page in pages.items()}
    for name, page in pages.items():
        for url in (t.get('href') or t.get('src') for t in page.select('[href], [src]')):
            path, anchor = (unquote(s) for s in (url.partition('#')[::2]))
            if urlsplit(url).scheme: continue
            target = urljoin(name, path) if path else name
            there = (site/target).is_file() and (not anchor or anchor in anchors.get(target, [anchor]))
            if not there: yield name, url


def foreign(page):
    "What a page would fetch from elsewhere"
    loaded = [t.get(k, '') for k in ('src', 'srcset', 'poster', 'data') for t in page.select(f'[{k}]')]
    loaded += [t['href'] for t in page.select('link[href], use[href], image[href]')]
    loaded += [u for t in [*page.find_all('style'), *page.select('[style]')] for u in urls(t.get('style') or t.text)]
    return [u for u in loaded if re.match(r'(https?:)?//', u)]


def urls(css): return [a or b for a, b in re.findall(r'url\(\s*["\']?([^"\')]+)|@import\s+["\']([^"\']+)', css)]


def test_links_lead_somewhere(pages, site):
    dead = list(dead_links(pages, site))
    assert not dead


def test_nothing_comes_from_elsewhere(pages, site):
    sheet = lambda p: BeautifulSoup(f'<style>{p.read_text(encoding="utf-8")}</style>', 'html.parser')
    sheets = {p.name: sheet(p) for p in site.rglob('*.css')}
    found = {name: foreign(page) for name, page in (pages | sheets).items()}
    assert len(sheets) > 2 and not {k: v for k, v in found.items() if v}


def test_no_page_names_the_machine_it_was_built_on(site):
    for p in [*site.rglob('*.html'), *site.glob('*.json'), *site.glob('*.xml')]:
        text = p.read_text(encoding='utf-8')
        assert str(root) not in text and not re.search(re.escape(tempfile.gettempdir()) + r'/tmp\w{6}', text), p.name


def test_defects_are_found(tmp_path):
    for name in 'ab': (tmp_path/f'{name}.html').touch()
    html = '<p id=here><a href="#here">1</a><a href="b.html">2</a><a href="https://example.org">3</a><img src="data:,">'
    parse = lambda s: BeautifulSoup(s, 'html.parser')
    other = parse('<p id=there>')
    assert not list(dead_links({'a.html': parse(html), 'b.html': other}, tmp_path)) and not foreign(parse(html))
    for bad in '<a href="#gone">', '<a href="b.html#gone">', '<img src="gone.png">', '<a href="gone.html">':
        assert len(list(dead_links({'a.html': parse(html + bad), 'b.html': other}, tmp_path))) == 1, bad
    for bad in ('<script src="//example.org/x.js">', '<link href="https://example.org/x.css" rel=stylesheet>',
                '<img src="https://example.org/x.png">', '<style>@import "https://example.org/x"</style>',
                '<p style="background: url(https://example.org/x)">'):
        assert len(foreign(parse(html + bad))) == 1, bad


# in a browser

@pytest.fixture(scope='module')
def browser():
    if not Path(chromium).exists(): pytest.skip('apt-get install chromium')
    sync_api = pytest.importorskip('playwright.sync_api')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=flags.split())
        yield b
        b.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def serve():
    "A function that serves a folder and says where"
    servers = []
    def start(folder):
        servers.append(ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}'
    yield start
    for s in servers: s.shutdown()


def open_page(browser, address, width=1280):
    "A tab, and a list that fills with what goes wrong in it"
    tab, wrong = browser.new_page(viewport=dict(width=width, height=900)), []
    tab.on('console', lambda m: m.type == 'error' and wrong.append(m.text))
    tab.on('pageerror', lambda e: wrong.append(str(e)))
    tab.on('request', lambda r: r.url.startswith((address, 'data:')) or wrong.append(f'fetched {r.url}'))
    return tab, wrong


def look(tab, wrong, url):
    "What is wrong with a page: errors, pictures that are missing, wider than the window"
    wrong.clear()
    tab.goto(url, wait_until='load')
    missing = tab.evaluate('[...document.images].filter(i => !i.naturalWidth).map(i => "no picture " + i.alt)')
    over = tab.evaluate('document.documentElement.scrollWidth - innerWidth')
    return [*wrong, *missing, *[f'{over} px too wide']*(over > 0)]


@pytest.mark.parametrize('width', [1280, 390])
def test_pages_in_a_browser(width, pages, site, serve, browser):
    address = serve(site)
    tab, wrong = open_page(browser, address, width)
    found = {name: look(tab, wrong, f'{address}/{name}') for name in pages}
    tab.close()
    assert not {k: v for k, v in found.items() if v}


def test_something_moves_without_a_kernel(pages, site, serve, browser):
    "At least on two pages: another picture at the end of a slider than at its start"
    address, moved = serve(site), set()
    tab, wrong = open_page(browser, address)
    for name in (n for n, p in pages.items() if p.select('.cell-output input[type=range]')):
        tab.goto(f'{address}/{name}')
        for slider in tab.locator('.cell-output input[type=range]').all():
            picture = slider.locator('xpath=ancestor::*[contains(@class, "cell-output")]').locator('img').first
            slider.press('Home')
            first = picture.screenshot()
            slider.press('End')
            assert picture.screenshot() != first, name
            moved.add(name)
    tab.close()
    assert len(moved) >= 2 and not wrong


def test_search_finds_a_function(site, serve, browser):
    address = serve(site)
    tab, wrong = open_page(browser, address)
    tab.goto(f'{address}/index.html')
    tab.locator('.smalldocs-search input').first.fill('random_perms')
    tab.locator('.search-result').first.click()
    tab.wait_for_url('**/*.html#*')
    assert 'random_perms' in tab.locator('main').inner_text() and not wrong
    tab.close()


def test_what_a_browser_complains_of_is_found(tmp_path, serve, browser):
    html = '<!doctype html><link rel=icon href="data:,"><body style="margin:0">'
    cases = {'fine': '', 'error': '<script>console.error("x")</script>', 'raised': '<script>gone()</script>',
             'picture': '<img src="data:image/png;base64,AAAA">', 'wide': '<div style="width:9999px">x</div>',
             'elsewhere': '<script src="http://127.0.0.1:9/x.js"></script>'}
    for name, bad in cases.items(): (tmp_path/f'{name}.html').write_text(html + bad)
    address = serve(tmp_path)
    tab, wrong = open_page(browser, address)
    found = {name: bool(look(tab, wrong, f'{address}/{name}.html')) for name in cases}
    tab.close()
    assert found == {name: name != 'fine' for name in cases}
