"A rollout that is killed and started again makes the same video; its memory use does not grow with the length."
import json, os, random, signal, subprocess, sys, time

import av
import numpy as np
import pytest
from conftest import ROOT

WORKER = '''
import json, sys
from pathlib import Path
import torch
from dfot_vggt.denoiser.diffusion import ContinuousDiffusion
from dfot_vggt.app.generate import generate
from dfot_vggt.denoiser.guidance import HistoryGuidance
from dfot_vggt.data.scenes import Room, walk
from dfot_vggt.denoiser.pose_cache import CachedUViT3DPose
from dfot_vggt.denoiser.uvit import UViTCfg, golden_weights

folder, preset, (clips, n, steps, batch) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
net = golden_weights(CachedUViT3DPose(getattr(UViTCfg, preset)())).eval()
image, size = torch.rand(clips, 1, 3, 1, 1, generator=torch.Generator().manual_seed(0)), net.cfg.size
cams = walk(Room(0), n)[None].repeat(clips, 1, 1)
generate(net, ContinuousDiffusion(), image.repeat(1, 1, 1, size, size), cams, folder, ['a', 'b'][:clips], density=.1, steps=steps, batch=batch,
         guidance=HistoryGuidance.vanilla(1.5), between=HistoryGuidance.conditional(), progress=False)
high = next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM'))    # ru_maxrss may be the parent's
print(json.dumps(int(high.split()[1])*1024))
'''

def launch(tmp_path, folder, preset='golden', clips=2, n=60, steps=6, batch=4):
    (tmp_path/'worker.py').write_text(WORKER)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    cmd = [sys.executable, str(tmp_path/'worker.py'), str(tmp_path/folder), preset, *map(str, (clips, n, steps, batch))]
    return subprocess.Popen(cmd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def peak(p):
    "Largest memory use of a finished process, in bytes."
    out, err = p.communicate(timeout=900)
    assert p.returncode == 0, err
    return json.loads(out.splitlines()[-1])

def decoded(path):
    with av.open(str(path)) as box: return np.stack([f.to_ndarray(format='rgb24') for f in box.decode(video=0)])

def bytes_of(folder): return np.concatenate([np.load(p) for p in sorted((folder/'frames').glob('*.npy'))], 1)

def kill_and_go_on(tmp_path, seed, kills):
    "Kill the worker `kills` times at random moments; returns how often it was still running when it was killed."
    rand, hit = random.Random(seed), 0
    for _ in range(kills):
        before, p = len(list((tmp_path/'cut').rglob('*.npy'))), launch(tmp_path, 'cut')
        goal, deadline = before + rand.randint(1, 2), time.time() + 120
        while p.poll() is None and len(list((tmp_path/'cut').rglob('*.npy'))) < goal and time.time() < deadline: time.sleep(.002)
        time.sleep(rand.random()*.1)
        if p.poll() is None: p.send_signal(signal.SIGKILL); hit += 1
        p.communicate(timeout=60)
        assert all(np.load(f).ndim == 5 for f in (tmp_path/'cut'/'frames').glob('*.npy')), 'every file is complete'
    return hit

@pytest.mark.parametrize('seed,kills', [(0, 2), *(pytest.param(s, 4, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_killed_and_started_again(tmp_path, seed, kills):
    peak(launch(tmp_path, 'whole'))
    assert kill_and_go_on(tmp_path, seed, kills) == kills, 'killed while it worked, not after it'
    assert bytes_of(tmp_path/'cut').shape[1] < 60, 'killed before the end'
    peak(launch(tmp_path, 'cut'))
    assert (bytes_of(tmp_path/'cut') == bytes_of(tmp_path/'whole')).all()
    for name in ('a.mp4', 'b.mp4'):
        a, b = (decoded(tmp_path/f/name) for f in ('cut', 'whole'))
        assert len(b) == 60 and (a == b).all(), 'every pixel of the decoded video'
    assert not list((tmp_path/'cut').rglob('*.tmp*')), 'half-written files of a killed process are deleted'

@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path):
    peaks = {n: peak(launch(tmp_path, str(n), 'tiny', 1, n, 2, 1)) for n in (32, 128, 1024)}
    frame = 3*64*64*4
    print({n: f'{b/1e6:.0f} MB' for n, b in peaks.items()}, f'the frames of the longest alone would take {1024*frame/1e6:.0f} MB')
    assert peaks[1024] - peaks[32] < .5*(1024 - 32)*frame                # 32 frames have smaller windows: part of this is their size
    assert peaks[1024] - peaks[128] < .2*(1024 - 128)*frame              # the mp4's index of fragments grows by some kB a frame
