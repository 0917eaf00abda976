"""Mutation testing of floors 0 to 2: is a small mistake in a module noticed by its notebook or by a test?

    python tools/mutants.py results/mutants.json [--size 30] [--seed 0] [module ...]   a random sample of each module's mutants
    python tools/mutants.py results/mutants.json --again                               those that lived there, once more

The mistakes are mutmut's own operators and a few of ours; mutmut's runner leaves out every decorated function (so each `@patch`
and each property) and what a module does at import. So a mutant is a changed file in a copy of the tree, and each is judged in processes
forked from one that has torch imported: by the tests that ran its lines (`make coverage` recorded which), the quickest first,
and by its own notebook in the second mode. Left alone are annotations, docstrings, imports and what an error says.
"""
import argparse, ast, compileall, json, multiprocessing, os, random, re, shutil, sys, time
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import libcst as cst
from coverage import Coverage
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

import covered, notebooks

root = Path(__file__).resolve().parents[1]
tree = root/'runs/mutants/tree'
floors = sorted((root/'nbs').glob('[012]?_*.ipynb'))
slow, enough = 6, 25 # seconds: no test that takes longer; in all for one mutant, its notebook apart
swaps = ['min max', 'amin amax', 'argmin argmax', 'floor ceil', 'any all', 'sin cos', 'zeros ones', 'mean sum']
swaps = {a: b for pair in map(str.split, swaps) for a, b in (pair, pair[::-1])}


def swap_name(node):
    "Another of its kind: `max` for `min`"
    if node.value in swaps: yield node.with_changes(value=swaps[node.value])


def swap_arguments(node):
    "The first two positional arguments change places"
    if len(node.args) > 1 and not any(a.keyword or a.star for a in node.args[:2]):
        (a, b), rest = node.args[:2], node.args[2:]
        yield node.with_changes(args=[a.with_changes(value=b.value), b.with_changes(value=a.value), *rest])


def return_none(node):
    if node.value: yield node.with_changes(value=cst.Name('None'))


operators = [*mutation_operators, (cst.Name, swap_name), (cst.Call, swap_arguments), (cst.Return, return_none)]


def blunt(place):
    "What breaks at once, None for a value or a lost argument, is the last to be tried on its line"
    _, _, node, new = place
    lost = isinstance(node, cst.Call) and isinstance(new, cst.Call) and len(new.args) < len(node.args)
    return lost or cst.Module([]).code_for_node(new).count('None') > cst.Module([]).code_for_node(node).count('None')


class Places(cst.CSTVisitor):
    "Every change of every node: (lines of its statement, lines of its function, node, new node)"
    METADATA_DEPENDENCIES = (PositionProvider,)
    def __init__(self): self.found, self.around = [], []

    def lines(self, node):
        at = self.get_metadata(PositionProvider, node)
        return set(range(at.start.line, at.end.line + 1))

    def on_visit(self, node):
        text = isinstance(node, cst.Expr) and isinstance(node.value, (cst.SimpleString, cst.ConcatenatedString))
        listed = isinstance(node, cst.Assign) and getattr(node.targets[0].target, 'value', '') == '__all__'
        if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom, cst.Raise)) or text or listed: return False
        if isinstance(node, (cst.FunctionDef, cst.SimpleStatementLine)): self.around.append(node)
        if self.around and not isinstance(node, cst.Module):
            function = next((n for n in self.around if isinstance(n, cst.FunctionDef)), None)
            statement = self.around[-1] if isinstance(self.around[-1], cst.SimpleStatementLine) else node
            for kind, change in operators:
                if isinstance(node, kind):
                    for new in change(node): self.found.append((self.lines(statement), self.lines(function) if function else set(), node, new))
        return True

    def on_leave(self, node):
        if self.around and node is self.around[-1]: self.around.pop()


def changed(old, new):
    "The lines that differ, as they were and as they are"
    a, b = old.splitlines(), new.splitlines()
    while a and b and a[-1] == b[-1]: a.pop(), b.pop()
    first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return first + 1, ' '.join(s.strip() for s in a[first:]), ' '.join(s.strip() for s in b[first:])


