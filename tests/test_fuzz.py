"""Damaged files and wrong command lines: a reader ends in a sentence that names the file, or returns what the undamaged file holds.

Valid inputs are made once. Each is damaged (flipped bits, cuts, splices, exchanged numbers, deleted lines, huge numbers, NaN, other types) and
given to the public reader, in a process of its own per kind, so that a crash has a name. 200 inputs with one seed; with --slow 2,000 with a new seed. The same seed gives the
same bytes: `python tests/test_fuzz.py KIND SEED COUNT FOLDER` runs one kind alone."""
import hashlib, importlib, io, json, os, random, re, resource, signal, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEED, SECONDS, MEMORY = 0, 20, 12 << 30          # of the draws; for one input; of a process

class Hang(BaseException): "One input took longer than `SECONDS`."

def named(name):
    "The function of the package that is written as 'module:name'; imported when it is needed."
    module, attribute = name.split(':')
    return getattr(importlib.import_module(f'dfot_vggt.{module}'), attribute)

# --- damage

def _place(r, data): return r.randrange(len(data)) if data else 0
def flip(r, data, other):
    "One to eight bits."
    data = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 8])):
        if data: data[_place(r, data)] ^= 1 << r.randrange(8)
    return bytes(data)
def flip_early(r, data, other): return flip(r, data[:200], other) + data[200:]
def cut(r, data, other): return data[:_place(r, data)]
def cut_little(r, data, other): return data[:-r.randint(1, 16)]
def drop(r, data, other):
    i = _place(r, data)
    return data[:i] + data[i + r.choice([1, 4, 64]):]
def insert(r, data, other):
    i = _place(r, data)
    return data[:i] + r.randbytes(r.choice([1, 4, 64])) + data[i:]
def splice(r, data, other):
    "The beginning of one file and the end of another of its kind."
    return data[:_place(r, data)] + other[_place(r, other):]
def move(r, data, other):
    "A piece of the file over another piece."
    i, j, n = _place(r, data), _place(r, data), r.choice([4, 8, 64])
    return data[:i] + data[j:j + n] + data[i + n:]
def huge(r, data, other):
    "Four or eight bytes of ones, zeros, or a large number."
    i, n = _place(r, data), r.choice([4, 8])
    return data[:i] + r.choice([b'\xff'*n, b'\0'*n, b'\x7f' + b'\xff'*(n - 1), (1 << 8*n - 1).to_bytes(n, 'little')]) + data[i + n:]
def tail(r, data, other): return data + r.randbytes(r.choice([1, 8, 1000]))
BYTES = flip, flip, flip_early, cut, cut_little, drop, insert, splice, move, huge, tail

def _lines(data): return data.decode('utf8', 'replace').split('\n')
def line_deleted(r, data, other):
    lines = _lines(data); del lines[r.randrange(len(lines))]
    return '\n'.join(lines).encode()
def line_twice(r, data, other):
    lines = _lines(data); i = r.randrange(len(lines)); lines.insert(r.randrange(len(lines)), lines[i])
    return '\n'.join(lines).encode()
NUMBER = re.compile(r'-?\b\d+(\.\d+)?(e-?\d+)?\b')
ODD = ['nan', '.nan', 'inf', '-.inf', '1e999', '-1', '0', '9'*40, '1e-320', '""', '[]', '{}', 'true', 'null', 'x', '0x10', '1_000', '٣', '~', '&a', '*a']
def number_odd(r, data, other):
    "A number becomes another type, or one that no config or file can mean."
    text = data.decode('utf8', 'replace'); found = [*NUMBER.finditer(text)]
    if not found: return data
    m = r.choice(found)
    return (text[:m.start()] + r.choice(ODD) + text[m.end():]).encode()
def numbers_exchanged(r, data, other):
    text = data.decode('utf8', 'replace'); found = [*NUMBER.finditer(text)]
    if len(found) < 2: return data
    a, b = sorted(r.sample(found, 2), key=lambda m: m.start())
    return (text[:a.start()] + b[0] + text[a.end():b.start()] + a[0] + text[b.end():]).encode()
def indented(r, data, other):
    lines = _lines(data); i = r.randrange(len(lines)); lines[i] = r.choice(['  ', '\t', '- ']) + lines[i]
    return '\n'.join(lines).encode()
TEXT = line_deleted, line_twice, number_odd, number_odd, number_odd, numbers_exchanged, indented, flip, cut, insert, splice

