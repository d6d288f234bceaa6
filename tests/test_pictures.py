"Pictures at the command line: no other program is started, telephones' photographs are upright, models get the cameras that they learned."
import os, subprocess, sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps

from dfot_vggt.app import generate as app
from dfot_vggt.app.rollout import dfot_rollout
from dfot_vggt.core import golden
from dfot_vggt.data.re10k import Layout, cover_crop, crop_cams, write_pose_table, write_poses
from dfot_vggt.data.scenes import Room, walk
from dfot_vggt.data.video import write_mp4

POSTSCRIPT = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\nshowpage\n'

@pytest.fixture
def cams(tmp_path):
    "A camera file of 16:9 frames with the numbers of RealEstate10K, and its cameras."
    cams = walk(Room(3), 8)
    cams[:, 0], cams[:, 1] = .5, .8889
    write_poses(tmp_path/'walk.txt', 'https://example.org/walk', torch.arange(8)*1000, cams)
    return cams

def start(*args, **env):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='') | env
    return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)

def test_R7_postscript_starts_no_program(tmp_path, cams):
    "A program named gs lies first in PATH and writes down that it ran; PostScript named room.png must not start it."
    (tmp_path/'room.png').write_bytes(POSTSCRIPT)
    (tmp_path/'bin').mkdir()
    ghostscript = tmp_path/'bin'/'gs'
    ghostscript.write_text(f'#!/bin/sh\necho ran >> {tmp_path}/ran\n')
    ghostscript.chmod(0o755)
    path = dict(PATH=f'{tmp_path/"bin"}:{os.environ["PATH"]}')
    plain = start('-c', f'from PIL import Image; Image.open("{tmp_path}/room.png").load()', **path)
    assert (tmp_path/'ran').exists(), f'this test would notice it: Pillow alone starts the program\n{plain.stderr}'
    (tmp_path/'ran').unlink()
    by_command = start('-m', 'dfot_vggt.app.rollout', '--image', tmp_path/'room.png', '--cams', tmp_path/'walk.txt',
                       '--out', tmp_path/'out', **path)
    by_vggt = start('-c', f'from dfot_vggt.geometry.photographs import read_images; read_images(["{tmp_path}/room.png"])', **path)
    for done in (by_command, by_vggt):
        assert done.returncode == 1 and 'room.png: expected an image' in done.stderr and 'JPEG, PNG, WEBP, BMP or TIFF' in done.stderr, done.stderr
    assert 'Traceback' not in by_command.stderr
    assert not (tmp_path/'ran').exists() and not list((tmp_path/'out').rglob('*.mp4'))

def started_with(monkeypatch, **args):
    "`(context frames, cameras)` that `dfot_rollout` hands to the rollout; nothing is loaded or generated."
    caught = []
    def caught_generate(model, diffusion, frames, cams, folder, *more, **kw):
        caught.append((frames[0], cams[0]))
        return [folder]
    tiny = app.load_model('tiny_base')
    monkeypatch.setattr(app, 'load_model', lambda *a, **kw: tiny)
    monkeypatch.setattr(app, 'generate', caught_generate)
    dfot_rollout(**args)
    monkeypatch.undo()
    return caught[0]

def test_F07_a_photograph_of_a_telephone_is_upright(tmp_path, cams, monkeypatch):
    phone = golden('field/F07_phone.jpg')
    frames, _ = started_with(monkeypatch, image=str(phone), cams=str(tmp_path/'walk.txt'), out=str(tmp_path/'out'))
    with Image.open(phone) as file: shown = np.array(ImageOps.exif_transpose(file)).transpose(2, 0, 1)[None]
    assert (frames.mul(255).round().byte().numpy() == cover_crop(shown, 64)).all()

@pytest.mark.parametrize('model,learned', [('kiwhansong/DFoT', lambda cams: cams), ('DFoT_RE10K.ckpt', lambda cams: cams),
                                           ('tiny_base', lambda cams: crop_cams(cams, 720, 1280, 64))])
def test_F26_a_model_gets_the_cameras_that_it_was_trained_with(tmp_path, cams, monkeypatch, model, learned):
    "From a wide picture, from the cameras alone, from a clip with wide frames and from one with square frames, as released."
    Image.new('RGB', (1280, 720)).save(tmp_path/'wide.png')
    for name, (h, w) in dict(wide=(144, 256), square=(64, 64)).items():
        layout = Layout(tmp_path/name, 'test')
        write_pose_table(layout.table('a'), cams)
        write_mp4(layout.mp4('a', 64), np.zeros((8, 3, h, w), np.uint8))
    walk_file = str(tmp_path/'walk.txt')
    for args in (dict(image=str(tmp_path/'wide.png'), cams=walk_file), dict(cams=walk_file), dict(clip=str(tmp_path/'wide'/'test'/'a')),
                 dict(clip=str(tmp_path/'square'/'test'/'a'))):
        path = started_with(monkeypatch, model=model, out=str(tmp_path/'out'), **args)[1]
        torch.testing.assert_close(path, learned(cams), atol=2e-5, rtol=0)
