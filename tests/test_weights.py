"Files of weights as users meet them: saved by the tools themselves, and wrong ones behind a command (R12, F19)."
import os, shutil, subprocess, sys

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from dfot_vggt.core import asset
from dfot_vggt.denoiser.checkpoints import load_dfot
from dfot_vggt.denoiser.pose_cache import CachedUViT3DPose
from dfot_vggt.denoiser.tasks import PrefixMixture
from dfot_vggt.denoiser.uvit import UViTCfg, golden_weights
from dfot_vggt.geometry.aggregator import random_weights
from dfot_vggt.geometry.vggt import VGGT, VGGTCfg, load_vggt
from dfot_vggt.inject.controlnet import ControlCfg
from dfot_vggt.learn.config import RunCfg, WorldCfg
from dfot_vggt.learn.train import TrainCfg
from dfot_vggt.weights import read_about, read_tensors, save_weights
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

def run(cwd, *args):
    "`python -m dfot_vggt.<args>`: exit code and what it printed."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([sys.executable, '-m', *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return p.returncode, p.stdout + p.stderr

def refused(outcome, *parts):
    code, out = outcome
    assert code == 1 and 'Traceback' not in out and all(p in out for p in parts), out

# --- F19: what the tools themselves write

CFG = UViTCfg.golden()

@pytest.fixture
def model(): return golden_weights(CachedUViT3DPose(CFG))

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

def test_F19_what_torch_compile_and_data_parallel_write(model, tmp_path):
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = {'compiled': torch.compile(model), 'ddp': nn.parallel.DistributedDataParallel(model)}
        wrapped['both'] = nn.parallel.DistributedDataParallel(torch.compile(model))
        average = torch.optim.swa_utils.AveragedModel(model)
        for name, net in wrapped.items():
            torch.save(dict(model=net.state_dict(), optimizer=torch.optim.AdamW(net.parameters()).state_dict(), epoch=3), tmp_path/f'{name}.pt')
            assert not same(net.state_dict(), model.state_dict()), 'the names are wrapped'
            loaded = load_dfot(tmp_path/f'{name}.pt', CFG)
            assert same(loaded.state_dict(), model.state_dict()) and 'model' in loaded.load_report.unwrapped[0]
        torch.save(dict(ema={n: v for n, v in average.state_dict().items() if n != 'n_averaged'}), tmp_path/'swa.pt')
        assert same(load_dfot(tmp_path/'swa.pt', CFG).state_dict(), model.state_dict())
    finally: torch.distributed.destroy_process_group()

def test_F19_what_accelerate_writes(model, tmp_path):
    acc = Accelerator(cpu=True)
    prepared, opt = acc.prepare(model, torch.optim.AdamW(model.parameters()))
    acc.save_state(tmp_path/'state', safe_serialization=True)
    acc.save_state(tmp_path/'pickled', safe_serialization=False)
    acc.save_model(prepared, tmp_path/'whole')
    acc.save_model(prepared, tmp_path/'shards', max_shard_size='200kB')
    assert len([*(tmp_path/'shards').glob('*.safetensors')]) > 2 and (tmp_path/'state'/'optimizer.bin').exists()
    for folder in ('state', 'pickled', 'whole', 'shards'):
        assert same(load_dfot(tmp_path/folder, CFG).state_dict(), model.state_dict()), folder

def test_F19_what_the_hub_client_writes_for_vggt(tmp_path):
    cfg, heads = VGGTCfg.tiny(), ('camera_head', 'depth_head')
    state = {n: v.clone() for n, v in random_weights(VGGT(cfg)).state_dict().items()}
    for folder in ('diffusers', 'bins'): (tmp_path/folder).mkdir()
    save_torch_state_dict(state, tmp_path/'diffusers', filename_pattern='diffusion_pytorch_model{suffix}.safetensors', max_shard_size='2MB')
    save_torch_state_dict(state, tmp_path/'bins', safe_serialization=False, max_shard_size='2MB')
    torch.save({'model': state, 'optimizer': {}, 'epoch': 3}, tmp_path/'checkpoint.pt')
    (tmp_path/'diffusers'/'config.json').write_text('{}')
    for source in ('diffusers', 'bins', 'checkpoint.pt'):
        loaded = load_vggt(tmp_path/source, cfg, heads)
        assert all(torch.equal(w, state[n]) for n, w in loaded.state_dict().items()) and loaded.load_report.unwrapped, source
    shard = next((tmp_path/'diffusers').glob('*-00002-of-*.safetensors'))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name): load_vggt(tmp_path/'diffusers', cfg)

# --- R12: wrong weights behind a command

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder with the recipes of a small base and of a ControlNet on it, both trained for one step."
    at = tmp_path_factory.mktemp('runs')
    size = UViTCfg.tiny(channels=(32, 48), emb=32, heads=2, mid=2)
    base = RunCfg('base', WorldCfg(rooms=2, test_rooms=2, frames=16), size, batch=2, train=TrainCfg(steps=1, warmup=1))
    vggt = VGGTCfg.tiny()
    shutil.copy(asset('tiny_vggt.safetensors'), at/'vggt.safetensors')
    control = base.replace(name='control', vggt=vggt, layers=(1, 3), control=ControlCfg(latent=4*vggt.dim, camera=4*vggt.dim, first=0),
                           task=PrefixMixture(clips=1.), base='runs/base/model.safetensors', vggt_weights='./vggt.safetensors')
    for cfg in (base, control):
        cfg.save(at/f'{cfg.name}.yaml')
        code, out = run(at, 'dfot_vggt.app.train', f'{cfg.name}.yaml')
        assert code == 0, out
    return at

@pytest.fixture
def copied(trained, tmp_path): return shutil.copytree(trained, tmp_path/'copy')

def changed(path, change, **about):
    "Rewrite a file of weights with changed tensors, and with these texts changed in its header."
    tensors = {n: change(n, v.clone()) for n, v in read_tensors(path).items()}
    save_weights(path, tensors, {**read_about(path), **about})

def nudged(n, v): return v + 1e-3 if v.is_floating_point() and v.ndim > 1 else v

def test_R12_every_file_of_weights_says_what_it_is(trained):
    about = {name: read_about(trained/'runs'/name/'model.safetensors') for name in ('base', 'control')}
    assert about['base'].items() >= dict(kind='EMA', step='1', name='base').items() and 'recipe' in about['base']
    assert about['control'].keys() == {'kind', 'step', 'name', 'recipe', 'base', 'vggt', 'commit', 'digest'}
    for name in ('tiny_base', 'tiny_control', 'tiny_tokens', 'tiny_memory', 'tiny_vggt'):
        shipped = read_about(asset(f'{name}.safetensors'))
        assert (shipped['kind'], shipped['name']) == ('EMA', name) and {'recipe', 'step'} <= shipped.keys()
        assert ('base' in shipped and 'vggt' in shipped) == (name[5:] in ('control', 'tokens', 'memory'))

def test_R12_an_injector_does_not_go_on_on_another_base(copied):
    before = {p: p.read_bytes() for p in (copied/'runs'/'control').rglob('*') if p.is_file() and p.name != '.lock'}
    changed(copied/'runs'/'base'/'model.safetensors', nudged)
    refused(run(copied, 'dfot_vggt.app.train', 'control.yaml', '--steps', 2), 'base')
    assert all(p.read_bytes() == b for p, b in before.items()), 'nothing of the run was changed'

def test_R12_an_injector_does_not_go_on_with_another_vggt(copied):
    changed(copied/'vggt.safetensors', nudged)
    refused(run(copied, 'dfot_vggt.app.train', 'control.yaml', '--steps', 2), 'vggt')

@pytest.mark.parametrize('name', ['base', 'control'])
def test_R12_weights_that_are_not_finite_roll_nothing_out(copied, name):
    path = copied/'runs'/name/'model.safetensors'
    broken = {n: torch.full_like(v, float('nan')) if v.is_floating_point() and v.ndim > 1 else v.clone() for n, v in read_tensors(path).items()}
    save_file(broken, path, read_about(path))
    clip = next((copied/'runs').glob('world-*/test_poses/*.pt'))
    options = '--model', f'runs/{name}', '--clip', clip.parents[1]/'test'/clip.stem, '--frames', 8, '--steps', 2, '--out', 'out'
    refused(run(copied, 'dfot_vggt.app.rollout', *options), 'NaN or infinity')
    assert not list((copied/'out').rglob('*.mp4'))
