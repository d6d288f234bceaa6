"Commands as a user types them: wrong input ends in one message, an exit code that is not 0, and no half-written file."
import json, os, re, subprocess, sys

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from dfot_vggt.core import build
from dfot_vggt.learn.config import WorldCfg
from dfot_vggt.learn.recipes import tiny_base
from dfot_vggt.data.re10k import write_poses
from dfot_vggt.data.scenes import Room, colours, make_re10k, walk
from dfot_vggt.app.compare import StudyCfg
from dfot_vggt.app.study import dfot_study
from dfot_vggt.app.train import dfot_train

def run(cwd, *args):
    "`python -m dfot_vggt.<args>`: exit code and the last lines it printed."
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([sys.executable, '-m', *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return p.returncode, p.stdout + p.stderr

MINI = tiny_base().replace(name='mini', world=WorldCfg(rooms=2, test_rooms=2, frames=16), batch=2)

def saved(folder, cfg, name, *change):
    text = cfg.to_yaml().replace(*change) if change else cfg.to_yaml()
    (folder/name).write_text(text)
    return name

def test_training_from_a_yaml_file_and_its_record(tmp_path):
    exact = MINI.replace(train=MINI.train.replace(precision='no'))
    code, out = run(tmp_path, 'dfot_vggt.app.train', saved(tmp_path, exact, 'run.yaml'), '--steps', '2')
    assert code == 0 and 'mini: 2 steps' in out, out
    kept = build(tmp_path/'runs'/'mini'/'recipe.yaml')
    assert kept.world == MINI.world and kept.train.steps == 2, 'the record builds the run again'
    assert type(kept).__module__ == 'dfot_vggt.learn.config', 'where it can be imported from'

@pytest.mark.parametrize('module,args,message', [
    ('dfot_vggt.app.train', ['tiny_bse'], 'tiny_base'),
    ('dfot_vggt.app.train', ['absent.yaml'], 'absent.yaml'),
    ('dfot_vggt.app.study', ['--config', 'absent.yaml'], 'absent.yaml'),
    ('dfot_vggt.app.rollout', ['--model', 'tiny_bse'], 'tiny_bse'),
    ('dfot_vggt.app.rollout', ['--model', 'absent.ckpt'], 'absent.ckpt'),
    ('dfot_vggt.app.rollout', ['--clip', 'absent/test/room'], 'absent'),
    ('dfot_vggt.app.rollout', ['--image', 'absent.png', '--cams', 'absent.txt'], 'absent.png')])
def test_a_wrong_name(tmp_path, module, args, message):
    code, out = run(tmp_path, module, *args)
    assert code != 0 and message in out and 'Traceback' not in out, out
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('module,option', [('dfot_vggt.app.train', []), ('dfot_vggt.app.study', ['--config'])])
def test_a_config_key_that_does_not_exist(tmp_path, module, option):
    cfg = MINI if not option else StudyCfg()
    code, out = run(tmp_path, module, *option, saved(tmp_path, cfg, 'slip.yaml', 'warmup:', 'warmpu:'))
    assert code != 0 and "did you mean 'warmup'" in out and 'Traceback' not in out, out
    assert [p.name for p in tmp_path.iterdir()] == ['slip.yaml']

def test_a_config_that_names_foreign_code_runs_nothing(tmp_path):
    (tmp_path/'evil.yaml').write_text('_target_: os.system\ncommand: touch exploded\n')
    code, out = run(tmp_path, 'dfot_vggt.app.train', 'evil.yaml')
    assert code != 0 and 'os.system' in out and [p.name for p in tmp_path.iterdir()] == ['evil.yaml'], out

def damage(folder):
    "Faults of a world on disk: {fault: (function that makes it, text that the message must contain)}."
    npz, table = folder/'training_64'/'room000001.npz', folder/'training_poses'/'room000001.pt'
    return {'a truncated video': (lambda: npz.write_bytes(npz.read_bytes()[:-4000]), npz.name),
            'an empty video': (lambda: npz.write_bytes(b''), npz.name),
            'a missing video': (npz.unlink, 'room000001'),
            'a pose too few': (lambda: torch.save(torch.load(table, weights_only=True)[:-1].clone(), table),
                               'room000001'),
            'a table that is no table': (lambda: table.write_text('404: not found'), table.name)}

@pytest.mark.parametrize('what', damage(ROOT))
def test_a_damaged_world(tmp_path, what):
    folder = MINI.world.folder(tmp_path/"runs")
    act, names = damage(folder)[what]
    act()
    yaml = saved(tmp_path, MINI.replace(train=MINI.train.replace(precision='no')), 'run.yaml')
    if what == 'a missing video':                      # worlds are rendered: a missing video is rendered again
        code, out = run(tmp_path, 'dfot_vggt.app.train', yaml, '--steps', '1')
        assert code == 0 and (folder/'training_64'/'room000001.npz').exists(), out
        return
    code, out = run(tmp_path, 'dfot_vggt.app.train', yaml, '--steps', '1')
    assert code != 0 and names in out and 'Traceback' not in out, out
    assert not list((tmp_path/'runs').rglob('*.tmp*')) and not list((tmp_path/'runs').rglob('*.safetensors'))

def test_a_base_that_does_not_fit(tmp_path):
    (tmp_path/'base.safetensors').write_bytes(b'12345678 not tensors')
    run_cfg = MINI.replace(base='base.safetensors', train=MINI.train.replace(precision='no'))
    code, out = run(tmp_path, 'dfot_vggt.app.train', saved(tmp_path, run_cfg, 'run.yaml'), '--steps', '1')
    assert code != 0 and 'base.safetensors' in out and 'Traceback' not in out, out

def test_a_rollout_and_its_continuation(tmp_path):
    make_re10k(tmp_path/'rooms', 'test', 1, frames=12)
    args = ['dfot_vggt.app.rollout', '--clip', 'rooms/test/room000000', '--frames', '7', '--density', '.5',
            '--guidance', 'vanilla(1.5)', '--out', 'walk']
    code, out = run(tmp_path, *args, '--steps', '2')
    assert code == 0 and '7 frames: walk/room000000.mp4' in out and 'step' in out, out
    assert json.loads((tmp_path/'walk'/'settings.json').read_text())['steps'] == 2
    code, out = run(tmp_path, *args, '--steps', '3')
    assert code != 0 and 'expected steps = 2, got steps = 3' in out and 'Traceback' not in out, out
    code, out = run(tmp_path, *args, '--steps', '2')
    assert code == 0 and '7 frames' in out, 'it is done already'

def test_two_images_with_a_place_each(tmp_path):
    "F23: images at frames 0 and 15 of 16 cameras; an image only at the end; no image."
    cams = walk(Room(3), 64)[:16]
    images = colours(Room(3), cams[[0, 15]]).mul(255).round().byte().numpy()
    for name, x in zip('ab', images): Image.fromarray(x.transpose(1, 2, 0)).save(tmp_path/f'{name}.png')
    write_poses(tmp_path/'walk.txt', 'https://example.org/walk', torch.arange(16)*1000, cams)
    args = ['dfot_vggt.app.rollout', '--cams', 'walk.txt', '--steps', '2', '--out']
    two = [*args, 'two', '--image', 'a.png,b.png', '--at', '0,15']
    code, out = run(tmp_path, *two)
    assert code == 0 and '16 frames: two/a.mp4' in out, out
    frames = np.concatenate([np.load(p) for p in sorted((tmp_path/'two'/'frames').glob('*.npy'))], 1)
    assert frames.shape == (1, 16, 3, 64, 64) and (frames[0, [0, 15]] == images).all()
    with av.open(str(tmp_path/'two'/'a.mp4')) as box: film = [f.to_ndarray(format='rgb24') for f in box.decode(video=0)]
    assert len(film) == 16
    for i, x in zip((0, 15), images):
        assert np.abs(film[i].transpose(2, 0, 1).astype(float) - x).mean() < 4, 'more than the error of h264'
    code, out = run(tmp_path, *two, '--eta', '.5')
    assert code != 0 and 'expected eta = 0.0, got eta = 0.5' in out and 'Traceback' not in out, out
    code, out = run(tmp_path, *args, 'end', '--image', 'b.png', '--at', '15')
    assert code != 0 and 'reverse the order of the first 16 cameras' in out and 'Traceback' not in out, out
    assert not (tmp_path/'end').exists()
    code, out = run(tmp_path, *args, 'none')
    assert code == 0 and '16 frames: none/walk.mp4' in out, out

def light(cwd, module, *args):
    "Run a command to its end; returns exit code, printed text, and the names of imported large packages."
    code = f"""import runpy, sys
sys.argv[1:] = {list(args)}
try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)
finally: print('heavy:', [m for m in ('torch', 'numpy', 'omegaconf', 'plotly', 'IPython') if m in sys.modules])"""
    env = dict(os.environ, PYTHONPATH=str(ROOT), COLUMNS='120')
    p = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert 'Traceback' not in p.stderr and not list(cwd.iterdir()), p.stderr
    heavy, = re.findall(r'^heavy: (.*)$', p.stdout, re.M)
    return p.returncode, ' '.join((p.stdout + p.stderr).split()), heavy

LIGHT = [                                          # command, arguments, exit code, text that it must print
    ('train', ['--help'], 0, 'Train a recipe; a training that the folder already holds is continued.'),
    ('train', ['tiny_base', '--hlp'], 2, 'unrecognized arguments: --hlp'),
    ('train', ['--hlp'], 2, 'the following arguments are required: recipe'),
    ('train', ['tiny_bse'], 1, "got 'tiny_bse'; did you mean 'tiny_base'?"),
    ('cache', ['--help'], 0, 'dfot_cache re10k_control --finite 65725 --plan'),
    ('cache', ['tiny_control', '--hlp'], 2, 'unrecognized arguments: --hlp'),
    ('cache', ['--hlp'], 2, 'the following arguments are required: recipe'),
    ('cache', ['tiny_contrl'], 1, "got 'tiny_contrl'; did you mean 'tiny_control'?"),
    ('rollout', ['--help'], 0, 'Examples: `dfot_rollout --clip'),
    ('rollout', ['--help'], 0, 'stabilized_vanilla'),
    ('rollout', ['--hlp'], 2, 'unrecognized arguments: --hlp'),
    ('rollout', ['--model', 'tiny_bse'], 1, "got 'tiny_bse'; did you mean 'tiny_base'?"),
    ('rollout', ['--guidance', 'vanila(2)'], 1, "got 'vanila'; did you mean 'vanilla'?"),
    ('rollout', ['--between', 'vanila(2)'], 1, "--between: expected one of conditional"),
    ('rollout', ['--image', 'a.png,b.png', '--cams', 'a.txt', '--at', '15'], 1,
     '--at: expected 2 different frame numbers'),
    ('rollout', ['--cams', 'a.txt', '--at', '0'], 1, '--at: expected 0 different frame numbers'),
    ('rollout', ['--eta', '2'], 1, '--eta: expected a number from 0 to 1, got 2.0'),
    ('study', ['--help'], 0, 'Train a ControlNet and compare it with its base'),
    ('study', ['--hlp'], 2, 'unrecognized arguments: --hlp'),
    ('check', ['--help'], 0, 'Examples: `dfot_check data/re10k`'),
    ('check', ['.', '--hlp'], 2, 'unrecognized arguments: --hlp'),
    ('check', [], 2, 'the following arguments are required: folder'),
    ('check', ['absent'], 1, "expected a folder, got 'absent'; pass e.g. data/re10k"),
    ('check', ['.', '--workers', '0'], 1, '--workers: expected 1 or more, got 0'),
    ('vdt', ['--help'], 0, 'Examples: `dfot_vdt`;'),
    ('vdt', ['--help'], 0, 'spatial_temporal'),
    ('vdt', ['--hlp'], 2, 'unrecognized arguments: --hlp'),
    ('vdt', ['--task', 'interpolate'], 1, "got 'interpolate'; did you mean 'interpolation'?"),
    ('vdt', ['--steps', '1'], 1, '--steps: expected a whole number from 2 to 1000, got 1'),
    ('vdt', ['--frames', '1'], 1, '--frames: expected 2 or more'),
    ('vdt', ['--to', 'grid.png'], 1, "--to: expected the name of a folder, got 'grid.png'")]

@pytest.mark.parametrize('name,args,right,message', LIGHT)
def test_help_and_misspelt_arguments_need_no_torch(tmp_path, name, args, right, message):
    code, out, heavy = light(tmp_path, f'dfot_vggt.app.{name}', *args)
    assert (code, heavy) == (right, '[]') and message in out, out

def test_every_command_is_among_them():
    commands = {p.stem for p in (ROOT/'dfot_vggt'/'app').glob('*.py') if '@call_parse' in p.read_text()}
    assert commands == {name for name, *_ in LIGHT}, 'a new command: list above what it must print without torch'

def test_commands_are_ordinary_functions_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='tiny_base'): dfot_train('tiny_bse')
    monkeypatch.setattr('sys.argv', ['pytest', '--hlp'])                             # arguments of another program
    with pytest.raises(SystemExit, match='got no file'): dfot_study(config='absent.yaml')
