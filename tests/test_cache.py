"A cache of features that is killed, shared, out of space or out of date: what stands in it in the end is what one process makes in one go."
import os, random, re, shutil, signal, socket, subprocess, sys, time
from contextlib import suppress

import psutil
import pytest
import torch
from conftest import ROOT
from dfot_vggt.geometry.manifest import fill_cache
from dfot_vggt.learn.config import WorldCfg
from dfot_vggt.learn.losses import FiniteWindows
from dfot_vggt.learn.recipes import tiny_control
from dfot_vggt.learn.runs import feature_cache
from dfot_vggt.geometry.feature_cache import FORMAT, CacheCfg

RUN = tiny_control().replace(name='mini', world=WorldCfg(rooms=3, test_rooms=1, frames=24), finite=96)       # 6 shards

WORKER = '''
import os, sys
import torch
from dfot_vggt.core import build
from dfot_vggt.geometry.manifest import fill_cache
from dfot_vggt.learn.losses import FiniteWindows
from dfot_vggt.learn.runs import feature_cache

recipe, root = sys.argv[1:]
run = build(recipe)
cache, manifest = feature_cache(run, root), FiniteWindows(run, root).manifest()
made = fill_cache(cache, manifest, progress=False)
print(len(made), 'of', os.environ.get('WORLD_SIZE', 1))
'''

def in_one_go(root, run, shards):
    "A root with the rooms, the recipe, and the cache that one process makes in one go."
    torch.set_num_threads(1)
    run.save(root/'mini.yaml')
    (root/'worker.py').write_text(WORKER)
    made = fill_cache(feature_cache(run, root), FiniteWindows(run, root).manifest(), progress=False)
    assert len(made) == shards
    return root

def same_rooms(world, at):
    "A root with the same rooms and recipe, and no features yet."
    for name in (RUN.world.folder(world).name, 'mini.yaml', 'worker.py'): (at/name).symlink_to(world/name)
    return at

@pytest.fixture(scope='module')
def world(tmp_path_factory): return in_one_go(tmp_path_factory.mktemp('cache'), RUN, 6)

@pytest.fixture
def root(world, tmp_path): return same_rooms(world, tmp_path)

def shards(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted((root/'features').rglob('*.safetensors'))}
def whole(root):
    "The shards that are finished; a half-written one has a name that begins with a dot."
    return [name for name in shards(root) if not name.rsplit('/', 1)[-1].startswith('.')]
def leftovers(root):
    "Claims and half-written files; the lock of the claims is a file for ever."
    return [p for p in (root/'features').rglob('*') if p.is_file() and p.name != '.lock' and (p.suffix != '.safetensors' or p.name[0] == '.')]

def at_work(root, p):
    "Does this process hold a claim? (One that was killed before has left its own behind.)"
    for claim in (root/'features').rglob('claims/*-*'):
        with suppress(FileNotFoundError):
            if str(p.pid) in claim.read_text().split(): return True
    return False

def launch(root, *command, **env):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', **env)
    command = command or (root/'worker.py', root/'mini.yaml', root)
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def finish(p, code=0, timeout=600):
    out, _ = p.communicate(timeout=timeout)
    assert p.returncode == code, out
    return out

def command(root, *args): return launch(root, '-m', 'dfot_vggt.app.cache', root/'mini.yaml', '--root', root, *args)

# --- killed

def kill_and_start_again(world, root, seed, kills):
    "Each kill comes at a random moment of the work on some shard: after its claim, in it, while it is written. One cache sees them all."
    dice, done = random.Random(seed), []
    for k in range(kills):
        p = launch(root)
        deadline = time.time() + 300
        while p.poll() is None and not at_work(root, p) and time.time() < deadline: time.sleep(.001)
        time.sleep(dice.random()*dice.choice([.02, .2, .8]))                # a shard takes about a second here
        assert p.poll() is None, f'kill {k} must meet it at work; there were {len(whole(root))} of {len(whole(world))} shards'
        p.send_signal(signal.SIGKILL)
        p.communicate(timeout=60)
        assert {*done} <= {*whole(root)}, 'nothing that was finished is lost'
        done = whole(root)
    assert len(done) < len(whole(world)), 'the last kill left something to do'
    finish(launch(root))
    assert shards(root) == shards(world), 'byte for byte'
    assert not leftovers(root), 'what killed processes left half-written is gone'

def test_killed_twice_and_started_again(world, root): kill_and_start_again(world, root, 0, 2)

