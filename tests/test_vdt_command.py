"`dfot_vdt` as a user types it: seven tasks from the package alone, bad input in one sentence, stops and kills that leave nothing half-written."
import json, os, re, shutil, signal, subprocess, sys, time

import pytest
from conftest import ROOT
from PIL import Image
from dfot_vggt.data.scenes import make_re10k
from dfot_vggt.app.vdt import TASK_NAMES

def typed(cwd, *args, package=ROOT):
    "The process of `dfot_vdt <args>` in a folder."
    env = dict(os.environ, PYTHONPATH=str(package), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'dfot_vggt.app.vdt', *args]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def run(cwd, *args, **kw):
    "Exit code and printed text."
    p = typed(cwd, *args, **kw)
    text, _ = p.communicate(timeout=600)
    return p.returncode, text

def files(folder): return sorted(p.name for p in folder.iterdir()) if folder.exists() else []

ALL = sorted(['vdt.json', 'vdt.png', '.lock', *(f'{task}.mp4' for task in TASK_NAMES)])

def test_all_seven_tasks_from_the_package_alone(tmp_path, capsys):
    "Without a clone, a data set or a run: what the wheel holds suffices. The seconds are printed, not asserted: the machine may be busy."
    shutil.copytree(ROOT/'dfot_vggt', tmp_path/'site'/'dfot_vggt', ignore=shutil.ignore_patterns('__pycache__'))
    start = time.perf_counter()
    code, out = run(tmp_path, package=tmp_path/'site')
    took = time.perf_counter() - start
    assert code == 0 and 'Traceback' not in out, out
    assert '32/32' in out and re.search(r'^7 tasks, [\d.]+ s: runs/vdt/vdt\.png, predict\.mp4, .*, vdt\.json$', out, re.M), out
    assert files(tmp_path/'runs'/'vdt') == ALL
    record = json.loads((tmp_path/'runs'/'vdt'/'vdt.json').read_text())
    assert record['settings']['commit'] == 'not a git clone' and record['settings']['steps'] == 32 and len(record['results']) == 7
    with capsys.disabled(): print(f' dfot_vdt, seven tasks, one thread: {took:.0f} s in all, {record["seconds"]} s of them denoising', end=' ')

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A clip of 12 frames in several forms, and files that are none."
    folder = tmp_path_factory.mktemp('clips')
    make_re10k(folder/'rooms', 'test', 1, frames=12, video_size=64)
    Image.new('RGB', (64, 64)).save(folder/'lone.png')
    (folder/'text.mp4').write_text('404: not found')
    return folder

@pytest.mark.parametrize('args,message', [
    (['--clip', 'rooms/test/room000000', '--frames', '13'], 'expected a clip of at least 13 frames, from which 13 are taken, got 12 frames; pass --frames 12'),
    (['--clip', 'lone.png'], 'expected a video, got one picture'),
    (['--clip', 'text.mp4'], 'text.mp4: expected a video'),
    (['--clip', 'absent.mp4'], 'nothing there'),
    (['--task', 'backward', '--context', '8'], 'context of backward'),
    (['--weights', 'text.mp4'], 'expected the recipe of the weights'),
    (['--to', 'text.mp4/below'], 'text.mp4'),
    (['--to', '/proc/vdt'], 'dfot_vdt: ')])
def test_bad_input(world, args, message):
    before = files(world)
    code, out = run(world, '--steps', '2', *args)
    assert code == 1 and message in out and 'Traceback' not in out, out
    assert files(world) == before, 'nothing is written'

def test_a_clip_and_the_same_call_again(world, tmp_path):
    args = ['--task', 'predict', '--clip', str(world/'rooms'/'test_64'/'room000000.mp4'), '--steps', '2', '--to', 'here']
    code, out = run(tmp_path, *args)
    assert code == 0 and 'here/vdt.png, predict.mp4, vdt.json' in out, out
    before = (tmp_path/'here'/'vdt.json').read_bytes()
    code, out = run(tmp_path, *args)
    assert code == 0 and 'computed before' in out and (tmp_path/'here'/'vdt.json').read_bytes() == before, out
    code, out = run(tmp_path, *args, '--seed', '1')
    assert code == 1 and 'expected seed = 0, got seed = 1; repeat that call, or pass another folder, e.g. --to here-2' in out, out
    assert (tmp_path/'here'/'vdt.json').read_bytes() == before

@pytest.mark.parametrize('number,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stop_in_the_middle(tmp_path, number, code):
    "A stopped call leaves no folder; a killed one its empty lock. The same call then succeeds."
    p, text = typed(tmp_path, '--task', 'predict', '--steps', '900', '--to', 'here'), ''
    while not re.search(r'\b[1-9]\d*/900', text):
        piece = p.stdout.read(1)
        assert piece, text
        text += piece
    p.send_signal(number)
    text += p.communicate(timeout=60)[0]
    assert p.returncode == code and 'Traceback' not in text, text
    assert files(tmp_path/'here') == (['.lock'] if number == signal.SIGKILL else [])
    if number != signal.SIGKILL: assert 'dfot_vdt: ' in text and 'the same command begins again' in text, text
    code, out = run(tmp_path, '--task', 'predict', '--steps', '2', '--to', 'here')
    assert code == 0 and files(tmp_path/'here') == sorted(['vdt.json', 'vdt.png', 'predict.mp4', '.lock']), out
