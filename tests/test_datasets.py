"Camera files of other programs, and data sets with holes, as a user meets them: commands, processes, 65,000 names."
import json, os, re, subprocess, sys, time, warnings
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from dfot_vggt.core import golden
from dfot_vggt.data.camera import look_at
from dfot_vggt.data.clips import Clips
from dfot_vggt.data.re10k import Layout, write_npz, write_pose_table
from dfot_vggt.data.video import write_mp4
from dfot_vggt.denoiser.tasks import PrefixMixture
from dfot_vggt.geometry.vggt import VGGTCfg
from dfot_vggt.inject.controlnet import ControlCfg
from dfot_vggt.learn.config import Re10kCfg, RunCfg
from dfot_vggt.learn.recipes import tiny_base
from dfot_vggt.learn.runs import train_run
from safetensors.torch import load_file

NAMES = 'akiyo', 'bus', 'carphone', 'foreman'

def run(cwd, *args, launch=('-m',)):
    "`python -m <args>`: exit code and everything it printed."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([sys.executable, *launch, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return p.returncode, p.stdout + p.stderr

def cameras(n):
    "Cameras on a straight path."
    along = torch.arange(n)[:, None]*torch.tensor([.02, 0., 0.])
    return look_at(along, torch.tensor([0., 0., 5.]).expand(n, 3))

def clip(layout, key, shade, n=12, mp4=True):
    "A clip of one grey level, which is the way to recognise it."
    write_pose_table(layout.table(key), cameras(n))
    video = np.full((n, 3, 64, 64), shade, np.uint8)
    if mp4: write_mp4(layout.mp4(key), video)
    else: write_npz(layout.npz(key), video)

@pytest.fixture
def four(tmp_path):
    "A folder in the layout of RealEstate10K with four clips, and a small recipe that trains on it."
    layout = Layout(tmp_path/'data', 'training')
    for k, key in enumerate(NAMES): clip(layout, key, 50*k + 20)
    for p in layout.root.rglob('SHA256SUMS'): p.unlink()              # as in a data set of other people
    model = tiny_base().model.replace(channels=(32, 48), emb=32, heads=2, mid=2)
    train = tiny_base().train.replace(steps=6, precision='no', save_every=3)
    recipe = RunCfg('small', Re10kCfg(str(layout.root), (1, 1)), model, train=train, batch=4)
    recipe.save(tmp_path/'small.yaml')
    return layout, recipe

def log(tmp_path, name='small'): return [json.loads(l) for l in (tmp_path/'runs'/name/'log.jsonl').read_text().splitlines()]

def test_F14_one_video_of_four_is_absent(tmp_path, four):
    four[0].mp4('carphone').unlink()
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'small.yaml')
    assert code == 0 and 'small: 6 steps' in out, out
    assert out.count('1 of 4 clips has no video (first: carphone); they are left out') == 1, out
    assert len(log(tmp_path)) == 6 and not any('skipped' in r for r in log(tmp_path))

def test_F14_no_video_is_left(tmp_path, four):
    for key in NAMES: four[0].mp4(key).unlink()
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'small.yaml')
    assert code == 1 and 'none of the 4 clips (first: akiyo)' in out and 'Traceback' not in out, out
    assert not list(tmp_path.rglob('*.safetensors'))

@pytest.mark.parametrize('damage', ['cut', 'a frame too few', 'table'])
def test_F14_a_broken_file_is_skipped_counted_and_named(tmp_path, four, damage):
    layout = four[0]
    if damage == 'cut': layout.mp4('bus').write_bytes(layout.mp4('bus').read_bytes()[:900])
    if damage == 'a frame too few': write_mp4(layout.mp4('bus'), np.zeros((11, 3, 64, 64), np.uint8))
    if damage == 'table': layout.table('bus').write_bytes(b'404: not found')
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'small.yaml')
    assert code == 0 and 'small: 6 steps' in out, out
    if damage == 'table':
        assert re.search(r'1 of 4 clips has a pose table that cannot be read \(first: .*bus\.pt', out), out
        return
    skipped = [r.get('skipped', 0) for r in log(tmp_path)]
    assert sum(skipped) > 0 and f'{sum(skipped)} times a clip could not be read' in out, out
    assert out.count('1 of 4 clips cannot be read so far') == 1 and re.search(r'bus\.mp4: expected', out), out

