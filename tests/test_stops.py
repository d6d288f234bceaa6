"Ctrl-C and SIGTERM: one sentence that says what is left and how it goes on, exit code 130 or 143; the same command then ends as if never stopped."
import json, os, signal, subprocess, sys, time

import pytest
from conftest import ROOT
from test_cache import at_work, command, finish, launch, leftovers, root, shards, whole, world       # noqa: F401 (fixtures)

from dfot_vggt.app.compare import StudyCfg, short_control
from dfot_vggt.core import build
from dfot_vggt.learn.config import WorldCfg

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
each_signal = pytest.mark.parametrize('how', CODES, ids=lambda s: s.name)

def stop(p, how, ready):
    "Send a signal when `ready()`; exit code and everything that was printed."
    deadline = time.time() + 300
    while not ready():
        assert p.poll() is None and time.time() < deadline, p.communicate()[0]
        time.sleep(.01)
    p.send_signal(how)
    out, _ = p.communicate(timeout=120)
    assert 'Traceback' not in out, out
    return p.returncode, out

# --- dfot_cache

@each_signal
def test_dfot_cache_is_stopped(world, root, how):                                                     # noqa: F811
    p = command(root)
    code, out = stop(p, how, lambda: whole(root) and at_work(root, p))
    assert code == CODES[how] and out.count('all finished shards stay, and the same command goes on from there') == 1, (code, out)
    done = whole(root)
    assert 0 < len(done) < 6 and not leftovers(root), 'no claim and no half file is left'
    out = finish(command(root))
    assert f'{6 - len(done)} of them made' in out and shards(root) == shards(world), 'byte for byte'

# --- dfot_study

RUN = short_control()
RUN = RUN.replace(world=WorldCfg(rooms=2, test_rooms=2, frames=16), batch=2, finite=2, train=RUN.train.replace(steps=30, warmup=1, save_every=10),
                  control=RUN.control.replace(mid=1))
STUDY = StudyCfg(RUN, walks=2, skip=2, steps=1)

def study(at, cfg=STUDY, folder='study'):
    cfg.save(at/'study.yaml')
    return launch(at, '-m', 'dfot_vggt.app.study', '--config', 'study.yaml', '--folder', folder, '--root', 'runs')

def test_dfot_study_is_stopped_while_it_trains(tmp_path):
    log = tmp_path/'study'/RUN.name/'log.jsonl'
    code, out = stop(study(tmp_path), signal.SIGINT, lambda: log.exists() and len(log.read_text().splitlines()) > 2)
    assert code == 130 and 'dfot_study: stopped after step' in out and 'the same call continues' in out, out
    assert sorted(p.name for p in (tmp_path/'study').iterdir() if p.name[0] != '.') == [RUN.name, 'study.yaml'], 'no results yet'
    assert build(tmp_path/'study'/'study.yaml') == STUDY
    another = STUDY.replace(seed=1)
    assert 'seed: 0, not 1' in finish(study(tmp_path, another), 1), 'the folder belongs to the first study, stopped or not'
    finish(study(tmp_path))
    record = json.loads((tmp_path/'study'/'results.json').read_text())
    assert len(record['loss']) == 30 and (tmp_path/'study'/'report.html').exists()
    assert [json.loads(line)['step'] for line in log.read_text().splitlines()] == [*range(30)]

def test_dfot_study_is_stopped_while_it_renders(tmp_path):
    many = STUDY.replace(run=RUN.replace(world=WorldCfg(rooms=500, test_rooms=2, frames=16)))
    code, out = stop(study(tmp_path, many), signal.SIGTERM, lambda: len([*tmp_path.glob('runs/*/training_64/*')]) > 2)
    assert code == 143 and out.count('the same command goes on from there') == 1, (code, out)
    assert not (tmp_path/'study').exists() and not [p for p in (tmp_path/'runs').rglob('*') if '.tmp' in p.name]

# --- a full disk

def test_R14_a_study_on_a_full_disk(tmp_path):
    "At the first file and at a later one: a sentence with the file, no traceback, and nothing half-written."
    from test_cache import tmpfs
    STUDY.run.world.folder(tmp_path/'runs')
    for size in 4096, 600_000:
        with tmpfs(tmp_path/f'small{size}', size) as small:
            out = finish(study(tmp_path, folder=str(small)), 1)
            assert 'Traceback' not in out and str(small) in out.splitlines()[-1], out
            assert not [p for p in small.rglob('*') if '.tmp' in p.name] and not (small/'report.html').exists()
