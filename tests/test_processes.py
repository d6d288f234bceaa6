"Two processes learn what one learns; killed and started again, they end where they would have ended."
import json, os, signal, subprocess, sys, time

import psutil
import pytest
import torch
from conftest import ROOT
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