def test_F14_too_many_broken_files_stop(tmp_path, four):
    for key in NAMES[:2]: four[0].mp4(key).write_bytes(b'')
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'small.yaml')
    assert code == 1 and 'at most 1 of 4 clips with broken files, got 2' in out and 'Traceback' not in out, out
    assert 'akiyo.mp4' in out and 'bus.mp4' in out and not list(tmp_path.rglob('*.safetensors')), out

def same_weights(a, b):
    a, b = load_file(a/'model.safetensors'), load_file(b/'model.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_F14_a_resumed_run_replaces_as_the_whole_run(tmp_path, four):
    layout, recipe = four
    layout.mp4('bus').write_bytes(b'')
    def stop(e):
        if e.step == 4: raise RuntimeError('a crash')
    def noted(folder): return [(r['step'], r.get('skipped')) for r in map(json.loads, (tmp_path/folder/'log.jsonl').read_text().splitlines())]
    with warnings.catch_warnings(action='ignore'):
        train_run(recipe, tmp_path/'whole', tmp_path)
        with pytest.raises(RuntimeError): train_run(recipe, tmp_path/'parts', tmp_path, (stop,))
        train_run(recipe, tmp_path/'parts', tmp_path)
    assert noted('whole') == noted('parts') and {n for _, n in noted('whole')} >= {1}
    same_weights(tmp_path/'whole', tmp_path/'parts')

STREAM = """
import sys, warnings, hashlib
from accelerate import PartialState
from dfot_vggt.core import build
from dfot_vggt.learn.losses import training_windows
warnings.simplefilter('ignore')
state = PartialState(cpu=True)
assert state.num_processes == int(sys.argv[2])
stream = training_windows(build(sys.argv[1]), 'runs')(0, state.process_index, state.num_processes)
for batch, step in stream:
    if step == 4: break
    names = [f'{k}:{i}' for k, i in zip(batch.keys, batch.index.tolist())]
    open(f'process{state.num_processes}-{state.process_index}', 'a').write('\\n'.join(names) + '\\n')
"""

def test_F14_two_processes_replace_as_one(tmp_path, four):
    four[0].mp4('bus').write_bytes(b'')
    (tmp_path/'stream.py').write_text(STREAM)
    torchrun = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'
    for launch, n in (((), '1'), (torchrun, '2')):
        code, out = run(tmp_path, 'stream.py', 'small.yaml', n, launch=launch)
        assert code == 0, out
    one = (tmp_path/'process1-0').read_text().split('\n')[:-1]
    a, b = ((tmp_path/f'process2-{r}').read_text().split('\n')[:-1] for r in (0, 1))
    assert len(one) == 16 and [x for pair in zip(a, b) for x in pair] == one and not any('bus' in x for x in one)

def test_F14_two_processes_count_and_name_what_they_skip(tmp_path, four):
    four[0].mp4('bus').write_bytes(b'')
    torchrun = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m'
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'small.yaml', launch=torchrun)
    assert code == 0 and 'small: 6 steps' in out, out
    skipped = sum(r.get('skipped', 0) for r in log(tmp_path))
    assert skipped > 0 and f'{skipped} times a clip could not be read' in out, out
    assert 1 <= out.count('1 of 4 clips cannot be read so far') <= 2 and 'bus.mp4: expected' in out, out

