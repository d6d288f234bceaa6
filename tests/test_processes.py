"Two processes learn what one learns; killed and started again, they end where they would have ended."
import json, os, resource, signal, subprocess, sys, time

import psutil
import pytest
import torch
from conftest import ROOT
from dfot_vggt.app.train import dfot_train
from dfot_vggt.denoiser.uvit import UViTCfg
from dfot_vggt.learn.config import WorldCfg
from dfot_vggt.learn.muon import MuonCfg
from dfot_vggt.learn.recipes import tiny_base, tiny_control
from safetensors.torch import load_file

WORKER = '''
import json, os, sys, time
from pathlib import Path
import torch
from torch import nn
from dfot_vggt.core import rng
from dfot_vggt.learn.muon import MuonCfg
from dfot_vggt.learn.train import TrainCfg, train

folder, pause = Path(sys.argv[1]), float(sys.argv[2])
optimizer = dict(adamw=None, muon=MuonCfg(lr=2e-3, inside=('0', '2')))[sys.argv[3]]
torch.manual_seed(int(os.environ['RANK']))                  # the processes start apart: they must be brought together
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

def batches(first, process, processes):
    for step in range(first, 10**9):
        x = torch.randn(8, 4, generator=rng('batch', step))
        yield x[process::processes], x.sin().sum(1, keepdim=True)[process::processes]

def loss(model, batch):
    time.sleep(pause)
    return {'mse': (model(batch[0]) - batch[1]).square().mean(1)}

log = train(model, loss, batches, TrainCfg(steps=40, warmup=5, save_every=7, optimizer=optimizer), folder)
mine = dict(processes=int(os.environ['WORLD_SIZE']), pid=os.getpid(), weights=[p.tolist() for p in model.parameters()])
(folder/f"rank{os.environ['RANK']}.json").write_text(json.dumps(mine))
'''

def launch(tmp_path, n, folder, optimizer, pause=0.):
    (tmp_path/'worker.py').write_text(WORKER)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), str(tmp_path/'worker.py'), str(folder), str(pause), optimizer]
    return subprocess.Popen(cmd, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def run(tmp_path, n, name, optimizer):
    p = launch(tmp_path, n, tmp_path/name, optimizer)
    out, _ = p.communicate(timeout=240)
    assert p.returncode == 0, out
    ranks = [json.loads(f.read_text()) for f in sorted((tmp_path/name).glob('rank*.json'))]
    assert [r['processes'] for r in ranks] == [n]*n and len({r['pid'] for r in ranks}) == n, f'{n} processes were asked for'
    return ranks, [json.loads(l) for l in (tmp_path/name/'log.jsonl').read_text().splitlines()]

each_optimizer = pytest.mark.parametrize('optimizer', ['adamw', 'muon'])

@each_optimizer
def test_two_processes_learn_what_one_learns(tmp_path, optimizer):
    (one,), alone = run(tmp_path, 1, 'one', optimizer)
    two, shared = run(tmp_path, 2, 'two', optimizer)
    assert two[0]['weights'] == two[1]['weights'], 'both hold the same weights, bit for bit'
    assert len(shared) == len(alone) == 40, 'one of them writes the log'
    for a, b in zip(alone, shared): assert a['loss'] == pytest.approx(b['loss'], rel=1e-4, abs=1e-6), a['step']
    a, b = (load_file(tmp_path/n/'model.safetensors') for n in ('one', 'two'))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)         # sums of halves round differently
    assert alone[-1]['loss'] < .8*alone[0]['loss'], 'and it does learn'

@pytest.mark.slow
@each_optimizer
@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL], ids=['asked to stop', 'killed'])
def test_killed_and_started_again(tmp_path, how, optimizer):
    whole, log = run(tmp_path, 2, 'whole', optimizer)
    p = launch(tmp_path, 2, tmp_path/'cut', optimizer, pause=.1)
    path, deadline = tmp_path/'cut'/'log.jsonl', time.time() + 120
    while not (path.exists() and len(path.read_text().splitlines()) > 17):
        assert time.time() < deadline and p.poll() is None, 'it should be half way'
        time.sleep(.05)
    children = psutil.Process(p.pid).children()
    assert len(children) == 2
    for c in children: c.send_signal(how)
    p.communicate(timeout=120)
    assert len(path.read_text().splitlines()) < 40, 'it was cut before the end'
    again, relog = run(tmp_path, 2, 'cut', optimizer)
    assert again[0]['weights'] == whole[0]['weights'], 'the same weights, bit for bit'
    assert [r['loss'] for r in relog] == [r['loss'] for r in log] and [r['step'] for r in relog] == list(range(40))