# --- kinds: `make(folder)` writes valid files and returns their paths, `read(path)` returns what the public reader returns

def digest(value):
    "A hash of anything that a reader returns."
    h = hashlib.blake2b(digest_size=16)
    def add(v):
        if hasattr(v, 'detach'): add(('tensor', str(v.dtype), tuple(v.shape))); h.update(v.detach().contiguous().flatten().view(_torch().uint8).numpy().tobytes())
        elif hasattr(v, 'tobytes'): add((str(v.dtype), v.shape)); h.update(v.tobytes())
        elif hasattr(v, 'to_yaml'): add(v.to_yaml())
        elif isinstance(v, dict): [(add(str(k)), add(x)) for k, x in sorted(v.items(), key=lambda i: str(i[0]))]
        elif isinstance(v, (list, tuple)): h.update(f'{type(v).__name__}{len(v)}'.encode()); [add(x) for x in v]
        else: h.update(f'{type(v).__name__} {v}'.encode())
    add(value)
    return h.hexdigest()

def _torch(): return importlib.import_module('torch')
def _walk(n=6, room=0):
    scenes = importlib.import_module('dfot_vggt.data.scenes')
    return scenes.walk(scenes.Room(room), 64)[:n]
def _frames(n=6, seed=0):
    import numpy as np
    y, x = np.mgrid[:64, :64]
    return np.stack([np.stack([(x*3 + 9*t + seed) % 256, (y*4) % 256, (x + y + t) % 256]) for t in range(n)]).astype('uint8')

class Kind:
    damage, checksum = BYTES, False      # checksum: the files carry one, so other values than the original's are never accepted
    def sane(self, value): "Raise `AssertionError` if a value without a checksum is one that no valid file can hold."
    def seeds(self, folder): raise NotImplementedError
    def read(self, path): raise NotImplementedError

class Recipe(Kind):
    damage = TEXT
    def seeds(self, folder):
        recipes = importlib.import_module('dfot_vggt.learn.recipes')
        for name in ('tiny_base', 'tiny_control', 'tiny_memory', 'tiny_vggt'): recipes.RECIPES[name]().save(folder/f'{name}.yaml')
        named('systems.vdt_run:vdt_tiny')().save(folder/'vdt_tiny.yaml')
        return sorted(folder.glob('*.yaml'))
    def read(self, path): return named('learn.recipes:recipe_of')(str(path))
    def sane(self, run):
        assert type(run).__name__ in ('RunCfg', 'VGGTRunCfg', 'VDTRunCfg'), type(run)
        assert run.train.lr > 0 and run.train.steps >= 0 and run.batch >= 1 and run.train.save_every >= 1, run
        assert 'nan' not in run.to_yaml() and not re.search(r'[/\\]|^\.*$', run.name), run.name

class Study(Recipe):
    def seeds(self, folder):
        named('app.compare:StudyCfg')().save(folder/'study.yaml')
        return [folder/'study.yaml']
    def read(self, path): return named('core:build')(path)
    def sane(self, study): super().sane(study.run); assert study.walks > 1 and study.steps > 0 and study.skip > 0, study

class Cameras(Kind):
    damage = TEXT
    def seeds(self, folder):
        write = named('data.re10k:write_poses')
        for i in range(2): write(folder/f'camera{i}.txt', f'https://example.org/{i}', _torch().arange(6)*40_000, _walk(6, i))
        return sorted(folder.glob('*.txt'))
    def read(self, path): return named('data.re10k:read_poses')(path)
    def sane(self, value):
        cams = value[2]
        assert cams.isfinite().all() and len(cams) and cams.shape[1] == 16
        R = cams[:, 4:].unflatten(1, (3, 4))[:, :, :3].double()
        assert ((R @ R.mT - _torch().eye(3)).abs().max() < .1) and (R.det() > 0).all() and (cams[:, :2] > 0).all(), cams
        assert (value[1].diff() > 0).all(), value[1]

class Poses(Cameras):
    damage, checksum = BYTES, True
    def seeds(self, folder):
        for i in range(2): named('data.re10k:write_pose_table')(folder/f'room{i}.pt', _walk(6, i))
        return sorted(folder.glob('*.pt'))
    def read(self, path): return named('data.re10k:read_pose_table')(path)

