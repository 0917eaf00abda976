"Kills, full disks and folders that nobody may write into: what is whole stays whole, the error says what helps, and the run goes on to the bit."
import ctypes, json, os, resource, shutil, signal, subprocess, sys, tempfile
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest
from fastai.callback.core import Callback

from relvit.checkpoint import Unwritten, append, export_timm, sweep, write_whole
from relvit.runs import RecordRun, Run, list_runs
from relvit.training import Pretrain, load_model, make_learner

from stopped import StopAt, quietly
from torture import differences

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits, mounts and /proc are those of Linux')
tiny = dict(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=1', 'num_heads=2'), bs=32, epochs=3, steps=4, device='cpu', every=1e9)


def test_killed_and_gone_on(tmp_path):
    "A few moments of `make torture`, in a process that forks: see tests/torture.py"
    some = 'half of last.safetensors', 'after moving best.safetensors', 'before any state: half of metrics.jsonl'
    p = subprocess.run([sys.executable, '-W', 'ignore', Path(__file__).with_name('torture.py'), '--random', '1', '--chains', '1', '--commands', '0', '--only', *some,
                        '--record', tmp_path/'r.json'], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stdout + p.stderr
    r = json.loads((tmp_path/'r.json').read_text())
    assert r['same'] == r['runs'] == 2*(len(some) + 2) and r['kills'] >= r['runs'] - 1


@pytest.fixture(scope='module')
def home():
    "A folder that any user may enter, with a run that nobody disturbed and one that was cut"
    with tempfile.TemporaryDirectory() as there:
        for name in 'whole', 'cut': quietly(Pretrain(**tiny, out=there, name=name), cbs=[StopAt(1, 1)] if name == 'cut' else None)
        yield Path(there)


def cut(home, there): return Run(shutil.copytree(home/'cut', there)) # to be done with as one likes


def relvit(*lines):
    "Lines of the command, one after the other in a process without root's powers; code, stdout and stderr of each. A number in front limits the size of files"
    script = ("import contextlib, io, json, resource, sys; from relvit.cli import main\n"
              "for limit, *line in json.loads(sys.argv[1]):\n"
              "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
              "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err: code = main(line)\n"
              "    print(json.dumps([code, out.getvalue(), err.getvalue()]))")
    lines = json.dumps([[a if isinstance(a, int) else str(a) for a in line] for line in lines])
    p = subprocess.run([sys.executable, '-c', script, lines], capture_output=True, text=True, timeout=300, preexec_fn=powerless)
    assert p.returncode == 0, p.stderr
    return [json.loads(line) for line in p.stdout.splitlines()]


def powerless():
    "Root may write anywhere: not without CAP_DAC_OVERRIDE"
    if os.getuid() == 0: assert ctypes.CDLL(None).prctl(24, 1) == 0


def hidden(folder): return [f.name for f in Path(folder).rglob('.*') if f.name != '.lock']


def test_the_command_where_nothing_can_be_written(home, tmp_path):
    "No room for a state, folders that are only to be read: one line that helps; the old files are whole, nothing is left of the new, with room the run goes on"
    run, shut, done, mine = cut(home, tmp_path/'run'), cut(home, tmp_path/'mine/cut'), Run(home/'whole'), tmp_path/'mine'
    folders, whole = [mine, shut.path, shut.path/'figures', done.path], lambda *runs: {f: f.read_bytes() for r in runs for f in r.path.rglob('*.*') if f.name != 'log.txt'}
    kept = whole(run, shut, done)
    begin = ['pretrain', '--encoder', tiny['encoder'], '--encoder-args', *tiny['encoder_args'], '--bs', '32', '--epochs', '1', '--steps', '2', '--device', 'cpu', '--name', 'new', '--out']
    for f in folders: f.chmod(0o555)
    try: full, first, outside, resume, judged, export = relvit( # EFBIG is for root too
        [60_000, 'pretrain', '--resume', run.path], [60_000, *begin, tmp_path], [0, *begin, mine], [0, 'pretrain', '--resume', shut.path],
        [0, 'evaluate', done.path, '--most', '50'], [0, 'export', done.path, mine/'a.safetensors'])
    finally:
        for f in folders: f.chmod(0o755)
    assert [r[0] for r in (full, first, outside, resume, judged, export)] == [2, 2, 2, 2, 0, 2]
    full, first, outside, resume, export = (r[2] for r in (full, first, outside, resume, export))
    assert f'relvit pretrain: {run.path}/' in full and 'safetensors could not be written: File too large' in full and 'kB wanted' in full
    assert full.strip().endswith(f'Then go on with: relvit pretrain --resume {run.path}') and 'File too large' in first and 'begin anew' in first
    assert outside == f'relvit pretrain: {mine}/new could not be written: Permission denied; it takes a folder that you may write into, which {mine} is not\n'
    assert f'{shut.path} could not be written: Permission denied' in resume and f'{mine}/a.safetensors could not be written: Permission denied' in export
    assert json.loads(judged[1])['scores'] and 'told, but not kept: ' in judged[2] and 'evaluation-test-last.json could not be written: Permission denied' in judged[2]
    assert all('Traceback' not in said for said in (full, first, outside, resume, judged[2], export)) and not hidden(run.path)
    now = whole(run, shut, done)
    assert {f.name for f, was in kept.items() if now[f] != was} <= {'metrics.jsonl', 'best.safetensors'} # epoch 1 is told, its weights had room
    assert not (tmp_path/'new').exists() and not (mine/'new').exists()
    quietly(resume=run.path)
    assert not differences(home/'whole', run.path)


def test_a_full_disk(home, tmp_path):
    "A real one, where this machine lets us mount one"
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'none', disk], capture_output=True).returncode: pytest.skip('no right to mount')
    try:
        run = cut(home, disk/'run')
        was = run.last.read_bytes()
        def fill():
            with open(disk/'full', 'wb', buffering=0) as f, suppress(OSError):
                while True: f.write(b'0'*1000)
        class Fills(Callback):
            def before_batch(self): (disk/'full').exists() or fill()
        with pytest.raises(Unwritten, match=r'(?s)No space left on device .*free\); make room. Then go on with: relvit pretrain --resume'): quietly(resume=run.path, cbs=Fills())
        assert run.last.read_bytes() == was and not hidden(run.path) and len(run.metrics) <= 2
        with pytest.raises(Unwritten, match='No space left'): quietly(resume=run.path) # full from the beginning
        (disk/'full').unlink()
        quietly(resume=run.path)
        assert not differences(home/'whole', run.path)
        fill()
        with pytest.raises(Unwritten, match='weights.safetensors could not be written: No space left'): export_timm(load_model(run), disk/'weights.safetensors')
        assert not (disk/'weights.safetensors').exists() and not hidden(disk)
    finally: subprocess.run(['umount', '-l', disk], check=True)


