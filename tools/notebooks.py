"""Keep the notebooks fit to be committed.

    python tools/notebooks.py run [nbs/01_patches.ipynb ...]   execute in place, keep light outputs, export the package
    python tools/notebooks.py readme                           make README.md from nbs/index.ipynb
    python tools/notebooks.py imported [nbs/01_patches.ipynb ...]   run each against the package: nothing is written, nbdev is not needed
"""
import json, multiprocessing, os, re, sys, symtable, time, traceback
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def pages(): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def light(output):
    "Drop what only lives in a session: stderr (it holds paths of one machine) and widget views"
    if output.output_type == 'stream': return output if output.name == 'stdout' else None
    if 'data' in output: output.data.pop('application/vnd.jupyter.widget-view+json', None)
    return output if output.get('data', True) else None


def run(path):
    "Execute one notebook where it lies and strip it to what a reader needs"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in map(light, cell.outputs) if o is not None]
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)


def readme():
    "README.md is the page nbs/index.ipynb: its text and what its visible cells show"
    import nbformat
    nb, out = nbformat.read(root/'nbs/index.ipynb', 4), []
    for cell in nb.cells:
        if cell.cell_type == 'markdown': out.append(cell.source.replace('](images/', '](nbs/images/'))
        elif cell.cell_type == 'code':
            asked = set(re.findall(r'^#\|\s*(.+?)\s*$', cell.source, re.M))
            source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
            if not asked & {'hide', 'echo: false'}: out.append(f'```python\n{source}\n```')
            for o in [] if asked & {'hide', 'output: false'} else cell.outputs:
                data = o.get('data', {})
                if 'text/markdown' in data: out.append(data['text/markdown'])
                elif 'text/plain' in data or o.output_type == 'stream':
                    out.append('```\n' + (data.get('text/plain') or o.text).rstrip() + '\n```')
    return '\n\n'.join(s.strip() for s in out) + '\n'


# a notebook as a test: each in a process of its own, forked from a server that has imported the heavy libraries once
# (but not fastai, which changes torch.Tensor)
heavy = ['torch', 'torchvision', 'timm', 'matplotlib.pyplot', 'sklearn.datasets', 'IPython.core.interactiveshell']
minutes = 15


def flags():
    "Directives whose cells are no tests"
    settings = ConfigParser()
    settings.read(root/'settings.ini')
    return settings['DEFAULT']['tst_flags'].split()


def server(*modules):
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload([*heavy, *modules])
    return ctx


def _send(pipe, how, *args): pipe.send(how(*args))


def run_apart(ctx, how, *args, minutes=minutes):
    "`how(*args)`, whether a notebook passes and what it said, in a process of its own. No pool's worker: those may have no children, as a DataLoader's are"
    here, there = ctx.Pipe(duplex=False)
    process = ctx.Process(target=_send, args=(there, how, *args))
    process.start()
    there.close()
    try: return here.recv() if here.poll(60*minutes) else (False, f'still running after {minutes} minutes')
    except EOFError:
        process.join()
        return False, f'the process died with exit code {process.exitcode}'
    finally:
        if process.is_alive(): process.join(5)
        process.kill()


def directives(source):
    "What the first lines of a cell ask: {'eval': 'false', 'export': ''}"
    top = re.match(r'(?:[ \t]*(?:#[ \t]*\|.*)?(?:\n|$))*', source)[0]
    return dict(re.findall(r'^[ \t]*#[ \t]*\|[ \t]*([\w-]+)[ \t]*:?[ \t]*(.*?)[ \t]*$', top, re.M))


def bound(source): return {s.get_name() for s in symtable.symtable(source, 'cell', 'exec').get_symbols() if s.is_assigned() or s.is_imported()}


def imported(path, skip):
    "Run a notebook against the package: an export cell only imports, from the exported module, what it would define"
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from traitlets.config import Config
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    said = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'raw')
    if re.search(r'^skip_exec:\s*(true|yes|on|1)\s*$', said, re.M | re.I): return True, ''
    sys.path.insert(0, str(root))
    os.chdir(path.parent)
    shell, module = InteractiveShell.instance(config=Config(HistoryManager=dict(enabled=False))), None
    shell.enable_gui = lambda gui=None: None
    shell.enable_matplotlib('inline')
    unshown = []
    shell.showtraceback = lambda exc=None, **_: unshown.append((exc or sys.exc_info())[1]) # IPython lets a cell pass whose value has a broken repr
    for cell in cells:
        source = ''.join(cell['source'])
        asked = directives(source) if cell['cell_type'] == 'code' else {'eval': 'false'}
        if 'default_exp' in asked: module = f'relvit.{asked["default_exp"]}'
        if asked.get('eval', '').lower() == 'false' or set(skip) & asked.keys() or 'nbdev_export(' in source: continue
        if asked.keys() & {'export', 'exporti', 'exports'}:
            try: have = vars(import_module(module))
            except Exception: return False, traceback.format_exc()
            shell.push({n: have[n] for n in bound(source) if n in have})
            continue
        with capture_output(): # reprs are made, as for a reader
            ran = shell.run_cell(source)
        if e := ran.error_before_exec or ran.error_in_exec or (unshown and unshown[0]): return False, ''.join(traceback.format_exception(e))
    return True, ''


if __name__ == '__main__':
    what, *names = sys.argv[1:] or ['']
    sys.argv = sys.argv[:1] # nbdev's functions would read the rest
    os.environ.pop('MPLBACKEND', None) # or the kernels show no figure
    if what == 'run':
        from nbdev.clean import nbdev_clean
        from nbdev.export import nb_export
        from nbdev.doclinks import nbdev_export
        for path in [Path(n).resolve() for n in names] or pages():
            print(path.relative_to(root), flush=True)
            nb_export(path, lib_path=root/'relvit')
            run(path)
        nbdev_clean()
        nbdev_export()
    elif what == 'imported':
        failed, ctx, skip = [], server(), flags()
        for path in [Path(n).resolve() for n in names] or pages():
            start = time.perf_counter()
            passed, err = run_apart(ctx, imported, path, skip)
            print(f'{path.relative_to(root)} {"passed" if passed else "FAILED"} {time.perf_counter() - start:.1f} s', flush=True)
            if not passed: failed.append(print(err))
        sys.exit(f'{len(failed)} failed' if failed else 0)
    elif what == 'readme': (root/'README.md').write_text(readme(), encoding='utf-8')
    else: sys.exit(__doc__)