class Frames(Kind):
    checksum = True
    def seeds(self, folder):
        for i in range(2): named('data.re10k:write_npz')(folder/f'room{i}.npz', _frames(seed=40*i))
        return sorted(folder.glob('*.npz'))
    def read(self, path): return named('data.re10k:read_npz')(path)

class Video(Kind):
    checksum = True
    def seeds(self, folder):
        for i in range(2): named('data.video:write_mp4')(folder/f'room{i}.mp4', _frames(12, 40*i))
        return sorted(folder.glob('*.mp4'))
    def read(self, path): return named('data.video:read_mp4')(path, range(12))

class Picture(Kind):
    def seeds(self, folder):
        from PIL import Image
        image = Image.fromarray(_frames(1)[0].transpose(1, 2, 0))
        for name in ('a.png', 'b.jpg', 'c.webp', 'd.bmp', 'e.tiff'): image.save(folder/name)
        return sorted(folder.glob('?.*'))
    def read(self, path): return named('data.images:open_image')(path)
    def sane(self, x): assert x.ndim == 3 and x.shape[0] == 3 and x.isfinite().all() and 0 <= x.min() and x.max() <= 1

class Weights(Kind):
    checksum = True
    def seeds(self, folder):
        torch, save = _torch(), named('weights:save_weights')
        for i in range(2): save(folder/f'w{i}.safetensors', {n: torch.randn(8, 8) for n in 'abc'}, dict(kind='EMA', step='3'))
        return sorted(folder.glob('*.safetensors'))
    def read(self, path):
        torch, load = _torch(), named('weights:load_report')
        module = torch.nn.ParameterDict({n: torch.zeros(8, 8) for n in 'abc'})
        load(module, named('weights:read_tensors')(path), str(path))
        about = named('weights:read_about')(path)
        return dict(module.state_dict()), [about.get(k) for k in ('kind', 'step')]

class State(Kind):
    "A training that is gone on with from a damaged state; its model has one layer."
    def _train(self, folder, steps):
        torch, train = _torch(), importlib.import_module('dfot_vggt.learn.train')
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 4)
        def batches(start, rank, world):
            for step in range(start, 10**6): yield torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        train.train(net, lambda m, b: {'l': (m(b) - b).square().mean(1)}, batches, train.TrainCfg(steps=steps, warmup=1, save_every=2), folder)
        return dict(net.state_dict())
    def seeds(self, folder):
        self._train(folder/'run', 2)
        return sorted((folder/'run'/'state').glob('step-*.pt'))[-1:]
    def read(self, path):
        import shutil, tempfile
        with tempfile.TemporaryDirectory() as at:
            run = Path(at)/'run'
            shutil.copytree(path.parents[1], run)
            try: return self._train(run, 4)
            except (ValueError, OSError) as e: raise type(e)(str(e).replace(str(run/'state'), str(path.parent))) from e
    def sane(self, value): assert all(v.isfinite().all() for v in value.values())

class Shards(Kind):
    checksum = True
    def seeds(self, folder):
        torch, fc = _torch(), importlib.import_module('dfot_vggt.geometry.feature_cache')
        cache = fc.FeatureCache(folder, self._vggt(), (1, 3), fc.CacheCfg(grid=2))
        for i in range(2): cache.write_shard(f's{i}', [torch.full((2, 3, 64, 64), 9*i + j).byte() for j in range(2)], [2, 2])
        return sorted(folder.glob('*/*.safetensors'))
    def _vggt(self):
        vggt = importlib.import_module('dfot_vggt.geometry.vggt')
        return importlib.import_module('dfot_vggt.geometry.aggregator').random_weights(vggt.VGGT(vggt.VGGTCfg.tiny(), heads=())).eval()
    def read(self, path):
        shard = named('geometry.feature_cache:Shard')(path)
        return [shard.read(i) for i in range(len(shard))], shard.keys

class Bases(Kind):
    checksum = True
    def seeds(self, folder):
        torch, fc = _torch(), importlib.import_module('dfot_vggt.geometry.feature_cache')
        for i in range(2): fc.load_or_make_basis(folder/f'{i}.safetensors', lambda: fc.fit_basis([torch.randn(4, 16, 4, 4)], 4))
        return sorted(folder.glob('*.safetensors'))
    def read(self, path):
        b = named('geometry.feature_cache:read_basis')(path)
        return b.mean, b.axes, b.share

