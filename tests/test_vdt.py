"A VDT through the common commands: two processes, kills, signals, and input that cannot be used."
import json, os, signal, subprocess, sys

import pytest
import torch
from conftest import ROOT
from dfot_vggt.app.cache import dfot_cache
from dfot_vggt.app.generate import load_model
from dfot_vggt.app.rollout import dfot_rollout
from dfot_vggt.app.study import dfot_study
from dfot_vggt.app.train import dfot_train
from dfot_vggt.core import build
from dfot_vggt.data.class_folders import FoldersCfg
from dfot_vggt.learn.ablate import run_ablation
from dfot_vggt.learn.cached import all_recipes
from dfot_vggt.learn.config import RunCfg, VGGTRunCfg, WorldCfg
from dfot_vggt.learn.heldout import heldout_psnr, loss_on_batches, record_run
from dfot_vggt.learn.recipes import RECIPES, baseline, recipe_of, show_diff
from dfot_vggt.learn.runs import build_trainable, continue_from, export_weights, load_run, load_trained, recipe_hash, train_run
from dfot_vggt.run_folder import saved_step
from dfot_vggt.systems.vdt import VDTCfg, load_vdt
from dfot_vggt.systems.vdt_run import VDT_RECIPES, VDTRunCfg, vdt_tiny
from test_processes import KILLS, lines_of, start, stopped, there_are_two, until, weights_apart

MODEL = VDTCfg(size=16, channels=3, frames=8, patch=4, width=32, depth=1, heads=2)

def mini(steps=5, dropout=0., **changes):
    "The recipe `vdt_tiny` with a very small model and two rooms, in float32; its optimizer is Muon. Class dropout is drawn per process."
    run = vdt_tiny()
    train = run.train.replace(precision='no', steps=steps, warmup=2, save_every=3, decay=0.)
    return run.replace(name='mini', world=WorldCfg(rooms=2, test_rooms=1, frames=16, size=16), model=MODEL.replace(class_dropout=dropout), train=train, **changes)

def files(folder): return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file()}

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

# --- processes, kills, signals

def test_two_processes_train_what_one_trains(here):
    "The limits are those of test_processes: the order in which a batch is summed."
    mini().save(here/'mini.yaml')
    dfot_train('mini.yaml', 'one')
    p = start(here, 'mini.yaml', '--folder', 'two')
    out, err = p.communicate(timeout=240)
    assert p.returncode == 0 and 'Traceback' not in err and out.count('mini: 5 steps, loss') == 1, out + err
    there_are_two(here)
    one, two = ([json.loads(l)['loss'] for l in (here/f/'log.jsonl').read_text().splitlines()] for f in ('one', 'two'))
    assert two == pytest.approx(one, rel=1e-4) and len(two) == 5
    largest, share = weights_apart(here/'one', here/'two')
    assert largest < 1e-4 and share < 1e-5, (largest, share)
    untrained, trained = mini().build(), load_run(mini().build(), here/'two')
    apart = max((p - q).abs().max().item() for p, q in zip(untrained.parameters(), trained.parameters()))
    assert apart > 100*largest, 'and they did train'

