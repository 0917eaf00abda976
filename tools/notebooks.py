"""Keep the notebooks fit to be committed.

    python tools/notebooks.py run [nbs/01_patches.ipynb ...]   execute in place, keep light outputs, export the package
    python tools/notebooks.py readme                           make README.md from nbs/index.ipynb
"""
import os, re, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

root = Path(__file__).resolve().parents[1]


def pages(): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def light(output):
    "Drop what only lives in a session: stderr (it holds paths of one machine) and widget views"
    if output.output_type == 'stream': return output if output.name == 'stdout' else None
    if 'data' in output: output.data.pop('application/vnd.jupyter.widget-view+json', None)
    return output if output.get('data', True) else None


def run(path):
    "Execute one notebook where it lies and strip it to what a reader needs"
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in map(light, cell.outputs) if o is not None]
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)


def readme():
    "README.md is the page nbs/index.ipynb: its text and what its visible cells show"
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
    elif what == 'readme': (root/'README.md').write_text(readme(), encoding='utf-8')
    else: sys.exit(__doc__)