def test_a_writer_that_fails_leaves_the_old_line_and_nothing_else(tmp_path):
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        os.chdir(tmp_path)
        for write in (lambda: append('log', 'x'*70_000), lambda: write_whole('log', lambda f: Path(f).write_text('x'*70_000))):
            try: write()
            except Unwritten as e: assert 'log could not be written: File too large' in str(e), e
            else: os._exit(1)
        os._exit(0)
    append(tmp_path/'log', 'begins')
    if not (pid := os.fork()): child()
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path/'log').read_text() == 'begins\n' and len(list(tmp_path.iterdir())) == 1


def test_what_kills_left_is_taken_away(home, tmp_path):
    "Temporary files of ours, of older runs and of safetensors; nothing that has another name"
    run = cut(home, tmp_path/'run')
    dead = ['.last.safetensors.abc_def0', '.tmpLRwgVE', 'figures/.curves.png.01234567']
    for name in dead: (run.path/name).write_bytes(b'0'*1000)
    (run.path/'.best.safetensors.zzzzzzzz').mkdir()
    (run.path/'.best.safetensors.zzzzzzzz/.tmpabcdef').touch()
    mine = {'.mine', '.notes.markdown', '.x.download'}
    for name in (*mine, 'notes.txt'): (run.path/name).touch()
    (run.path/'data').symlink_to(tmp_path) # is written nowhere
    quietly(resume=run.path)
    assert {*hidden(run.path)} == mine and (run.path/'notes.txt').exists()
    sweep(tmp_path/'nowhere')


