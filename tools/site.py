"""Build the documentation site without Quarto: nbdev's functions process the notebooks, smalldocs renders them.

    python tools/site.py [folder]                  into _docs, or another folder
    python tools/site.py --quarto [folder]         with Quarto instead of smalldocs, where it is installed: as nbdev_docs does
    python -m http.server -b 127.0.0.1 -d _docs    to look at it, search box included
"""
import html, re, shutil, subprocess, sys, tempfile
from contextlib import chdir
from importlib import import_module
from inspect import getsource
from pathlib import Path

from fastcore import docments
from latex2mathml.converter import convert
from smalldocs import config, site

root = Path(__file__).resolve().parents[1]
emphasis = re.compile(r'^#+ .*__\w+__$|(?<=^```\n\n\*).+(?=\*$)', re.M) # dunder methods; docstrings, which nbdev slants
nothing = re.compile(r'^\*(Call self as a function|Return repr\(self\))\.\*$', re.M) # Python's words for no docstring
maths = re.compile(r'(<span class="math (inline|display)">)\\[([](.+?)\\[)\]](?=</span>)', re.S)
signature = re.compile(r'(?<=</h3>\n)(<div class="code-copy-outer-scaffold"><div class="sourceCode)'
                       r'(" id="\w+"><pre[^>]*><code[^>]*>)(<span class="kw">.+?)(?=</code>)', re.S)
linked = re.compile(r'\[`(.+?)`\]\((.+?)\)') # what nbdev makes of a name in backticks, within code too


class Site(site.Site):
    "A site whose pages have nbdev's names, whose maths is MathML, and where every page leads to its notebook"

    def read(self, src):
        "A page, `00_plots.ipynb` for `plots.html`, whose reference says what the code says"
        page = super().read(src)
        page.out = page.out.with_name(page.front.get('output-file', page.out.name))
        literal = lambda found: re.sub(r'(`.*?`)|([*_])', lambda m: m[1] or '\\' + m[2], found[0])
        page.body = emphasis.sub(literal, nothing.sub('', page.body))
        if page.out.stem != src.stem: # of a name in two modules nbdev finds the first
            page.body = re.sub(rf'(?<=/relvit/)(?!{page.out.stem}\.)\w+\.py#L\d+', f'{page.out.stem}.py', page.body)
        return page

    def find_page(self, target):
        "A page by its source or by the name of its output"
        return super().find_page(target) or next((p for p in self.pages.values() if p.out == target), None)

    def load_symbols(self):
        "Names of notebooks and modules in backticks lead to their pages; nbdev has seen to functions and classes"
        modules = {f'relvit.{p.out.stem}': f'/{src}' for src, p in self.pages.items() if p.out.stem != src.stem}
        self.symbols = modules | {name: f'/{src}' for src in self.pages for name in (src.stem, f'nbs/{src}')}

    def notebook(self, src=''):
        "Where the repository shows a notebook"
        web = self.project.website
        return '/'.join([web['repo-url'], 'blob', web['repo-branch'], web['repo-subdir'], str(src)])

    def resolve(self, href, page, record=True):
        "Links to the published site, and to notebooks in the repository, stay within this one"
        for home in self.project.website['site-url'] + '/', self.notebook(): href = href.replace(home, '/')
        return super().resolve(href, page, record)

    def render_page(self, page):
        "The page's HTML: a line that leads to its notebook, maths as MathML, signatures that wrap"
        super().render_page(page)
        body = signature.sub(lambda found: self.signature(found, page), page.html)
        body = maths.sub(lambda m: m[1] + convert(html.unescape(m[3]), display=m[2].replace('display', 'block')), body)
        shown, own = f'<a href="{self.notebook(page.src)}">nbs/{page.src}</a>', page.src.name
        page.html = f'<p class="notebook-link">Notebook: {shown} · <a href="{own}" download>download</a></p>\n{body}'
        page.env['math'] = False # it needs no script any more
        for part in page.env['search']: part['text'] = linked.sub(r'\1', part['text'])

    def signature(self, found, page):
        "A definition and its docments, each line by itself so that long ones wrap; less the types that nobody wrote"
        code = re.sub(r'>def(?=</span> <span class="fu">[A-Z])', '>class', found[3].replace(':NoneType', ''))
        code = re.sub(r'(?s)after_create<.+after_fit<.+None</span>', '**events', code) # a page of fastai's names
        code = linked.sub(lambda m: f'<a href="{self.resolve(m[2], page)}">{m[1]}</a>', code)
        return f'{found[1]} signature{found[2]}' + ''.join(f'<span class="line">{s}</span>' for s in code.split('\n'))


def dataclass_source(cls):
    "The source of a notebook's dataclass as the package has it: fastcore's docments find none in a notebook"
    from nbdev.doclinks import NbdevLookup
    module = NbdevLookup()[cls.__name__][1].removesuffix('.py').replace('/', '.')
    return getsource(getattr(import_module(module), cls.__name__))


def process(folder):
    "Fill `_proc` in a folder of settings, notebooks and package: what nbdev_docs does before it calls Quarto"
    sys.path.insert(0, str(folder))
    docments.get_dataclass_source = dataclass_source
    with chdir(folder):
        from nbdev.doclinks import _build_modidx
        from nbdev.quarto import refresh_quarto_yml
        from nbdev.serve import proc_nbs
        refresh_quarto_yml()
        _build_modidx()
        return proc_nbs('nbs', n_workers=0, force=True)


def copy_to(there):
    "What a site is made of; the working tree stays as it is"
    for f in 'settings.ini', '_quarto.yml': shutil.copy(root/f, there)
    ignored = shutil.ignore_patterns('.*', '__pycache__', 'models', 'runs')
    for f in 'nbs', 'relvit': shutil.copytree(root/f, there/f, ignore=ignored)
    return there


def quarto(out):
    "The same pages by Quarto. Nothing is executed: outputs are those of the notebooks"
    if not shutil.which('quarto'): sys.exit('Quarto is not installed: https://quarto.org/docs/get-started; `make docs` does without')
    with tempfile.TemporaryDirectory() as name:
        made = process(copy_to(Path(name)))
        subprocess.run(['quarto', 'render', '--no-execute'], cwd=made, check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(made/'_docs', out)


def build(out):
    "Build the site"
    with tempfile.TemporaryDirectory() as name:
        there = copy_to(Path(name))
        project = config.load(process(there))
        project.config['project']['output-dir'] = str(out)
        made = Site(project)
        made.build()
        for src in made.pages: shutil.copy(there/'nbs'/src, out/src)
    return made


if __name__ == '__main__':
    if '--quarto' in sys.argv:
        sys.argv.remove('--quarto')
        sys.exit(quarto(Path(*sys.argv[1:] or [root/'_docs']).resolve()))
    made = build(Path(*sys.argv[1:] or [root/'_docs']).resolve())
    print(f'{len(made.pages)} pages in {made.out.name}/')
    sys.exit('\n'.join(f'{src}: {href} leads nowhere' for src, href in made.broken) or None)
