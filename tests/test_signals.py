"Ctrl-C and SIGTERM end a command with one sentence and the usual exit code, whatever it is doing."
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from dfot_vggt.data.re10k import write_poses
from dfot_vggt.data.scenes import Room, walk

def importing(p, cwd): return b'libtorch' in Path(f'/proc/{p.pid}/maps').read_bytes()
def loading(p, cwd): return b'tiny_tokens.safetensors' in Path(f'/proc/{p.pid}/maps').read_bytes() or sampling(p, cwd)
def sampling(p, cwd): return (cwd/'out'/'past.safetensors').exists()

@pytest.mark.parametrize('number,code,word', [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')])
@pytest.mark.parametrize('moment', [importing, loading, sampling])
def test_rollout_is_stopped(tmp_path, moment, number, code, word):
    write_poses(tmp_path/'walk.txt', 'https://example.org/walk', torch.arange(64)*1000, walk(Room(3), 64))
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    args = ['--model', 'tiny_tokens', '--cams', 'walk.txt', '--steps', '60', '--sliding_context', '7', '--out', 'out']
    p = subprocess.Popen([sys.executable, '-m', 'dfot_vggt.app.rollout', *args], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 240
    while p.poll() is None and not moment(p, tmp_path) and time.time() < deadline: time.sleep(.01)
    assert p.poll() is None, p.communicate()[1]
    p.send_signal(number)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == code and f'dfot_rollout: {word}; the same command continues in out' in err and 'Traceback' not in err, err
    assert not list(tmp_path.rglob('.*.tmp*'))
    if moment is not sampling: assert not (tmp_path/'out').exists(), 'nothing was begun'