def mutants(source, rng):
    "All mutants of a module in random order, lines taken in turn; each only when it is asked for"
    wrapper = MetadataWrapper(cst.parse_module(source))
    places = Places()
    wrapper.visit(places)
    by_line = {}
    for p in places.found: by_line.setdefault(min(p[0]), []).append(p)
    for ps in by_line.values(): rng.shuffle(ps), ps.sort(key=blunt)
    order = list(by_line)
    rng.shuffle(order)
    for turn in range(max(map(len, by_line.values()))):
        for i in order:
            if turn >= len(by_line[i]): continue
            lines, function, node, new = by_line[i][turn]
            code = wrapper.module.deep_replace(node, new).code
            try: compile(code, 'mutant', 'exec')
            except SyntaxError: continue
            if ast.dump(ast.parse(code)) != ast.dump(ast.parse(source)):
                line, before, after = changed(source, code)
                yield dict(line=line, before=before, after=after), lines, function, code


def costs():
    "Seconds of each test, as `make coverage` took them"
    cases = ElementTree.parse(covered.folder/'tests.xml').iter('testcase')
    return {f'{c.get("classname").replace(".", "/")}.py::{c.get("name")}': float(c.get('time')) for c in cases}


def killers(module, took):
    "A function: tests that ran one of the lines, or else one of the function's or of the module's; of files that name it, and quick ones first"
    cov = Coverage(data_file=covered.folder/'tests.data', config_file=covered.settings('tests'))
    cov.load()
    ran = cov.get_data().contexts_by_lineno(str(root/f'relvit/{module}.py'))
    about = {f'tests/{p.name}' for p in (root/'tests').glob('test_*.py') if re.search(rf'\brelvit\.{module}\b', p.read_text())}
    def of(lines, function):
        for some in lines, function, ran:
            seen = {t for i in some for t in ran.get(i, ()) if took.get(t, slow) < slow}
            if seen: break
        out, total = [], 0
        for t in sorted(seen, key=lambda t: (t.split('::')[0] not in about, took[t])):
            total += took[t]
            if out and total > enough: break
            out.append(t)
        return out
    return of


def judge(ids):
    "Run tests in the copied tree up to the first that fails: whether all pass, and which failed"
    import pytest
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    failed = []
    class Watch:
        def pytest_runtest_logreport(self, report): failed.extend([report.nodeid]*report.failed)
        def pytest_collectreport(self, report): failed.extend([report.nodeid]*report.failed)
    code = pytest.main([*ids, '-x', '-q', '-p', 'no:cacheprovider', '-c', 'pytest.ini', '--rootdir', '.'], plugins=[Watch()])
    return code == 0, failed[0] if failed else f'pytest ended with {code}'


def page(path):
    notebooks.root = tree
    return notebooks.imported(path, notebooks.flags())


def provenance():
    from relvit.runs import provenance
    return provenance()


class Court:
    "Kills mutants. What fails on the module as it is kills nothing"
    def __init__(self):
        shutil.rmtree(tree, ignore_errors=True)
        for name in ('relvit', 'nbs', 'tests', 'tools', 'demo', 'results'):
            if (root/name).exists(): shutil.copytree(root/name, tree/name, ignore=shutil.ignore_patterns('runs', '.ipynb_checkpoints', '__pycache__'))
        for f in [*root.glob('*.*'), root/'Makefile', root/'LICENSE']:
            if f.is_file(): shutil.copy(f, tree)
        os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE='1')
        sys.dont_write_bytecode = True # or a changed file of the same size and second is taken for the old one
        compileall.compile_dir(tree/'relvit', quiet=1)
        for name in [*notebooks.heavy, 'fastai.vision.all', 'hypothesis', 'pytest']: import_module(name) # and nothing of relvit
        self.fork, self.fair = multiprocessing.get_context('fork'), {}

    def passes(self, how, what, seconds): return notebooks.run_apart(self.fork, how, what, minutes=seconds/60)

    def unmutated(self, how, what):
        if str(what) not in self.fair: self.fair[str(what)] = self.passes(how, what, 300)[0]
        return self.fair[str(what)]

    def killer(self, module, code, ids, path, quick):
        "The test or the page that notices `code` in place of the module, or None"
        file = tree/f'relvit/{module}.py'
        old = file.read_text()
        for pyc in (tree/'relvit/__pycache__').glob(f'{module}.*'): pyc.unlink()
        turns = [(judge, ids, 60 + 3*enough)]*bool(ids)
        turns.insert(0 if quick else len(turns), (page, tree/path.relative_to(root), 120))
        for how, what, seconds in turns:
            while what:
                file.write_text(code)
                ok, said = self.passes(how, what, seconds)
                file.write_text(old)
                if ok: break
                name = said if how is judge and '::' in said else path.name if how is page else None
                if how is judge and not name: # out of time, or a module that does not import
                    if self.unmutated(judge, what): return said
                    raise RuntimeError(f'these do not pass as they are: {what}')
                if self.unmutated(how, [name] if how is judge else what): return name
                print(f'  {name} does not pass as it is', flush=True)
                if how is page: break
                what = [i for i in what if i != name]
        return None