@pytest.mark.slow
def test_killed_ten_times_and_started_again(tmp_path):
    "24 shards, so that ten kills meet one cache at work."
    (tmp_path/'one go').mkdir(); (tmp_path/'killed').mkdir()
    world = in_one_go(tmp_path/'one go', RUN.replace(finite=24*16), 24)
    kill_and_start_again(world, same_rooms(world, tmp_path/'killed'), 1, 10)

def test_a_kill_while_a_shard_is_written(world, root):
    "The last moment: all numbers are in the temporary file, the rename has not come. The next process cleans up."
    stop = WORKER.replace('import torch\n', 'import os, signal\nfrom dfot_vggt import core\nimport torch\n', 1).replace('run = build', '''
real, seen_ = os.replace, []
def die(a, b):
    if str(b).endswith('.safetensors') and 'features' in str(b):
        seen_.append(b)
        if len(seen_) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return real(a, b)
os.replace = die
run = build''', 1)
    (root/'dies.py').write_text(stop)
    finish(launch(root, root/'dies.py', root/'mini.yaml', root), -signal.SIGKILL)
    assert len(shards(root)) == 1 + 1 and leftovers(root), 'one whole, one under its temporary name, and a claim'
    finish(launch(root))
    assert shards(root) == shards(world) and not leftovers(root)

# --- several processes

def test_two_processes_of_torchrun_make_what_one_makes(world, root):
    p = launch(root, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, '-m', 'dfot_vggt.app.cache', root/'mini.yaml', '--root', root)
    pids, deadline = set(), time.time() + 300
    while p.poll() is None and time.time() < deadline:
        pids |= {c.pid for c in psutil.Process(p.pid).children()} if psutil.pid_exists(p.pid) else set()
        time.sleep(.1)
    out = finish(p)
    made = {int(r): int(n) for n, r in re.findall(r'(\d+) of them made by process (\d) of 2', out)}
    assert len(pids) >= 2 and made.keys() == {1, 2}, f'there must be two processes\n{out}'
    assert sum(made.values()) == 6 and min(made.values()) > 0, f'each shard is made once, and both make some: {made}'
    assert shards(root) == shards(world), 'byte for byte'
    assert not leftovers(root)

def test_two_writers_of_one_shard(world, root):
    "Claims save work; nothing else depends on them. Two writers that both believe to hold the claim leave the same whole file."
    deaf = WORKER.replace('made = fill', '''from contextlib import contextmanager
from dfot_vggt.geometry.feature_cache import FeatureCache
@contextmanager
def everybody(self, name, again=False): yield not self.path(name).exists()
FeatureCache.claim = everybody
made = fill''')
    (root/'deaf.py').write_text(deaf)
    both = [launch(root, root/'deaf.py', root/'mini.yaml', root) for _ in range(2)]
    for p in both: finish(p)
    assert shards(root) == shards(world) and not leftovers(root)

# --- disks

def test_a_disk_too_small_is_refused_before_the_work(world, root, tmp_path):
    with tmpfs(tmp_path/'small', 200_000) as small:
        (root/'features').symlink_to(small)
        out = finish(command(root), 1)
        assert 'free disk' in out and 'Traceback' not in out and not list(small.rglob('*.safetensors')), out