def test_a_run_that_was_hardly_created(tmp_path):
    "Killed before its configuration was written: the same again begins it; with anything else inside, the folder is somebody's"
    def killed(new):
        Path(new).write_text('{}')
        raise KeyboardInterrupt
    with patch('shutil.rmtree'), pytest.raises(KeyboardInterrupt): write_whole(tmp_path/'a/config.json', killed)
    assert len(hidden(tmp_path/'a')) == 1 and list_runs(tmp_path) == []
    (tmp_path/'a/environment.json').write_text('{}')
    Run.free(tmp_path/'a')
    assert quietly(Pretrain(**tiny | dict(epochs=1, steps=1), out=str(tmp_path), name='a')).summary and hidden(tmp_path/'a') == []
    (tmp_path/'b').mkdir()
    (tmp_path/'b/mine.txt').touch()
    with pytest.raises(FileExistsError, match='is no empty folder'): Run.free(tmp_path/'b')


def test_two_processes_do_not_train_one_run(home, tmp_path):
    run = cut(home, tmp_path/'run')
    holds = subprocess.Popen([sys.executable, '-c', 'import fcntl, sys, time; f = open(sys.argv[1], "a"); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(100)',
                              run.path/'.lock'], stdout=subprocess.PIPE)
    holds.stdout.readline()
    with pytest.raises(ValueError, match='is being trained by another process'): quietly(resume=run.path)
    holds.kill()
    holds.communicate()

    class Beside(Callback):
        "Another fit of the same run, begun in the middle of this one"
        def before_train(self):
            with pytest.raises(ValueError, match='by this process already'): quietly(resume=run.path)
    assert quietly(resume=run.path, cbs=[Beside()]).summary


def test_a_run_is_one_fit(tmp_path):
    "A second fit would write over the record of the first"
    learn, recorder = make_learner(Pretrain(**tiny)), RecordRun(tmp_path/'a')
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=recorder)
        with pytest.raises(ValueError, match='holds a fit already'): learn.fit(1, cbs=recorder)
    assert len(Run(tmp_path/'a').metrics) == 2


def test_an_error_gives_back_what_the_fit_took(home, tmp_path):
    "Signals, the lock, the seeds' callback: a notebook goes on after it"
    run, was = cut(home, tmp_path/'run'), signal.getsignal(signal.SIGINT)
    learn = make_learner(Pretrain(**tiny))
    with pytest.raises(ValueError, match='planned with n_epoch = 3, not 4'): learn.fit_recipe(4, cbs=(recorder := RecordRun(run, resume=True)))
    assert signal.getsignal(signal.SIGINT) is was and recorder.claim is None and recorder.seeds not in learn.cbs


def test_fastai_pieces_beside_a_run(tmp_path):
    "`start_epoch` is refused: it would leave epochs out and call the rest a run"
    learn = make_learner(Pretrain(**tiny))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match='resume=True'): learn.fit(2, cbs=RecordRun(tmp_path/'a'), start_epoch=1)


@pytest.mark.parametrize('fit', ['fit_one_cycle', 'fit_flat_cos'])
def test_schedules_of_fastai_go_on_too(fit, tmp_path):
    def run(name, resume=False, *more):
        learn = make_learner(Pretrain(**tiny))
        with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(3, cbs=[RecordRun(tmp_path/name, resume), *more])
        return tmp_path/name
    whole, _ = run('whole'), run('cut', False, StopAt(1, 1))
    assert not differences(whole, run('cut', True))