def record(out, court, modules, **said):
    "Counts, and each mutant that lived at first: `killer`, what was written since, or `why` nothing was, by hand"
    modules = dict(sorted(modules.items(), key=lambda m: [re.sub(r'^\d+_', '', p.stem) for p in floors].index(m[0])))
    counts = {name: dict(tried=m['tried'], lived_at_first=len(m['lived']), lives=sum(not x.get('killer') for x in m['lived'])) for name, m in modules.items()}
    tried, first, now = (sum(c[k] for c in counts.values()) for k in ('tried', 'lived_at_first', 'lives'))
    same = sum(x.get('why', '').startswith('equivalent') for m in modules.values() for x in m['lived'])
    killed = {k: round(100 - 100*n/tried, 1) for k, n in dict(killed_at_first=first, killed=now, killed_or_equivalent=now - same).items()}
    out.write_text(json.dumps(dict(provenance=notebooks.run_apart(court.fork, provenance), **said, tried=tried, percent=killed, modules=counts,
                                   lived=[x for m in modules.values() for x in m['lived']]), indent=1) + '\n')
    return killed


def main(out, modules, size, seed, again):
    start, court, took = time.time(), Court(), costs()
    known = json.loads(out.read_text()) if out.exists() else dict(modules={}, lived=[])
    pages = {re.sub(r'^\d+_', '', p.stem): p for p in floors}
    old = {name: dict(tried=m['tried'], lived=[x for x in known['lived'] if x['module'] == name]) for name, m in known['modules'].items()}
    for module in modules or (old if again else pages):
        path, source, begun = pages[module], (root/f'relvit/{module}.py').read_text(), time.time()
        court.unmutated(page, tree/path.relative_to(root))
        quick, tests = time.time() - begun < 4, killers(module, took)
        was = {(m['before'], m['after']): m for m in old.get(module, dict(lived=[]))['lived']}
        tried, lived = 0, []
        for m, lines, function, code in mutants(source, random.Random(f'{seed} {module}')):
            before = was.pop((m['before'], m['after']), {})
            if again and not before: continue
            if not again and tried == size: break
            tried += 1
            killer = court.killer(module, code, tests(lines, function), path, quick)
            if killer and not again: continue
            lived.append(dict(module=module, **m, **(dict(killer=killer) if killer else dict(why=before.get('why', '')))))
            if not killer: print(f'  lives: {module}.py:{m["line"]}\n    - {m["before"]}\n    + {m["after"]}', flush=True)
            if again and not was: break
        n = old[module]['tried'] if again else tried
        old[module] = dict(tried=n, lived=sorted([*lived, *(was.values() if again else ())], key=lambda m: m['line']))
        print(f'{module:12} {n - sum(not m.get("killer") for m in old[module]["lived"])} of {n} killed, {time.time() - begun:.0f} s', flush=True)
        killed = record(out, court, old, seed=seed)
    print(f'{killed["killed"]} % killed, {(time.time() - start)/60:.0f} minutes')


if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('out', type=Path)
    a.add_argument('modules', nargs='*')
    a.add_argument('--size', type=int, default=30, help='mutants of a module')
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--again', action='store_true', help='only those that lived')
    main(**vars(a.parse_args()))