class VDTWeights(Kind):
    "A checkpoint of a VDT in the official form and in that of VDT-unofficial."
    def _cfg(self): return named('systems.vdt:VDTCfg')(size=8, channels=4, frames=4, patch=2, width=16, depth=1, heads=2)
    def seeds(self, folder):
        torch, vdt = _torch(), importlib.import_module('dfot_vggt.systems.vdt')
        state = vdt.golden_vdt_weights(vdt.VDT(self._cfg())).state_dict()
        torch.save(state, folder/'official.pt')
        torch.save(dict(model=state, ema=state, opt=dict(state={}), args=dict(num_frames=4)), folder/'unofficial.pt')
        return sorted(folder.glob('*.pt'))
    def read(self, path):
        net = named('systems.vdt:load_vdt')(path, self._cfg())
        return {n: x.clone() for n, x in net.state_dict().items()}                    # they are mapped from the file
    def sane(self, value): assert all(x.isfinite().all() for x in value.values())

class LatentFiles(Kind):
    checksum = True
    def seeds(self, folder):
        latents, torch = importlib.import_module('dfot_vggt.systems.latents'), _torch()
        info = latents.LatentsInfo('a VAE', '0'*16, .18215, 0., 32)
        for i in range(3):                                                            # the kind of most files is expected of all
            (folder/f'{i}.mp4').write_bytes(b'a video')
            at = latents.latents_file(folder/'latents', f'Class/{i}.mp4')
            latents.write_latents(at, torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(i)), info, folder/f'{i}.mp4')
        return sorted(folder.glob('latents/*/*.safetensors'))
    def read(self, path):
        clips, window = named('systems.latents:Latents')(path.parents[1], 4), named('data.clips:Window')
        return clips.read(window(f'Class/{path.stem}', (0, 1, 2, 3), False)).latents

class VideoList(Kind):
    damage = TEXT
    def seeds(self, folder):
        (folder/'trainlist01.txt').write_text('Archery/v_Archery_g01_c01.avi 1\nBall/v_Ball_g02_c03.avi 2\nBall/my clip 7.mp4 2\n')
        (folder/'testlist01.txt').write_text('Archery/v_Archery_g03_c02.avi\nBar/v_Bar_g02_c03.avi\n')
        return sorted(folder.glob('*.txt'))
    def read(self, path): return named('data.class_folders:read_list')(path)
    def sane(self, names): assert names and all(re.fullmatch(r'[^/]+/[^/]+\.\w+', n) and not n.startswith('..') for n in names), names

class CommandLines(Kind):
    "A seed is a file with one command line, run in this process in a folder with a recipe of two rooms. Most are wrong before they are damaged."
    damage = TEXT + (number_odd,)*3
    LINES = ['cache mini.yaml --plan --rate 1', 'cache mini.yaml --grid 4 --channels 16 --plan', 'cache mini.yaml --verify',
             'cache mini.yaml --prune --also mini.yaml', 'train absent.yaml --steps 3', 'study --config study.yaml --folder out',
             'rollout --clip absent/test/room --frames 7 --density .5 --steps 3', 'rollout --image absent.png --cams absent.txt --at 0,3',
             'vdt --task interpolation --clip absent.mp4 --context 3 --steps 8', 'vdt --clip absent --first 3 --frames 12 --samples 2 --seed 1']
    NEEDED = dict(cache='mini.yaml', train='--steps', study='--config', rollout='absent', vdt='absent')    # without it the command would work for minutes
    def seeds(self, folder):
        config, run = importlib.import_module('dfot_vggt.learn.config'), named('learn.recipes:tiny_control')()
        run.replace(name='mini', world=config.WorldCfg(rooms=2, test_rooms=2, frames=16), finite=16).save(folder/'mini.yaml')
        (folder/'study.yaml').write_text('_target_: dfot_vggt.app.compare.StudyCfg\nwalks: 1\n')
        for i, line in enumerate(self.LINES): (folder/f'{i}.line').write_text('\n'.join(line.split()))
        return sorted(folder.glob('*.line'))
    def read(self, path):
        command, *args = path.read_bytes().decode('utf8', 'replace').replace('\0', '').split('\n')
        if command not in self.NEEDED or self.NEEDED[command] not in ' '.join(args) or '--root' in args: return 'not run'
        main, home = named(f'app.{command}:dfot_{command}'), os.getcwd()
        os.chdir(path.parent)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                typed = vars(importlib.import_module('fastcore.script').anno_parser(main).parse_args(args))
                main(**{k: v for k, v in typed.items() if k not in ('pdb', 'xtra')})
        except SystemExit as e:
            if e.code not in (0, 2): raise SystemExit(f'{path}: {e.code}') from None
        finally: os.chdir(home)
        return 'run'

