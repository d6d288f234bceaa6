"`.ci/gpu` is known to run before there is a GPU: without one it says so, on the CPU all of it runs small, and on a stand-in nothing is left behind."
import json, os, subprocess, sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader

import pytest
import torch
from conftest import ROOT
from elsewhere import ELSEWHERE, Elsewhere

def script():
    "`.ci/gpu` as a module."
    loader = SourceFileLoader('gpu', str(ROOT/'.ci'/'gpu'))
    module = module_from_spec(spec_from_loader('gpu', loader))
    loader.exec_module(module)
    return module

GPU = script()
MODELS = [j for j in GPU.JOBS if j is not GPU.flagged_cells]

def run(*args):
    "`.ci/gpu <args>` where no GPU is seen: exit code and what it printed."
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([sys.executable, ROOT/'.ci'/'gpu', *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return p.returncode, p.stdout + p.stderr

def test_without_a_gpu_it_says_so(tmp_path):
    code, out = run('--out', tmp_path/'gpu.json')
    assert code == 0 and out == 'no GPU: nothing was run\n' and not (tmp_path/'gpu.json').exists(), out

def test_all_of_it_runs_small_on_the_cpu(tmp_path):
    code, out = run('--device', 'cpu', '--tiny', '--out', tmp_path/'gpu.json', '--commit', 'abc')
    assert code == 0 and f'{len(GPU.JOBS)} passed, 0 failed' in out, out
    kept = json.loads((tmp_path/'gpu.json').read_text())
    assert {'machine', 'torch', 'date'} <= kept['about'].keys() and kept['about']['commit'] == 'abc' and kept['about']['failed'] == []
    rows = {r['name']: r for r in kept['rows']}
    assert all(f'{n}: ' in out for n in rows) and all(r['value'] <= r['must'] for r in rows.values() if 'must' in r)
    for name in ('golden denoiser: gradients', 'golden sampling: 6 steps', 'golden VGGT in float64', 'tiny: train step, bf16, 1 window, peak memory',
                 'tiny: sampling step, bf16, 1 window of 8 frames, 2 branches', 'tiny VGGT: cameras, depth and points, bf16, 8 frames',
                 'cells of 03_measure.ipynb flagged cuda'): assert name in rows, name

def test_what_fails_is_counted_and_the_rest_goes_on(capsys):
    def broken(device, tiny):
        yield GPU.row('first', 1., 's')
        raise ValueError('out of order')
    def wrong(device, tiny): yield GPU.row('golden', float('nan'), 'deviations', must=1e-3)
    def empty(device, tiny): yield from ()
    def good(device, tiny): yield GPU.row('golden too', 1e-4, 'deviations', must=1e-3)
    rows = []
    assert [GPU.run(j, torch.device('cpu'), True, rows) for j in (broken, wrong, empty, good)] == [True, True, True, False]
    said = capsys.readouterr()
    assert [r['name'] for r in rows] == ['first', 'golden', 'golden too'] and 'out of order' in said.err
    assert 'FAILED: broken' in said.out and 'TOO MUCH' in said.out and 'first: 1 s' in said.out

@pytest.mark.parametrize('job', MODELS, ids=lambda j: j.__name__)
def test_nothing_is_left_on_the_cpu(job, monkeypatch):
    "On a stand-in for a GPU (`tests/mismatched_features.py`), with the numbers of the CPU."
    class Autocast(torch.autocast):
        def __init__(self, device_type, *a, **kw): super().__init__('cpu' if device_type == ELSEWHERE.type else device_type, *a, **kw)
    monkeypatch.setattr(torch, 'autocast', Autocast)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Elsewhere(): rows = list(job(ELSEWHERE, True))
    finally: torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert rows and not [r for r in rows if GPU.missed(r)], rows