def test_a_disk_that_fills_up_on_the_way(world, root, tmp_path):
    "Room for some shards is there at the start; somebody else takes it. What is finished stays, and is gone on from."
    one = max(len(b) for b in shards(world).values())
    with tmpfs(tmp_path/'small', 8*one) as small:
        (root/'features').symlink_to(small)
        p = launch(root)
        while p.poll() is None and not list(small.glob('*/*.safetensors')): time.sleep(.002)
        hog = small/'somebody-elses'
        with open(hog, 'wb') as f:                                                    # all that is free, but half a shard
            f.write(b'x'*max(0, shutil.disk_usage(small).free - one//2))
        out = finish(p, 1)
        kept = [q for q in small.glob('*/*.safetensors') if q.name[0] != '.']
        assert 0 < len(kept) < 6 and ('free disk' in out or 'make room' in out), out
        hog.unlink()
        finish(launch(root))
        assert {k.split('/')[-1]: v for k, v in shards(root).items()} == {k.split('/')[-1]: v for k, v in shards(world).items()}

def test_a_write_that_fails_in_the_middle(world, root):
    "Where no file system can be mounted: no file may be larger than half a shard."
    one = min(len(b) for b in shards(world).values())
    limited = WORKER.replace('import os, sys\n', f'''import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({one//2}, {one//2}))
''')
    (root/'limited.py').write_text(limited)
    out = finish(launch(root, root/'limited.py', root/'mini.yaml', root), 1)
    assert 'nothing was kept of this shard' in out and 'make room' in out, out
    assert not shards(root) and not leftovers(root), 'no half file, no claim'

class tmpfs:
    "A file system of so many bytes; skips where none may be mounted."
    def __init__(self, at, size): self.at, self.size = at, size
    def __enter__(self):
        self.at.mkdir()
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={self.size}', 'tmpfs', self.at], capture_output=True).returncode:
            pytest.skip('no tmpfs can be mounted here (it needs root); the limit on file sizes is tested all the same')
        return self.at
    def __exit__(self, *_): subprocess.run(['umount', '-l', self.at], check=True)

def test_a_cache_that_is_read_only(world, root, tmp_path):
    "What is there is read and verified; what is missing ends in one sentence."
    with tmpfs(tmp_path/'fixed', 50_000_000) as fixed:
        shutil.copytree(world/'features', fixed, dirs_exist_ok=True)
        (root/'features').symlink_to(fixed)
        subprocess.run(['mount', '-o', 'remount,ro', fixed], check=True)
        assert '6 shards on disk, 0 of them made' in finish(command(root)) and ', 0 of them damaged' in finish(command(root, '--verify'))
        subprocess.run(['mount', '-o', 'remount,rw', fixed], check=True)
        next(fixed.glob('*/*.safetensors')).unlink()
        subprocess.run(['mount', '-o', 'remount,ro', fixed], check=True)
        out = finish(command(root), 1)
        assert 'Read-only file system' in out and 'make the folder writable' in out and 'Traceback' not in out, out

# --- claims

def kind(root): return next(p for p in (root/'features').iterdir() if p.name.endswith(f'-v{FORMAT}'))
def claim_all(world, root, text):
    "A claim on every shard, in the words of some other process."
    claims = kind(world).relative_to(world)/'claims'
    (root/claims).mkdir(parents=True)
    for p in kind(world).glob('*.safetensors'): (root/claims/p.stem).write_text(text)
    return root/claims

@pytest.mark.parametrize('words', ['{host} {pid} 3d0b1a', '{host} {pid} boot.123 word word'], ids=['claims of version 0.2', 'claims of now'])
def test_R9_a_claim_with_my_process_id_that_i_did_not_make(world, root, words):
    "A container starts again with its host name and its process ids: nothing is waited for."
    before = WORKER.replace('made = fill', f"""claims = cache.folder/'claims'
claims.mkdir(parents=True)
for shard in manifest.shards: (claims/shard).write_text('{words}'.format(host='{socket.gethostname()}', pid=os.getpid()))
made = fill""")
    (root/'again.py').write_text(before)
    start = time.time()
    out = finish(launch(root, root/'again.py', root/'mini.yaml', root), timeout=300)
    assert '6 of 1' in out and 'waiting' not in out and time.time() - start < 300, out
    assert shards(root) == shards(world) and not leftovers(root)

def test_R9_who_waits_says_for_whom_and_how_long(world, root):
    "Another machine holds the claims and does nothing. Off a terminal, too, a line comes every few seconds."
    claims = claim_all(world, root, 'far 42 start word word')
    p = command(root)
    lines, deadline = [], time.time() + 120
    while len(lines) < 2 and time.time() < deadline:
        line = p.stdout.readline()
        if 'waiting' in line: lines.append(line)
    assert len(lines) == 2 and all('process 42 of far, renewed' in line and 'and 3 more' in line for line in lines), lines
    seconds = [int(re.search(r'waiting for (\d+) s', line)[1]) for line in lines]
    assert 4 <= seconds[0] < seconds[1] < seconds[0] + 30
    for claim in claims.glob('*-*'): claim.unlink()
    finish(p)
    assert shards(root) == shards(world) and not leftovers(root)

def test_R9_what_is_no_claim(world, root):
    "Rubbish, nothing, a link to somebody's file, a claim from a machine whose clock is a year ahead: dead. A folder: a sentence."
    claims = claim_all(world, root, 'rubbish')
    names = sorted(claims.iterdir())
    names[1].write_bytes(b'\xff\x00')
    names[2].write_bytes(b'')
    names[3].unlink(); (root/'victim').write_text('mine'); names[3].symlink_to(root/'victim')
    names[4].write_text('far 42 start word word'); os.utime(names[4], (time.time() + 3e7,)*2)
    names[5].unlink(); names[5].mkdir()
    out = finish(command(root), 1)
    assert names[5].name in out and 'remove what is in the way' in out and 'Traceback' not in out, out
    names[5].rmdir()
    assert 'waiting' not in finish(command(root)) and (root/'victim').read_text() == 'mine'
    assert shards(root) == shards(world) and not leftovers(root)

# --- another version

def test_a_cache_of_another_version(world, root):
    "Its folder is left alone, and its files are refused with a sentence if somebody puts them in the way."
    shutil.copytree(world/'features', root/'features')
    folder = next((root/'features').glob(f'*-v{FORMAT}'))
    old = folder.with_name(folder.name.replace(f'-v{FORMAT}', f'-v{FORMAT - 1}'))
    for p in folder.glob('*.safetensors'): p.write_bytes(p.read_bytes().replace(f'"format\\": {FORMAT}'.encode(), f'"format\\": {FORMAT - 1}'.encode())
                                                        .replace(f'format\\": {FORMAT}'.encode(), f'format\\": {FORMAT - 1}'.encode()))
    out = finish(command(root, '--verify'), 1)
    assert f'expected a shard of format {FORMAT}, got format {FORMAT - 1}' in out and '6 of them damaged' in out and 'Traceback' not in out, out
    folder.rename(old)
    finish(launch(root))
    assert {k: v for k, v in shards(root).items() if f'-v{FORMAT}/' in k} == shards(world)
    out = finish(command(root, '--prune'))
    assert '6 files removed' in out and shards(root) == shards(world), out

# --- the command

def test_damage_is_found_and_repaired(world, root):
    shutil.copytree(world/'features', root/'features')
    a, b, *_ = sorted((root/'features').rglob('*.safetensors'))
    data = bytearray(a.read_bytes()); data[-1000] ^= 4; a.write_bytes(data)
    b.write_bytes(b.read_bytes()[:-1000])
    out = finish(command(root, '--verify'), 1)
    assert '2 of them damaged' in out and a.name in out and b.name in out, out
    finish(command(root, '--repair'))
    assert shards(root) == shards(world) and '0 of them damaged' in finish(command(root, '--verify'))

def test_shards_under_each_others_name_are_found(world, root):
    shutil.copytree(world/'features', root/'features')
    a, b, *_ = sorted((root/'features').rglob('*.safetensors'))
    a.rename(root/'x'); b.rename(a); (root/'x').rename(b)
    shutil.copy(a, a.with_name('copy of it.safetensors'))
    out = finish(command(root, '--verify'), 1)
    assert '2 of them damaged' in out and f'expected shard {a.stem}, got shard {b.stem}' in out, out
    finish(command(root, '--repair')); a.with_name('copy of it.safetensors').unlink()
    assert shards(root) == shards(world)

def test_R11_a_flipped_bit_in_the_principal_components(tmp_path):
    "It is found and named; nothing is computed with it; the same components are made again."
    root = in_one_go(tmp_path, RUN.replace(cache=CacheCfg(grid=4, channels=16), finite=32), 2)
    before = shards(root)
    basis, = (root/'features'/'bases').glob('*.safetensors')
    data = bytearray(basis.read_bytes()); data[-1000] ^= 64; basis.write_bytes(data)
    missing, *_ = kind(root).glob('*.safetensors')
    missing.unlink()
    for option in ['--verify'], []:
        out = finish(command(root, *option), 1)
        assert basis.name in out and '--repair' in out and 'Traceback' not in out, out
        assert basis.read_bytes() == data and not missing.exists() and not leftovers(root), 'nothing is computed with it'
    out = finish(command(root, '--repair'))
    assert basis.name in out and 'are computed again' in out
    finish(command(root))
    assert shards(root) == before, 'byte for byte, the basis too; and no second set of shards'

def test_a_wrong_name(tmp_path):
    out = finish(launch(tmp_path, '-m', 'dfot_vggt.app.cache', 'tiny_contrl'), 1)
    assert 'tiny_control' in out and 'Traceback' not in out and not list(tmp_path.iterdir()), out

def test_a_plan_computes_nothing(root):
    out = finish(command(root, '--plan', '--grid', '4', '--channels', '16'))
    assert '96 windows' in out and '6 shards' in out and 'FLOP' in out and not (root/'features').exists(), out

@pytest.mark.slow
def test_components_are_the_same_for_two_processes(world, root):
    "The basis is fitted once; whoever comes second reads it. Depth and poses are there, too."
    run = RUN.replace(cache=CacheCfg(grid=4, channels=16, dtype='bfloat16', depth=True))
    (root/'mini.yaml').unlink(); run.save(root/'mini.yaml')
    for p in [launch(root), launch(root)]: finish(p)
    assert len(list((root/'features'/'bases').glob('*.safetensors'))) == 1 and len(list((root/'features').glob('*-v*'))) == 1
    two = shards(root)
    shutil.rmtree(root/'features'); finish(launch(root))
    assert shards(root) == two
