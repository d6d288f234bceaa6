"Configs that somebody else wrote: malformed files, wrong values and hostile names end in one sentence, run nothing and create nothing (R8, R14, R15)."
import importlib, math, os, pkgutil, random, re, subprocess, sys
from dataclasses import fields
from html.parser import HTMLParser

import dfot_vggt
import plotly.graph_objects as go
import pytest
import torch
from conftest import ROOT
from dfot_vggt.app.cache import dfot_cache
from dfot_vggt.app.compare import StudyCfg, as_html, provenance, write_report
from dfot_vggt.app.study import dfot_study
from dfot_vggt.app.train import dfot_train
from dfot_vggt.core import LARGEST_YAML, Cfg, build
from dfot_vggt.denoiser.diffusion import DiffusionCfg, DiscreteCfg
from dfot_vggt.denoiser.guidance import Branch, HistoryGuidance
from dfot_vggt.denoiser.tasks import AnyContext, PrefixMixture, SharedFuture, Task, VariableContext
from dfot_vggt.denoiser.uvit import UViTCfg
from dfot_vggt.geometry.aggregator import AggregatorCfg
from dfot_vggt.geometry.feature_cache import CacheCfg
from dfot_vggt.geometry.heads import DPTCfg
from dfot_vggt.geometry.tracker import TrackCfg
from dfot_vggt.geometry.vggt import VGGTCfg
from dfot_vggt.inject.align import AlignCfg
from dfot_vggt.inject.controlnet import ControlCfg
from dfot_vggt.inject.memory import MemoryCfg
from dfot_vggt.inject.points import PointsCfg
from dfot_vggt.inject.tokens import TokenCfg
from dfot_vggt.learn.cached import written
from dfot_vggt.learn.config import Re10kCfg, RunCfg, SystemRunCfg, VGGTRunCfg, WorldCfg
from dfot_vggt.learn.metrics import METRICS, Table
from dfot_vggt.learn.muon import MuonCfg
from dfot_vggt.learn.recipes import table, tiny_base, tiny_control
from dfot_vggt.learn.train import TrainCfg
from dfot_vggt.measure import Report
from dfot_vggt.show import fig, lines, plot_checks, video_tag
from dfot_vggt.systems.vdt import VDTCfg
from dfot_vggt.systems.vdt_masks import MaskMixture
from dfot_vggt.systems.vdt_run import VDTRunCfg
from dfot_vggt.trace import Trace, html_table, liveness, trace_diff
from dfot_vggt.widgets.level_explorer import LevelExplorer

MINI = tiny_base().replace(name='mini', world=WorldCfg(rooms=2, test_rooms=2, frames=16), batch=2)
TEXT = MINI.to_yaml()
def changed(old, new):
    assert TEXT.count(old), old
    return TEXT.replace(old, new, 1)