KINDS = dict(recipe=Recipe, study=Study, cameras=Cameras, poses=Poses, npz=Frames, mp4=Video, picture=Picture, weights=Weights, state=State,
             shard=Shards, basis=Bases, vdt=VDTWeights, latents=LatentFiles, list=VideoList, commands=CommandLines)

# --- one process

def judged(kind, path, raw, original, seeds):
    "'' if the damaged input `raw` in the place of `path` is handled well; else what is wrong."
    from dfot_vggt.app.names import USER_ERRORS
    if raw == path.read_bytes(): return ''
    kept = path.read_bytes()
    path.write_bytes(raw)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Hang()))
    signal.alarm(SECONDS)
    try: value = kind.read(path)
    except Hang: return f'longer than {SECONDS} s'
    except USER_ERRORS as e: return '' if path.name in str(e) else f'the message does not name the file: {type(e).__name__}: {e}'
    except SystemExit as e: return '' if path.name in str(e) else f'the message does not name the file: exit {e.code}'
    except BaseException as e: return f'{type(e).__name__}: {e}'
    finally: signal.alarm(0); path.write_bytes(kept)
    try:
        same = digest(value) in original.values()
        if not same and kind.checksum: return 'other values than those of the file, without an error, in spite of its checksum'
        if not same: kind.sane(value)
    except AssertionError as e: return f'accepted what no valid file holds: {str(e)[:300]}'
    return ''

def main(name, seed, count, folder):
    "Print one JSON line before and after each input; a crash is that of the last line."
    import torch, warnings
    warnings.simplefilter('ignore'); torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, folder = sys.stdout, Path(folder)
    def line(**kw): print(json.dumps(kw), file=out, flush=True)
    kind = KINDS[name]()
    (folder/'valid').mkdir(parents=True, exist_ok=True)
    seeds = kind.seeds(folder/'valid')
    original = {p: digest(kind.read(p)) for p in seeds} if name != 'commands' else {}
    for i in range(count):
        r = random.Random(f'{name} {seed} {i}')
        path = r.choice(seeds)
        raw, other = path.read_bytes(), r.choice(seeds).read_bytes()
        how = [r.choice(kind.damage) for _ in range(r.choice([1, 1, 1, 2]))]
        for damage in how: raw = damage(r, raw, other)
        saved = folder/f'{i:04d}-{path.name}'
        saved.write_bytes(raw)
        line(input=i, file=str(saved), damage=[f.__name__ for f in how])
        wrong = judged(kind, path, raw, original, seeds)
        line(done=i, wrong=wrong)
        if not wrong: saved.unlink()

if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    sys.exit()

# --- the tests

def count(config): return (2000 if config.getoption('--slow') else 200)//len(KINDS) + 1

@pytest.mark.parametrize('kind', KINDS)
def test_fuzz(kind, tmp_path, request):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    n, seed = count(request.config), random.SystemRandom().randrange(10**6) if request.config.getoption('--slow') else SEED
    print(f'{kind}: {n} inputs, seed {seed}')
    with open(tmp_path/'err', 'w') as err:
        p = subprocess.Popen([sys.executable, __file__, kind, str(seed), str(n), str(tmp_path/'inputs')], cwd=tmp_path, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=err)
        try: out, _ = p.communicate(timeout=300 + 2*n)
        except subprocess.TimeoutExpired: p.kill(); out, _ = p.communicate()
    lines = [json.loads(x) for x in out.splitlines() if x.startswith('{')]
    begun, done = [x for x in lines if 'input' in x], [x for x in lines if 'done' in x]
    wrong = [f"{b['file']} ({', '.join(b['damage'])}): {d['wrong']}" for b, d in zip(begun, done) if d['wrong']]
    if len(begun) > len(done): wrong.append(f"{begun[-1]['file']} ({', '.join(begun[-1]['damage'])}): the process ended, exit code {p.returncode}")
    assert begun, (tmp_path/'err').read_text()[-3000:]
    assert p.returncode == 0 and len(done) == n or wrong, (tmp_path/'err').read_text()[-3000:]
    assert not wrong, f'seed {seed}, {len(wrong)} of {n} inputs:\n' + '\n'.join(wrong)