def test_killed_and_continued_equals_never_killed(here):
    "kill -9 at random moments, in the middle of a write too; with class dropout, whose stream depends on the step."
    seed = int.from_bytes(os.urandom(3), 'big')
    (here/'kills.py').write_text(KILLS)
    mini(8, dropout=.3).save(here/'mini.yaml')
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([sys.executable, 'kills.py', 'mini.yaml', 'runs', str(seed), '2'], env=env, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, (seed, p.stdout + p.stderr)
    whole = here/'runs'/'whole'
    for cut in (here/'runs').glob('cut*'):
        assert (cut/'model.safetensors').read_bytes() == (whole/'model.safetensors').read_bytes(), (seed, cut.name)
        assert sorted(f.name for f in cut.rglob('*')) == sorted(f.name for f in whole.rglob('*')), (seed, cut.name)
    assert (here/'runs'/'cut').exists()

def test_an_interrupt_leaves_a_state_that_continues(here):
    run = mini(5000)
    run.save(here/'mini.yaml')
    p = start(here, 'mini.yaml', processes=1)
    until(p, lambda: lines_of(here/'runs'/'mini'/'log.jsonl') > 3)
    stopped(p, signal.SIGINT, 130, 'stopped after step', 'saved in runs/mini')
    step, kept = saved_step(here/'runs'/'mini'), lines_of(here/'runs'/'mini'/'log.jsonl')
    assert step == kept > 3
    class Enough(Exception): pass
    def first(event): raise Enough(event.step)
    with pytest.raises(Enough, match=f'^{step}$'): train_run(run, root='runs', observers=(first,))
    log = [json.loads(l) for l in (here/'runs'/'mini'/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in log] == list(range(step + 1)), 'no step is repeated or left out'

@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share(here):
    mini(batch=3).save(here/'mini.yaml')
    p = start(here, 'mini.yaml')
    out, err = p.communicate(timeout=240)
    there_are_two(here)
    assert p.returncode != 0, out + err
    assert err.count('recipe mini: batch: expected a multiple of 2 processes, got 3; ') == 1, err
    assert not (here/'runs'/'mini').exists(), 'a corrected recipe of this name can be started'

# --- the command with input that cannot be used

def refusal(*args, **kw):
    with pytest.raises(SystemExit) as e: dfot_train(*args, **kw)
    message = str(e.value)
    assert '\n' not in message and 'expected' in message and '; ' in message and len(message) < 800, message
    return message

def changed(**edits):
    "The YAML of the small recipe with some lines replaced."
    text = mini().to_yaml()
    for old, new in edits.values():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text

NO_TASK = {name: (f'  {name}: {share}', f'  {name}: 0.0') for name, share in dict.fromkeys(
    ('predict', 'backward', 'interpolation', 'unconditional', 'one_frame', 'arbitrary_interpolation'), 2.0).items()} | {'s': ('spatial_temporal: 3.0', 'spatial_temporal: 0')}
BAD = {                                            # what -> (the file, text that the message must contain)
    'no task': (changed(**NO_TASK), 'MaskMixture: expected a task with a share above 0, got none; e.g. predict=1.'),
    'a negative share': (changed(a=('predict: 2.0', 'predict: -1')), 'MaskMixture.predict: expected'),
    'an unknown task': (changed(a=('predict: 2.0', 'predcit: 2.0')), "did you mean 'predict'?"),
    'no rooms': (changed(a=('  rooms: 2', '  rooms: 0')), 'WorldCfg.rooms: expected at least 1, got 0'),
    'clips that are too short': (changed(a=('  frames: 16', '  frames: 7')), 'expected at least 8, for windows of 8 frames, got 7; use frames=8 or more'),
    'another size': (changed(a=('test_rooms: 1\n  frames: 16\n  size: 16', 'test_rooms: 1\n  frames: 16\n  size: 32')), 'world.size: expected 16, the size of the model, got 32'),
    'latents in place of RGB': (changed(a=('channels: 3', 'channels: 4')), 'expected 3 for RGB videos, got 4'),
    'one frame': (changed(a=('  frames: 8', '  frames: 1')), 'at least 2, context and target, got 1'),
    'no heads for this width': (changed(a=('width: 32', 'width: 33')), 'VDTCfg.width: expected a multiple of 4 and of heads=2, got 33'),
    'no patches of this size': (changed(a=('patch: 4', 'patch: 5')), 'VDTCfg.size: expected a multiple of patch=5, got 16'),
    'no batch': (changed(a=('batch: 8', 'batch: 0')), 'VDTRunCfg.batch: expected'),
    'a folder elsewhere': (changed(a=('name: mini', 'name: ../mini')), 'VDTRunCfg.name: expected one word'),
    'foreign code': (changed(a=('dfot_vggt.systems.vdt.VDTCfg', 'os.system')), 'os.system'),
    'the base class': ('_target_: dfot_vggt.learn.config.SystemRunCfg\nname: x\n', 'SystemRunCfg: expected a field `train`'),
    'another config': (MODEL.to_yaml(), 'expected a RunCfg or VGGTRunCfg or SystemRunCfg, got VDTCfg')}

@pytest.mark.parametrize('what', BAD)
def test_a_recipe_that_cannot_be_trained(here, what):
    text, words = BAD[what]
    (here/'bad.yaml').write_text(text)
    message = refusal('bad.yaml')
    assert words in message and 'bad.yaml' in message, message
    assert [p.name for p in here.iterdir()] == ['bad.yaml'], 'nothing is rendered or written'

def test_an_unknown_name(here):
    assert "did you mean 'vdt_tiny'?" in refusal('vdt_tny')
    assert not [*here.iterdir()]

def test_videos_that_are_not_there(here):
    "The recipe is right, the folder is not: one sentence, and no folder of the run."
    run = mini(2)
    for where, words in (('absent', 'absent: expected a folder with one folder per class, got no such folder; '), ('empty', 'one folder per class'),
                         ('loose', 'outside of class folders'), ('hollow', 'hollow/Class: expected ')):
        if where != 'absent': (here/where).mkdir()
        if where == 'loose': (here/where/'a.mp4').write_bytes(b'')
        if where == 'hollow': (here/where/'Class').mkdir()
        run.replace(world=FoldersCfg(where)).save(here/'videos.yaml')
        assert words in refusal('videos.yaml'), where
        assert not (here/'runs').exists() or not [*(here/'runs').rglob('*')]

def test_latents_that_are_not_there(here):
    "`dfot_train vdt_sky` before the videos are encoded: the sentence holds the call that does it, and that call says if there are no videos."
    message = refusal('vdt_sky')
    assert "data/sky_latents: expected latents, got none; make them once: from dfot_vggt.systems.latents import encode_folders; " in message, message
    with pytest.raises(FileNotFoundError, match='data/sky_timelapse: expected a folder with one folder per class, got no such folder'):
        exec(message.split('make them once: ')[1])
    assert not [f for f in here.rglob('*') if f != here/'runs'], 'nothing was written'

def test_a_folder_of_another_run(here):
    mini(2).save(here/'a.yaml')
    dfot_train('a.yaml', 'a')
    kept = files(here/'a')
    for other, words in ((mini(3, seed=1), "{'seed': 1}"), (mini(3, dropout=.2), "'model.class_dropout': 0.2"), (mini(1), "'train.steps': 1"),
                         (mini(3, masks=vdt_tiny().masks.replace(predict=0.)), "'masks.predict': 0.0")):
        other.save(here/'b.yaml')
        assert words in refusal('b.yaml', 'a'), words
    RECIPES['tiny_base']().replace(name='mini').save(here/'b.yaml')
    assert "'_target_': 'RunCfg'" in refusal('b.yaml', 'a')
    assert files(here/'a') == kept

# --- what is meant for denoisers with cameras refuses a VDT in one sentence; the rest takes it

def test_recipes_by_name(here):
    assert recipe_hash(vdt_tiny()) == '9b222cdcdbdf' and vdt_tiny().key() == '981d99c0f6ce', 'what weights and records bear must not change'
    both = RECIPES | VDT_RECIPES
    for name in VDT_RECIPES:
        assert recipe_of(name, both) == VDT_RECIPES[name]() and isinstance(recipe_of(name, both), VDTRunCfg)
        with pytest.raises(SystemExit, match='expected a YAML file or one of'): recipe_of(name)
    with pytest.raises(ValueError, match='vdt_tiny: expected a recipe of a denoiser, got VDTRunCfg'): baseline('vdt_tiny', both)
    with pytest.raises(ValueError, match='a recipe of a denoiser'): show_diff('vdt_tiny', 'baseline', both)
    assert 'shipped_base' in show_diff('tiny_control', 'baseline', both).data
    mini().save(here/'runs'/'mini'/'recipe.yaml')
    assert all_recipes(here/'runs') == {}, 'a VDT uses no cached features'

def test_commands_and_functions_for_denoisers_refuse_a_vdt(here):
    run = mini(2)
    run.save(here/'mini.yaml')
    dfot_train('mini.yaml')
    kept, folder = files(here), here/'runs'/'mini'
    export_weights(folder, 'mini', here/'shared')
    refusals = [
        (SystemExit, 'recipe vdt_tiny: expected layers of VGGT .* got none; nothing can be kept for it', lambda: dfot_cache('vdt_tiny')),
        (SystemExit, 'recipe mini: expected layers of VGGT', lambda: dfot_cache('mini.yaml')),
        (SystemExit, "expected one of .*, got 'vdt_tiny'", lambda: dfot_rollout('vdt_tiny')),
        (SystemExit, 'expected the run of a denoiser, got VDTRunCfg', lambda: dfot_rollout('runs/mini', clip='absent/test/room')),
        (SystemExit, 'expected a StudyCfg, got VDTRunCfg', lambda: dfot_study('mini.yaml')),
        (ValueError, 'expected the run of a denoiser, got VDTRunCfg', lambda: load_model('runs/mini')),
        (ValueError, 'mini.yaml: expected the run of a denoiser, got VDTRunCfg', lambda: load_trained('mini.yaml', folder))]
    model = load_run(build_trainable(run), folder, run)
    for function in (lambda r, m: heldout_psnr(r, m), lambda r, m: loss_on_batches(r, m, 0), lambda r, m: record_run(r, folder, to=here/'results'),
                     lambda r, m: run_ablation(r, folder, to=str(here/'results'))):
        refusals.append((ValueError, 'of mini: expected the run of a denoiser, got VDTRunCfg', lambda f=function: f(run, model)))
    for error, words, call in refusals:
        with pytest.raises(error, match=words) as e: call()
        assert '\n' not in str(e.value) and 'Error' not in str(e.value), e.value
    assert {k: v for k, v in files(here).items() if k.parts[0] != 'shared'} == kept, 'nothing was written'

def test_exported_weights_load_and_continue(here):
    run = mini(12)
    model, _ = train_run(run, root='runs')
    export_weights('runs/mini', 'mini', 'shared')
    assert build('shared/mini.yaml') == run and [json.loads(l)['step'] for l in open('shared/mini.jsonl')] == [9]
    loaded = load_run(run.build(), 'shared/mini.safetensors', run)
    for source in ('shared/mini.safetensors', 'runs/mini'):                     # by the loader of released weights, too
        by_name = load_vdt(source, run.model)
        for (n, p), q in zip(by_name.named_parameters(), (model if 'runs' in source else loaded).parameters(), strict=True): assert torch.equal(p, q), n
    for (n, p), q in zip(loaded.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        if not p.requires_grad: assert torch.equal(p, q), n
    continue_from(run.replace(train=run.train.replace(steps=14)), 'shared/mini.safetensors', 'runs/continued')
    log = train_run(run.replace(train=run.train.replace(steps=14)), 'runs/continued', 'runs')[1]
    assert [r['step'] for r in log] == [12, 13]