BAD = {                                            # the file's content -> what the message must contain
    'empty': '', 'a comment': '# nothing\n', 'a list': '- 1\n- 2\n', 'text': 'hello', 'a number': '5', 'null': '~', 'true': 'true',
    'no class': changed('_target_: dfot_vggt.learn.config.RunCfg\n', ''), 'cut': TEXT[:len(TEXT)//2] + '\n  : [', 'a tab': changed('  rooms:', '\trooms:'),
    'indentation': changed('  rooms:', ' rooms:'), 'a key twice': changed('batch: 2', 'batch: 2\nbatch: 4'), 'two documents': TEXT + '---\n' + TEXT,
    'a reference': changed('batch: 2', 'batch: &b 2\nseed_: *b'), 'a merge': changed('batch: 2', '<<: {batch: 2}'),
    'a tag': changed('batch: 2', 'batch: !!python/object/apply:os.system ["touch exploded"]'),
    'a bomb': 'a: &a [x, x]\n' + ''.join(f'b{i}: &b{i} [*{"b" + str(i - 1) if i else "a"}, *a]\n' for i in range(40)),
    'a resolver': changed('name: mini', 'name: ${oc.env:HOME}'), 'decoded': changed('batch: 2', 'batch: ${oc.decode:"2"}'),
    'interpolated': changed('batch: 2', 'batch: ${seed}'), 'not UTF-8': b'\xff\xfe\x00name', 'a picture': b'\x89PNG\r\n\x1a\n\x00\x00',
    'NUL': TEXT.encode() + b'\x00', 'too large': 'a: "' + 'x'*LARGEST_YAML + '"', 'deep': 'a: ' + '['*5000, 'deep blocks': ''.join(' '*i + 'a:\n' for i in range(500)),
    'foreign': '_target_: os.system\ncommand: touch exploded\n', 'foreign inside': changed('dfot_vggt.denoiser.tasks.PrefixMixture', 'os.system'),
    'no such class': changed('config.RunCfg', 'config.RunCgf'), 'no such module': changed('learn.config.RunCfg', 'learn.confg.RunCfg'),
    'no config class': '_target_: dfot_vggt.core.FileLock\nlock_file: exploded\n', 'a target of numbers': changed('_target_: dfot_vggt.learn.config.RunCfg', '_target_: 5'),
    'another kind': CacheCfg().to_yaml(), 'a wrong inner class': changed('dfot_vggt.learn.config.WorldCfg', 'dfot_vggt.learn.train.TrainCfg'),
    'an unknown key': changed('warmup:', 'warmpu:'), 'a key missing': changed('name: mini\n', ''), 'a number as text': changed('lr: 0.003', "lr: '3e-3'"),
    'NaN': changed('lr: 0.003', 'lr: .nan'), 'infinite': changed('lr: 0.003', 'lr: .inf'), 'huge': changed('lr: 0.003', 'lr: 1e999'),
    'a bool': changed('batch: 2', 'batch: true'), 'a float': changed('batch: 2', 'batch: 2.5'), 'octal': changed('batch: 2', 'batch: 010'),
    'a dict': changed('batch: 2', 'batch: {a: 1}'), 'none': changed('batch: 2', 'batch:'), 'negative': changed('batch: 2', 'batch: -2'),
    'lr -1': changed('lr: 0.001', 'lr: -1'), 'clip -1': changed('clip: 1.0', 'clip: -1'), 'save_every 0': changed('save_every: 250', 'save_every: 0'),
    'steps 0': changed('steps: 46000', 'steps: 0'), 'ema 1': changed('ema: 0.999', 'ema: 1'), 'precision': changed('precision: auto', 'precision: fp8'),
    'one beta': changed('  betas:\n  - 0.9\n  - 0.99', '  betas:\n  - 0.9'), 'a path': changed('name: mini', 'name: ../../x'), 'absolute': changed('name: mini', 'name: /tmp/x'),
    'no name': changed('name: mini', "name: ''"), 'name no': changed('name: mini', 'name: no'), 'name 1': changed('name: mini', 'name: 1'),
    'rooms 0': changed('rooms: 2', 'rooms: 0'), 'skip reversed': changed('  - 1\n  - 3', '  - 3\n  - 1'), 'size 63': changed('  size: 64\n  frames', '  size: 63\n  frames'),
    'timesteps 1': changed('timesteps: 1000', 'timesteps: 1'), 'schedule': changed('schedule: shifted', 'schedule: shiftd'), 'share 2': changed('clips: 0.5', 'clips: 2')}

def wrote(content, path):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

def is_one_sentence(e, path, most=900):
    text = str(e.value.code)
    assert str(path) in text and '; ' in text and '\n' not in text and len(text) < most and 'Error' not in text, text
    return text

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize('fault', BAD)
def test_R14_a_malformed_recipe_is_one_sentence(here, capsys, fault):
    "In `dfot_train` and `dfot_cache`: file, expected, got, way out; nothing is run or created."
    path = wrote(BAD[fault], here/'bad.yaml')
    for command in (dfot_train, dfot_cache):
        with pytest.raises(SystemExit) as e: command('bad.yaml')
        is_one_sentence(e, 'bad.yaml')
    assert [p.name for p in here.iterdir()] == ['bad.yaml'] and 'Traceback' not in capsys.readouterr().err

STUDY = StudyCfg().to_yaml()
BAD_STUDIES = {fault: BAD[fault] for fault in ('empty', 'a list', 'cut', 'a tag', 'a bomb', 'deep', 'not UTF-8', 'foreign')} | {
    'walks 1': STUDY.replace('walks: 6', 'walks: 1'), 'context 0': STUDY.replace('context: 4', 'context: 0'), 'context 8': STUDY.replace('context: 4', 'context: 8'),
    'steps -1': STUDY.replace('\nsteps: 10', '\nsteps: -1'), 'a path inside': STUDY.replace('name: short_control', 'name: ../x'), 'skip': STUDY.replace('\nskip: 2', '\nskip: 0'),
    'a recipe': TEXT, 'a slip': STUDY.replace('walks:', 'wlaks:'), 'lr': STUDY.replace('lr: 0.001', "lr: 'fast'")}

@pytest.mark.parametrize('fault', BAD_STUDIES)
def test_R14_a_malformed_study_is_one_sentence(here, capsys, fault):
    assert fault == 'a recipe' or BAD_STUDIES[fault] != STUDY
    wrote(BAD_STUDIES[fault], here/'bad.yaml')
    with pytest.raises(SystemExit) as e: dfot_study('bad.yaml', 'study', 'runs')
    is_one_sentence(e, 'bad.yaml')
    assert [p.name for p in here.iterdir()] == ['bad.yaml'] and 'Traceback' not in capsys.readouterr().err

def test_R14_no_file_is_one_sentence(here):
    (here/'folder.yaml').mkdir()
    os.symlink('nowhere', here/'link.yaml')
    os.mkfifo(here/'pipe.yaml')
    for name in ('folder.yaml', 'link.yaml', 'pipe.yaml', 'absent.yaml', 'x'*300 + '.yaml', '/dev/zero', '/proc/self/mem', ''):
        with pytest.raises(SystemExit) as e: dfot_train(name)
        assert '\n' not in str(e.value.code) and '; ' in str(e.value.code), e.value.code

def test_R14_a_huge_file_is_refused_unread(here):
    with open(here/'huge.yaml', 'wb') as f: f.truncate(100_000_000_000)
    with pytest.raises(SystemExit) as e: dfot_train('huge.yaml')
    assert '100,000,000,000' in is_one_sentence(e, 'huge.yaml')

@pytest.mark.parametrize('module,args', [('app.train', ['bad.yaml']), ('app.study', ['--config', 'bad.yaml'])])
def test_R14_the_command_itself(here, module, args):
    "In a process of its own, as a user runs it: exit code 1, one line, nothing created."
    wrote(BAD['a key twice'], here/'bad.yaml')
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([sys.executable, '-m', f'dfot_vggt.{module}', *args], cwd=here, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == '' and "'batch' twice in line" in done.stderr, done
    assert 'Traceback' not in done.stderr and [p.name for p in here.iterdir()] == ['bad.yaml']

def test_R14_damaged_bytes_are_one_sentence(here):
    "A recipe in which bytes were changed, inserted or lost builds, or is refused in one line."
    draw, path = random.Random(0), here/'run.yaml'
    tokens = [b':', b'- ', b'\t', b'"', b'{', b'[', b'&a', b'*a', b'!', b'#', b'\n', b'${', b'%', b'|', b'>', b'---\n', b'1e99', b'-']
    for _ in range(150):
        data = bytearray(TEXT.encode())
        for _ in range(draw.randint(1, 4)):
            i, kind = draw.randrange(len(data)), draw.random()
            if kind < .4: data[i] = draw.randrange(256)
            elif kind < .7: data[i:i] = draw.choice(tokens)
            else: del data[i:i + draw.randint(1, 30)]
        path.write_bytes(data)
        try: build(path)
        except (ValueError, KeyError, TypeError, OSError) as e:
            assert str(e.args[0]).startswith(str(path)) and '\n' not in e.args[0] and len(e.args[0]) < 900, e.args

def test_R8_a_recipe_from_somebody_else_stays_below_the_root(here):
    for name in ('../../x', '/abs/x', '${oc.env:HOME}', "''", '.', '..', '~', 'a/b', 'features', 'world-2dc760cb4c45'):
        wrote(changed('name: mini', f'name: {name}'), here/'bad.yaml')
        with pytest.raises(SystemExit) as e: dfot_train('bad.yaml', root=str(here/'deep'/'runs'))
        is_one_sentence(e, 'bad.yaml')
    assert [p.name for p in here.iterdir()] == ['bad.yaml']

def test_R14_recipes_in_a_folder_are_read_by_the_same_reader(here):
    MINI.save(here/'good.yaml')
    for fault in ('cut', 'a tag', 'a bomb', 'a resolver', 'negative', 'a path'):
        wrote(BAD[fault], here/'bad.yaml')
        with pytest.raises(ValueError, match='bad.yaml: .*what it uses is not known: repair or remove it'): written(here)

def test_one_reader_of_yaml():
    "No other module reads YAML, or writes it without the config class."
    for path in (ROOT/'dfot_vggt').rglob('*.py'):
        if path.name != 'core.py': assert not re.search(r'OmegaConf\.load|yaml\.(safe_)?load|import yaml', path.read_text(encoding='utf8')), path

# --- every config class checks what it is made of

def subclasses(cls):
    for c in cls.__subclasses__(): yield from (c, *subclasses(c))
for m in pkgutil.walk_packages(dfot_vggt.__path__, 'dfot_vggt.'): importlib.import_module(m.name)
MADE = {Branch: Branch(1.), HistoryGuidance: HistoryGuidance.conditional(), ControlCfg: ControlCfg(8, 8), TokenCfg: TokenCfg(8, 8), AlignCfg: AlignCfg(8),
        RunCfg: RunCfg('a'), VGGTRunCfg: VGGTRunCfg('a'), VDTRunCfg: VDTRunCfg('a')}
CONFIGS = [MADE.get(c) or c() for c in dict.fromkeys(subclasses(Cfg)) if c.__module__.startswith('dfot_vggt') and c is not SystemRunCfg]     # a base class

@pytest.mark.parametrize('cfg', CONFIGS, ids=lambda c: type(c).__name__)
def test_R14_every_field_has_the_type_of_its_annotation(cfg):
    "A value of another type is a `TypeError` that names class and field; no number is NaN or infinite; a config survives YAML."
    for f in fields(cfg):
        name, value = f'{type(cfg).__name__}.{f.name}', getattr(cfg, f.name)
        for wrong in (object(), {'a': 1}, b'x', torch.ones(1), '${oc.env:HOME}', 'a\0b', float("nan"), (math.inf,), 10**400, 'a'*5):
            if isinstance(wrong, str) and isinstance(value, str) and wrong == 'aaaaa': continue
            with pytest.raises((TypeError, ValueError)) as e: cfg.replace(**{f.name: wrong})
            assert 'expected' in str(e.value) and '; ' in str(e.value) and len(str(e.value)) < 700, (name, wrong, e.value)
        for wrong in (True, '1', '1e-3') if type(value) in (int, float) else ():
            with pytest.raises(TypeError, match=re.escape(name)): cfg.replace(**{f.name: wrong})
        for wrong in (1, 'yes', None) if type(value) is bool else ():
            with pytest.raises(TypeError, match=re.escape(name)): cfg.replace(**{f.name: wrong})
        if isinstance(value, tuple): assert cfg.replace(**{f.name: [*value]}) == cfg
    again = build(cfg.to_dict(), kind=type(cfg))
    assert again == cfg and again.key() == cfg.key() and hash(again) == hash(cfg)

def test_all_config_classes_are_tested():
    assert {type(c).__name__ for c in CONFIGS} >= {'TrainCfg', 'MuonCfg', 'RunCfg', 'VGGTRunCfg', 'WorldCfg', 'Re10kCfg', 'UViTCfg', 'DiffusionCfg', 'DiscreteCfg',
        'VGGTCfg', 'AggregatorCfg', 'DPTCfg', 'TrackCfg', 'CacheCfg', 'ControlCfg', 'TokenCfg', 'MemoryCfg', 'AlignCfg', 'StudyCfg', 'PrefixMixture', 'Branch', 'VDTCfg', 'MaskMixture', 'VDTRunCfg'}

NONSENSE = [
    (TrainCfg(), dict(steps=(0, -1), lr=(0., -1e-3), warmup=(-1,), decay=(-.1, 1.1), betas=((.9, 1.), (-.1, .9)), weight_decay=(-.1,), clip=(0., -1.),
                      ema=(1., -.1), precision=('fp8', ''), save_every=(0,), scale=((('base.', -1.),),))),
    (MuonCfg(), dict(lr=(0.,), momentum=(1.,), weight_decay=(-1.,))),
    (WorldCfg(), dict(rooms=(0,), test_rooms=(-1,), frames=(0,), size=(0,), skip=((0, 1), (3, 2)))), (Re10kCfg(), dict(where=('',), skip=((2, 1),))),
    (RunCfg('a'), dict(batch=(0,), history=(-1,), noised_context=(1.1,), finite=(-1,), layers=((-1,),))),
    (RunCfg('a', vggt=VGGTCfg.tiny()), dict(layers=((5,),))), (VGGTRunCfg('a'), dict(frames=(0,), batch=(7,), dense=(0,))),
    (VDTCfg(), dict(size=(0, 33), channels=(0,), frames=(0,), patch=(0, 5), width=(0, 1153), depth=(0,), heads=(0, 7), classes=(0,), class_dropout=(1., -.1))),
    (MaskMixture(), dict(predict=(-1.,), spatial_temporal=(-.1,))), (VDTRunCfg('a'), dict(batch=(0,), model=(VDTCfg.tiny().replace(channels=4), VDTCfg.tiny().replace(frames=1)))),
    (UViTCfg(), dict(channels=((64, 0), (64,)), blocks=(('R', 'X'),), updown=((0,),), mid=(0,), heads=(0,), emb=(0,), patch=(0,), size=(0, 63, -64), frames=(0,),
                     freqs=(0,), cond_patch=(0,), pos=('x',), rope_frames=(-1,), dropout=((0., 1.),), cond_dropout=(2.,), std=((0., 1., 1.),))),
    (DiffusionCfg(), dict(timesteps=(1, 10**9), shift=(0.,), precond=(0.,), clip=(0.,), decay=(2.,), schedule=('x',), prediction_type=('eps',), loss_weight=('',))),
    (DiscreteCfg(), dict(timesteps=(0,), shift=(-1.,), schedule=('linaer',))), (SharedFuture(), dict(first=(-1,))), (Task(), dict(dropout=(1.5,))),
    (AnyContext(), dict(sets=((),))), (VariableContext(), dict(prob=(-.5,))), (PrefixMixture(), dict(clips=(2.,), most=(0,), shared=(-1.,))),
    (AggregatorCfg(), dict(img_size=(0, 519, -14), patch=(0,), dim=(0, 1000), depth=(0,), heads=(0,), mlp=(0,), registers=(-1,), rope=(0.,), dino_depth=(0,))),
    (VGGTCfg(), dict(camera_depth=(0,), camera_heads=(0,), depth=(23,))), (DPTCfg(), dict(features=(0, 30), channels=((4, 4),), layers=((-1, 1, 2, 3),))),
    (TrackCfg(), dict(levels=(0,), radius=(-1,), latent=(0,), hidden=(0,), depth=(0,), heads=(0,), virtual=(0,), steps=(0,))),
    (CacheCfg(), dict(grid=(-1,), channels=(-1,), dtype=('float8',))), (ControlCfg(8, 8), dict(latent=(0,), camera=(0,), mid=(-1,), first=(-1,))),
    (TokenCfg(8, 8), dict(latent=(0,), tokens=(0,), width=(0,), heads=(0, 3), rounds=(0,), freqs=(0,))),
    (PointsCfg(), dict(size=(0,), features=(-1,), points=(0,), cell=(0.,), prior=(0.,), parallax=(-1.,))),
    (MemoryCfg(), dict(mid=(-1,), drop=(2.,), augment=(-1.,), blur=(0,), colour_noise=(-1.,))), (AlignCfg(8), dict(latent=(0,), layers=(0, 3), width=(0,), angular=(-1.,))),
    (StudyCfg(), dict(walks=(1,), skip=(0,), context=(0, 8), steps=(0, 1001), run=(MINI,)))]

@pytest.mark.parametrize('cfg,values', NONSENSE, ids=[type(c).__name__ for c, _ in NONSENSE])
def test_R14_nonsense_is_refused_where_the_config_is_made(cfg, values):
    for name, wrong in values.items():
        for value in wrong:
            with pytest.raises(ValueError, match='expected .* got .*; '): cfg.replace(**{name: value})

# --- every text that enters a page is escaped

EVIL = ('<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>", '</script><script>alert(1)</script>', '<!--<script>alert(1)', '&lt;b&gt;')

class Page(HTMLParser):
    "What a browser would find: the tags with their attributes."
    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

def made(evil):
    "{what: HTML} of every function that makes HTML, with `evil` wherever a text of the user can stand."
    inner = torch.nn.Linear(2, 2)
    net = torch.nn.Sequential()
    net.add_module(evil.replace('.', ''), inner)
    x = torch.ones(1, 2)
    traces = Trace(net, x), Trace(net, x)
    alive = liveness(net, lambda i: [p.data.add_(1) for p in net.parameters()])
    clip = torch.rand(2, 3, 8, 8)
    run = tiny_control().replace(base=evil, vggt_weights=evil)
    scores = {m.name: 1. for m in METRICS}
    report = Report([dict(name=evil, value=1., unit=evil, gflop=1., ms=1., must=2., aim=1.)], {evil: evil})
    record = dict.fromkeys(('study', 'recipe', 'commit', 'seed', 'machine', 'seconds'), evil)
    explorer = LevelExplorer(clip, {evil: torch.rand(2, 4, 4, 4)})
    figures = dict(lines=lines(xlabel=evil, ylabel=evil, title=evil, **{evil: [1., 2.]}), fig=fig(go.Bar(x=[evil], y=[1], name=evil, text=evil), title=evil),
                   checks=plot_checks({evil: {evil: [evil]}}), explorer=explorer.static(evil))
    return dict(table=table([{evil: evil}, {'a': evil}]), html_table=html_table([evil, 'b'], [[evil, evil]], tints=[evil]), trace=traces[0],
                trace_diff=trace_diff(*traces), liveness=alive, scores=Table({evil: scores, 'b': scores}, {evil: scores}, METRICS), report=report,
                video=video_tag(clip, titles=evil), provenance=provenance(StudyCfg(run), record)[2], text=evil, number={evil: evil}) | figures

@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    "{text: (parts of a page, path of the whole page)}"
    out, tmp_path = {}, tmp_path_factory.mktemp('pages')
    for i, evil in enumerate(EVIL):
        parts = made(evil)
        things = [o for part in parts.values() for o in (part if isinstance(part, list) else [part])]
        write_report(tmp_path/f'{i}.html', evil, evil, [(evil, evil, things)])
        out[evil] = parts, tmp_path/f'{i}.html'
    return out

def test_R15_no_text_becomes_a_tag(pages):
    for evil, (parts, page) in pages.items():
        for what, part in parts.items():
            for o in part if isinstance(part, list) else [part]:
                html = o if what == 'html_table' else as_html(o)
                scripts = [i for i, (tag, _) in enumerate(Page(html).tags) if tag == 'script']
                assert len(scripts) == (what in ('lines', 'fig', 'checks', 'explorer')), (what, evil, html[:500])
                assert '<!--' not in html and not any(tag == 'svg' or name.startswith('on') for tag, attrs in Page(html).tags for name in attrs), (what, evil)
                assert all(a.get('src', '').startswith('data:image/') for tag, a in Page(html).tags if tag == 'img'), (what, evil)
        text = page.read_text(encoding='utf8')
        assert evil not in text.split('</head>')[0].split('<script>')[0] and f'<h2>{evil}' not in text

def test_R15_a_browser_runs_none_of_it(pages, chrome):
    "plotly.js writes titles and names as text, too."
    tab, ran = chrome.new_page(), []
    tab.on('dialog', lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
    tab.goto('data:text/html,<script>alert(0)</script>')
    assert ran == ['0'], 'the test would notice'
    for _, page in pages.values():
        tab.goto(page.as_uri())
        tab.wait_for_function('document.querySelectorAll(".main-svg").length >= 4')
        tab.wait_for_timeout(200)
        assert ran == ['0'] and not tab.evaluate('document.querySelectorAll("[onerror],[onload]").length')