# --- a real, small training, killed at random moments

MINI = tiny_base().replace(name='mini', world=WorldCfg(rooms=2, test_rooms=2, frames=16), batch=2,
                           model=UViTCfg.tiny(channels=(32, 48), emb=32, heads=2, mid=1, dropout=(.1, .1)))

def mini(steps, optimizer='adamw', **changes):
    "A recipe in float32, with dropout unless `changes` say otherwise."
    train = MINI.train.replace(precision='no', steps=steps, warmup=2, save_every=3, optimizer=MuonCfg() if optimizer == 'muon' else None)
    return MINI.replace(train=train, **changes)

def without_dropout(steps, optimizer='adamw', **changes):
    "Batches of 8, and a learning rate that does not depend on the number of steps."
    run = mini(steps, optimizer, batch=8, model=MINI.model.replace(dropout=(0., 0.)), **changes)
    return run.replace(train=run.train.replace(decay=0.))

# One process imports the package and forks a new process for every attempt: an import takes longer than the training.
KILLS = '''
import json, os, random, signal, sys, time
from pathlib import Path
from dfot_vggt.core import build
from dfot_vggt.learn.runs import train_run

recipe, root, seed, kills = build(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
draw = random.Random(seed)

def attempt(folder, kill_at_write=None):
    """Fork a process that trains; it kills itself before or after a rename of a file, when it has made so many."""
    if pid := os.fork(): return pid
    if kill_at_write:
        count, after, rename = *kill_at_write, os.replace
        def counted(*args):
            nonlocal count
            count -= 1
            if count == 0 and not after: os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)
            if count == 0: os.kill(os.getpid(), signal.SIGKILL)
        os.replace = counted
    code = 1
    try: train_run(recipe, root/folder, root); code = 0
    finally: os._exit(code)

recipe.world.folder(root)                                       # rendered once
t0 = time.time()
assert os.waitpid(attempt('whole'), 0)[1] == 0
took, done, killed = time.time() - t0, [], 0
while killed < kills:
    at_write = (draw.randint(1, 9), draw.random() < .5) if draw.random() < .5 else None
    pid, moment = attempt('cut', at_write), draw.uniform(0, took)
    if not at_write: time.sleep(moment); os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), (seed, killed, status)
    done.append([at_write or round(moment, 3), sorted(p.name for p in (root/'cut').rglob('*') if p.is_file()) if (root/'cut').exists() else []])
    killed += 1
    if status == 0: os.rename(root/'cut', root/f'cut{killed}')       # it was faster: begin again
assert os.waitpid(attempt('cut'), 0)[1] == 0, (seed, 'the last attempt')
print(json.dumps(done))
'''

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=pytest.mark.slow)])
def test_R1_R4_R10_killed_at_random_moments_equals_never_killed(tmp_path, optimizer, kills):
    seed = int.from_bytes(os.urandom(3), 'big')
    print('seed', seed)
    (tmp_path/'kills.py').write_text(KILLS)
    mini(10, optimizer).save(tmp_path/'mini.yaml')
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([sys.executable, 'kills.py', 'mini.yaml', 'runs', str(seed), str(kills)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert p.returncode == 0, (seed, p.stdout + p.stderr)
    print(p.stdout)
    whole = tmp_path/'runs'/'whole'
    for cut in (tmp_path/'runs').glob('cut*'):
        assert sorted(f.name for f in cut.rglob('*')) == sorted(f.name for f in whole.rglob('*')), (seed, 'nothing is left of killed saves')
        assert (cut/'model.safetensors').read_bytes() == (whole/'model.safetensors').read_bytes(), (seed, cut.name, 'the same weights, bit for bit')
        logs = [[{k: v for k, v in json.loads(l).items() if k != 's'} for l in (f/'log.jsonl').read_text().splitlines()] for f in (cut, whole)]
        assert logs[0] == logs[1] and [r['step'] for r in logs[0]] == list(range(10)), (seed, cut.name)
    assert (tmp_path/'runs'/'cut').exists()

# --- the command on two processes

COUNTED = '''
import os, runpy
from pathlib import Path
Path(f"process{os.environ['RANK']}").write_text(f"{os.environ['WORLD_SIZE']} {os.getpid()}")
runpy.run_module('dfot_vggt.app.train', run_name='__main__', alter_sys=True)
'''

def start(tmp_path, *args, processes=2):
    "The command in new processes; a file per process says how many there are."
    (tmp_path/'counted.py').write_text(COUNTED)
    env = dict(os.environ, PYTHONPATH=f'{ROOT}:{tmp_path}', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    alone = [sys.executable, '-m', 'dfot_vggt.app.train', *args]
    both = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'counted', *args]
    return subprocess.Popen(both if processes == 2 else alone, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def there_are_two(tmp_path):
    found = [(tmp_path/f'process{i}').read_text().split() for i in (0, 1)]
    assert [n for n, _ in found] == ['2', '2'] and found[0][1] != found[1][1], 'two processes were asked for'

def weights_apart(a, b):
    "Largest difference of two files of weights, and the share of elements beyond 1e-5."
    x, y = (load_file(f/'model.safetensors') for f in (a, b))
    far = torch.cat([(x[k].float() - y[k].float()).abs().flatten() for k in x])
    return far.max().item(), (far > 1e-5).float().mean().item()

@pytest.mark.parametrize('optimizer', [pytest.param('adamw', marks=pytest.mark.slow), 'muon'])      # Muon's run has parameters of both kinds
def test_F21_two_processes_train_what_one_trains_and_end_well(tmp_path, optimizer, monkeypatch):
    """Fresh and resumed on two: exit code 0, one closing line, no traceback, the numbers of one process. The limit is the order in which
    a batch is summed: 6e-7 at most was measured, and AdamW can enlarge it only where gradients are as small as its epsilon, 1e-8."""
    monkeypatch.chdir(tmp_path)
    for n in (3, 5): without_dropout(n, optimizer).save(tmp_path/f'{n}.yaml')
    dfot_train('5.yaml', 'one')
    dfot_train('3.yaml', 'resumed on two')
    for name, folder, folder_steps in (('3.yaml', 'begun on two', 3), ('5.yaml', 'resumed on two', 5)):
        p = start(tmp_path, name, '--folder', folder)
        out, err = p.communicate(timeout=240)
        there_are_two(tmp_path)
        assert p.returncode == 0 and 'Traceback' not in err, out + err
        assert out.count('steps, loss') == 1 and f'mini: {folder_steps} steps, loss' in out, out
    dfot_train('5.yaml', 'begun on two')
    logs = {f: [json.loads(l)['loss'] for l in (tmp_path/f/'log.jsonl').read_text().splitlines()] for f in ('one', 'begun on two', 'resumed on two')}
    for f in ('begun on two', 'resumed on two'):
        assert logs[f] == pytest.approx(logs['one'], rel=1e-4) and len(logs[f]) == 5
        largest, share = weights_apart(tmp_path/'one', tmp_path/f)
        print(f, largest, share)
        assert largest < 1e-4 and share < 1e-5, (f, largest, share)

@pytest.mark.slow
def test_R3_a_refusal_on_two_processes_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_dropout(2).save(tmp_path/'a.yaml')
    without_dropout(3, seed=1).save(tmp_path/'b.yaml')
    dfot_train('a.yaml', 'a')
    before = {f: f.read_bytes() for f in (tmp_path/'a').rglob('*') if f.is_file()}
    p = start(tmp_path, 'b.yaml', '--folder', 'a')
    out, err = p.communicate(timeout=240)
    there_are_two(tmp_path)
    assert p.returncode == 1 and err.count("expected {'seed': 0}, got {'seed': 1}") == 1, out + err
    assert {f: f.read_bytes() for f in (tmp_path/'a').rglob('*') if f.is_file()} == before

# --- signals

def stopped(p, number, code, *words):
    "The command gets a signal, and ends with one sentence and the exit code; returns it."
    p.send_signal(number)
    out, err = p.communicate(timeout=120)
    said = [l for l in err.replace('\r', '\n').splitlines() if l.startswith('dfot_train: ')]
    assert p.returncode == code and 'Traceback' not in err and len(said) == 1, (p.returncode, out + err)
    assert all(w in said[0] for w in words), said
    return said[0]

def until(p, condition):
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline and p.poll() is None, p.communicate()
        time.sleep(.02)

def lines_of(path): return len(path.read_text().splitlines()) if path.exists() else 0

def test_R14_a_signal_while_it_trains_saves_and_ends_in_a_sentence(tmp_path):
    mini(3000).save(tmp_path/'mini.yaml')
    p = start(tmp_path, 'mini.yaml', processes=1)
    until(p, lambda: lines_of(tmp_path/'runs'/'mini'/'log.jsonl') > 3)
    stopped(p, signal.SIGTERM, 143, 'stopped after step', 'saved in runs/mini')
    state, = (tmp_path/'runs'/'mini'/'state').iterdir()
    assert int(state.stem.removeprefix('step-')) == lines_of(tmp_path/'runs'/'mini'/'log.jsonl')

@pytest.mark.slow
def test_R14_a_signal_before_it_trains(tmp_path):
    mini(3, world=WorldCfg(rooms=4000, test_rooms=2, frames=16)).save(tmp_path/'mini.yaml')
    p = start(tmp_path, 'mini.yaml', processes=1)
    until(p, lambda: [*tmp_path.glob('runs/world-*/training_64/room*')])        # it renders the world
    stopped(p, signal.SIGINT, 130, 'interrupted; the same command continues')
    assert not [f for f in (tmp_path/'runs').rglob('*.tmp*')] and not (tmp_path/'runs'/'mini').exists()

@pytest.mark.slow
@pytest.mark.parametrize('wait', [.7, 1., 1.5, 2., 3., 4., 6., 8.])
def test_R14_a_signal_at_any_moment(tmp_path, wait):
    mini(3000).save(tmp_path/'mini.yaml')
    p = start(tmp_path, 'mini.yaml', processes=1)
    time.sleep(wait)
    stopped(p, *((signal.SIGINT, 130) if wait < 3 else (signal.SIGTERM, 143)))

@pytest.mark.slow
def test_R14_a_signal_while_the_cache_is_filled(tmp_path):
    recipe = tiny_control()
    recipe.replace(name='mini', finite=4000, world=WorldCfg(rooms=8, test_rooms=2, frames=16), batch=2, task=recipe.task,
                   train=recipe.train.replace(precision='no')).save(tmp_path/'mini.yaml')
    p = start(tmp_path, 'mini.yaml', processes=1)
    until(p, lambda: [*tmp_path.glob('runs/features/**/*.safetensors')])
    stopped(p, signal.SIGINT, 130, 'interrupted')

@pytest.mark.slow
def test_R14_two_processes_stop_at_one_step(tmp_path):
    without_dropout(3000).save(tmp_path/'mini.yaml')
    p = start(tmp_path, 'mini.yaml')
    until(p, lambda: lines_of(tmp_path/'runs'/'mini'/'log.jsonl') > 3)
    there_are_two(tmp_path)
    psutil.Process(int((tmp_path/'process1').read_text().split()[1])).send_signal(signal.SIGINT)      # one of them gets it, both stop
    out, err = p.communicate(timeout=120)
    assert err.count('dfot_train: stopped after step') == 1, out + err
    assert p.returncode != 0 and 'exitcode  : 130' in err, out + err

def test_an_interrupt_inside_an_import_keeps_the_exit_code(tmp_path):
    "CPython notes an interrupt inside exec(); `python -m` then ended with the signal itself, whatever the exit code."
    (tmp_path/'work.py').write_text("from dfot_vggt.app.names import ends_in_a_sentence\nwith ends_in_a_sentence('demo'): exec('raise KeyboardInterrupt')\n")
    p = subprocess.run([sys.executable, '-m', 'work'], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert (p.returncode, p.stderr) == (130, 'demo: interrupted\n')

# --- a full disk

def test_R4_a_full_disk_leaves_the_checkpoint_and_one_sentence(tmp_path, monkeypatch, capsys):
    "A limit on the size of files stands for the full disk: the save fails in the middle."
    monkeypatch.chdir(tmp_path)
    mini(6).save(tmp_path/'mini.yaml')
    dfot_train('mini.yaml', 'whole')
    def limited(steps, limit):
        "The message of a training whose files may have at most so many bytes; '' if it ends well."
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try: dfot_train('mini.yaml', 'cut', steps=steps)
        except SystemExit as e: return str(e)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
        return ''
    size = (tmp_path/'whole'/'model.safetensors').stat().st_size
    message = limited(6, size//2)                                             # the first save: there is nothing yet
    assert message.startswith('dfot_train: cut/state/step-0000003.pt: expected ') and 'MB of free space, got ' in message and '\n' not in message, message
    assert not [f for f in (tmp_path/'cut').rglob('*.tmp*')] and not [*(tmp_path/'cut'/'state').iterdir()]
    assert limited(6, 10**9) == '', 'the next call starts again'
    assert (tmp_path/'cut'/'model.safetensors').read_bytes() == (tmp_path/'whole'/'model.safetensors').read_bytes()
    before = {f: f.read_bytes() for f in (tmp_path/'cut').rglob('*') if f.is_file() and f.suffix in ('.pt', '.safetensors')}
    message = limited(9, size//2)
    assert 'cut/state/step-0000009.pt: expected ' in message, message
    assert {f: f.read_bytes() for f in (tmp_path/'cut').rglob('*') if f.is_file() and f.suffix in ('.pt', '.safetensors')} == before