def test_F14_a_video_lost_between_cache_and_training(tmp_path, four):
    layout, recipe = four
    vggt = VGGTCfg.tiny()
    finite = recipe.replace(name='finite', finite=6, vggt=vggt, layers=(1,), task=PrefixMixture(clips=1.), train=recipe.train.replace(steps=2),
                            control=ControlCfg(latent=2*vggt.dim, camera=2*vggt.dim, first=0))
    finite.save(tmp_path/'finite.yaml')
    code, out = run(tmp_path, 'dfot_vggt.app.cache', 'finite.yaml')
    assert code == 0 and '1 of them made' in out, out
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path/'runs'/'features').glob('*/*.safetensors')}
    lost = layout.mp4('carphone').read_bytes()
    layout.mp4('carphone').unlink()
    for module in ('train', 'cache'):
        code, out = run(tmp_path, f'dfot_vggt.app.{module}', 'finite.yaml')
        assert code == 1 and '1 shards of other windows: the data set had other clips' in out and 'Traceback' not in out, out
    layout.mp4('carphone').write_bytes(b'')                            # there, but broken: both stop at its first window
    for p in shards: p.unlink()
    for module in ('cache', 'train'):
        code, out = run(tmp_path, f'dfot_vggt.app.{module}', 'finite.yaml')
        assert code == 1 and 'carphone.mp4' in out and 'Traceback' not in out, out
    layout.mp4('carphone').write_bytes(lost)
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'finite.yaml')
    assert code == 0 and 'finite: 2 steps' in out, out
    assert {p.name for p in shards} == {p.name for p in (tmp_path/'runs'/'features').glob('*/*.safetensors')}

def test_F14_65_000_names_in_seconds_and_no_file_is_opened(tmp_path):
    "RealEstate10K has 65,725 training clips; here 65,000 pose tables and 40,000 videos, all of them empty files."
    many = Layout(tmp_path, 'training')
    for folder, suffix, n in (('training_poses', 'pt', 65_000), ('training_256', 'mp4', 40_000)):
        (tmp_path/folder).mkdir()
        for i in range(n): os.close(os.open(tmp_path/folder/f'{i:016x}.{suffix}', os.O_CREAT))
    start = time.process_time()
    with mock.patch('builtins.open', side_effect=AssertionError), mock.patch('os.open', side_effect=AssertionError), \
         mock.patch('os.stat', side_effect=os.stat) as stat:
        absent = set(many.keys()) - many.videos(256)
    took = time.process_time() - start
    print(f'{took:.2f} s of one processor')
    assert len(absent) == 25_000 and took < 2 and stat.call_count < 20, (took, stat.call_count)

def test_F14_absent_clips_cost_nothing_at_the_start(tmp_path, four):
    "The pose table of an absent clip is not opened."
    four[0].mp4('bus').unlink()
    opened = []
    import dfot_vggt.data.clips as module
    read = module.read_pose_table
    with mock.patch.object(module, 'read_pose_table', lambda p: opened.append(p.stem) or read(p)), pytest.warns(UserWarning, match='bus'):
        assert Clips(four[0].root, 'training').absent == ['bus']
    assert opened == ['akiyo', 'carphone', 'foreman']

def test_F09_pixels_on_the_command_line(tmp_path):
    code, out = run(tmp_path, 'dfot_vggt.app.rollout', '--cams', str(golden('field/F09_pixels.txt')), '--out', 'walk')
    assert code == 1 and 'F09_pixels.txt, line 2' in out and 'got 640' in out and 'divide fx and cx by the width' in out, out
    assert 'Traceback' not in out and not list(tmp_path.rglob('*.mp4'))

def test_F09_pixels_in_a_pose_table_of_a_training(tmp_path, four):
    table = four[0].table('bus')
    rows = torch.load(table, weights_only=True)
    rows[:, :4] = torch.tensor([640., 640., 640., 360.])
    torch.save(rows, table)
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'small.yaml')
    assert code == 0 and re.search(r'cannot be read \(first: .*bus\.pt, pose 0: expected fx .* got 640', out), out
    for key in NAMES: torch.save(rows, four[0].table(key))
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'small.yaml', '--folder', 'other')
    assert code == 1 and 'at most 1 of 4 clips with broken files, got 2' in out and 'got 640' in out, out
