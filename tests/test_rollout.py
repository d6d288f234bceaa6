"A rollout that is killed and started again makes the same video; its memory use does not grow with the length."
import json, os, random, resource, signal, subprocess, sys, time

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from dfot_vggt.app.generate import load_model
from dfot_vggt.data.re10k import write_poses
from dfot_vggt.data.scenes import Room, render, walk
from dfot_vggt.denoiser.rollout import PlannedWindow, next_frames, rollout, sample_frames, sample_windows, stream
from dfot_vggt.denoiser.sampling import check_frames
from dfot_vggt.denoiser.tasks import frame_mask
from torch.utils._python_dispatch import TorchDispatchMode

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
generate(net, ContinuousDiffusion(), image.repeat(1, 1, 1, size, size), cams, folder, ['a', 'b'][:clips], density=.1,
         steps=steps, batch=batch, guidance=HistoryGuidance.vanilla(1.5), between=HistoryGuidance.conditional(),
         progress=False)
status = Path('/proc/self/status').read_text().splitlines()
high = next(l for l in status if l.startswith('VmHWM'))    # ru_maxrss may be the parent's
print(json.dumps(int(high.split()[1])*1024))
'''

def launch(tmp_path, folder, preset='golden', clips=2, n=60, steps=6, batch=4, **kw):
    (tmp_path/'worker.py').write_text(WORKER)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    cmd = [sys.executable, str(tmp_path/'worker.py'), str(tmp_path/folder), preset, *map(str, (clips, n, steps, batch))]
    return subprocess.Popen(cmd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

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
        def reached(): return len(list((tmp_path/'cut').rglob('*.npy'))) >= goal or time.time() >= deadline
        while p.poll() is None and not reached(): time.sleep(.002)
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
    print({n: f'{b/1e6:.0f} MB' for n, b in peaks.items()}, f'frames of the longest video: {1024*frame/1e6:.0f} MB')
    assert peaks[1024] - peaks[32] < .5*(1024 - 32)*frame  # 32 frames have smaller windows: part of this is their size
    assert peaks[1024] - peaks[128] < .2*(1024 - 128)*frame  # the mp4's index of fragments grows by some kB a frame


# --- what the denoiser is fed with (F33)

@pytest.fixture(scope='module')
def base(): return load_model('tiny_base')[:2]

CAMS = walk(Room(3), 64)[None, :8:2]
FRAME = render(Room(3), CAMS[0, :1], size=64).rgb[None]

def calls(net, diffusion, frames, cams):
    "Every function that samples from RGB frames, on one frame and the cameras of four."
    video = torch.cat([frames, frames.new_zeros(frames.shape[0], 3, *frames.shape[2:])], 1) if frames.ndim == 5 else frames
    yield lambda: sample_frames(net, diffusion, video, cams, frame_mask(4, 1), steps=1)
    yield lambda: next_frames(net, diffusion, frames, cams, steps=1)
    yield lambda: sample_windows(net, diffusion, [PlannedWindow((0, 1), (1, 0))], {0: frames[:, 0]}, cams, steps=1)
    yield lambda: stream(net, diffusion, frames, cams, steps=1)
    yield lambda: rollout(net, diffusion, frames, cams, steps=1)

@pytest.mark.parametrize('change,message', [
    (lambda x: x[..., :48, :], '64'), (lambda x: x.repeat(1, 1, 1, 2, 2), '64'), (lambda x: x*255, 'values in [0,1]'), (lambda x: x*2 - 1, 'values in [0,1]'),
    (lambda x: x.mul(255).byte(), 'uint8'), (lambda x: x.movedim(2, -1), '64'), (lambda x: x*torch.nan, 'finite'), (lambda x: x.double(), 'float64')],
    ids=['48x64', '128x128', '0..255', '-1..1', 'bytes', 'channels last', 'NaN', 'double'])
def test_F33_frames_that_the_denoiser_cannot_use(base, change, message):
    x = change(FRAME)
    for call in calls(*base, x, CAMS):
        with pytest.raises(ValueError) as e: call()
        assert message in str(e.value) and '\n' not in str(e.value), e.value

def test_F33_rounding_errors_pass_and_one_clear_error_for_all_else(base):
    for call in calls(*base, FRAME*1.0019 - .0009, CAMS): call()
    for cams, message in ((CAMS[..., 4:], 'fx fy cx cy'), (CAMS[:, :0], 'at least 1 frame'), (CAMS*640, 'image size'), (CAMS.repeat(2, 1, 1), 'clips'),
                          (CAMS*0, 'zeros'), (CAMS[0], 'b n 16')):
        for call in calls(*base, FRAME, cams):
            with pytest.raises(ValueError, match=message): call()
    for kind in (FRAME.numpy(), FRAME[0], FRAME[:0], FRAME[:, :, :2]):
        with pytest.raises(ValueError, match='frames'): next_frames(*base, kind, CAMS)
    with pytest.raises(ValueError, match='model.eval'): next_frames(load_model('tiny_base')[0].train(), base[1], FRAME, CAMS)
    for mask in (frame_mask(3, 1), frame_mask(4, 1).float(), frame_mask(4, 1) > 0, frame_mask(4, 1)*5):
        with pytest.raises(ValueError, match='mask'): sample_frames(*base, FRAME.repeat(1, 4, 1, 1, 1), CAMS, mask)
    for option in (dict(steps=0), dict(steps=-2), dict(steps='3'), dict(seed=.5), dict(keys=['a', 'a'])):
        two = FRAME.repeat(2, 1, 1, 1, 1), CAMS.repeat(2, 1, 1)
        with pytest.raises(ValueError, match=[*option][0]): rollout(*base, *two, **option)

def test_F33_a_gpu_is_waited_for_once(base):
    "`check_frames` reads one small tensor; on a GPU each `.item()` or `if tensor:` would wait once more."
    class Reads(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.n += op is torch.ops.aten._local_scalar_dense.default
            return op(*args, **(kwargs or {}))
    with Reads() as reads: check_frames(base[0], FRAME, CAMS)
    assert reads.n == 0
    net = load_model('tiny_base')[0].to('meta')
    check_frames(net, FRAME.to('meta'), CAMS.to('meta'))

# --- the command and its folder (R5, R6, R16)

def command(cwd, *args, **kw):
    "`dfot_rollout` along walk.txt, 3 frames, one denoising step: exit code and printed text."
    write_poses(cwd/'walk.txt', 'https://example.org/walk', torch.arange(4)*1000, CAMS[0])
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([sys.executable, '-m', 'dfot_vggt.app.rollout', '--cams', 'walk.txt', '--steps', '1', '--frames', '3', *args], cwd=cwd, env=env,
                       capture_output=True, text=True, timeout=300, **kw)
    return p.returncode, p.stdout + p.stderr

def files(folder):
    "Bytes by name; without the listings of checksums, to which every call of `command` adds a line for its walk."
    found = (p for p in sorted(folder.rglob('*')) if p.is_file() and not p.is_symlink() and p.name != 'SHA256SUMS')
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}

def test_R5_only_files_of_this_command_are_removed(tmp_path):
    out = tmp_path/'out'
    foreign = ['.notes.tmp', '.past.tmp.txt', 'deep/.settings.1.tmp.json', 'deep/.cache.tmp/data', '.git.1.tmp/x', 'frames/.photo.1.tmp.png', 'thesis.mp4']
    left = ['.past.99.tmp.safetensors', '.settings.99.tmp.json', 'frames/.000000.99.tmp.npy']
    for name in foreign + left: (out/name).parent.mkdir(parents=True, exist_ok=True); (out/name).write_text(name)
    code, text = command(tmp_path, '--out', 'out')
    assert code == 0 and '3 frames: out/walk.mp4' in text, text
    there = files(out)
    assert all(there[name] == name.encode() for name in foreign) and not {*left} & {*there}
    before = files(tmp_path)
    code, text = command(tmp_path, '--out', '')
    assert code == 1 and "--out: expected the name of a folder, got ''" in text and files(tmp_path) == before

def test_R6_a_link_in_the_place_of_the_video(tmp_path):
    (tmp_path/'out').mkdir(); (tmp_path/'victim').write_text('precious')
    (tmp_path/'out'/'walk.mp4').symlink_to(tmp_path/'victim')
    code, text = command(tmp_path, '--out', 'out')
    assert code == 1 and 'out/walk.mp4: expected a file, or nothing, got a link' in text and 'Traceback' not in text, text
    assert (tmp_path/'victim').read_text() == 'precious' and [p.name for p in (tmp_path/'out').iterdir()] == ['walk.mp4']

def test_R16_a_damaged_folder_is_refused_and_left_as_it_is(tmp_path):
    assert command(tmp_path, '--out', 'out')[0] == 0
    chunk, settings = sorted((tmp_path/'out'/'frames').glob('*.npy'))[0], tmp_path/'out'/'settings.json'
    whole = chunk.read_bytes()
    for path, data in ((chunk, whole[:-1] + bytes([whole[-1] ^ 1])), (settings, None)):
        if data is None: path.unlink()
        else: path.write_bytes(data)
        before = files(tmp_path/'out')
        code, text = command(tmp_path, '--out', 'out')
        assert code == 1 and str(path.relative_to(tmp_path)) in text and 'expected' in text and 'another folder' in text and 'Traceback' not in text, text
        assert files(tmp_path/'out') == before
        chunk.write_bytes(whole)

def test_a_full_disk_keeps_the_last_state(tmp_path):
    "No file may be larger than 30 kB: the state does not fit. One sentence; without the limit the same call continues to the same video."
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    p = launch(tmp_path, 'full', clips=1, n=20, preexec_fn=limit)
    err = p.communicate(timeout=300)[1]
    assert p.returncode == 1 and 'MB of space for this file' in err.splitlines()[-1] and 'make room' in err, err
    assert not list((tmp_path/'full').rglob('*.tmp*'))
    for folder in ('full', 'whole'): peak(launch(tmp_path, folder, clips=1, n=20))
    assert (bytes_of(tmp_path/'full') == bytes_of(tmp_path/'whole')).all()
