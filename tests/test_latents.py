"Encoding latents by several processes: the work is shared, and a killed process leaves nothing half-written and blocks nobody."
import json, os, signal, subprocess, sys

import numpy as np
import pytest
from safetensors.torch import load_file

from dfot_vggt.data.video import write_mp4

AutoencoderKL = pytest.importorskip('diffusers').AutoencoderKL

CODE = '''
import json, sys, time
from dfot_vggt.systems import latents
from dfot_vggt.systems.latents import encode_folders, encode_video
videos, where, vae, wait = sys.argv[1:]
def slow(*args):
    print('encoding', flush=True)
    time.sleep(float(wait))
    return encode_video(*args)
latents.encode_video = slow
done = encode_folders(videos, where, vae, 16)
print(json.dumps([list(done.written), list(done.busy), done.present]))
'''

def start(folder, wait):
    "A process that encodes; each video takes `wait` seconds longer."
    env = dict(os.environ, OMP_NUM_THREADS='1')
    args = [sys.executable, '-c', CODE, folder/'videos', folder/'latents', folder/'vae', str(wait)]
    return subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, text=True, env=env)

def files(folder): return sorted(p.relative_to(folder/'latents').as_posix() for p in (folder/'latents').rglob('*') if p.is_file())

def test_two_processes_share_and_a_killed_one_blocks_nobody(tmp_path):
    g = np.random.default_rng(0)
    keys = [f'{c}/{k}.mp4' for c in 'AB' for k in range(4)]
    for key in keys:
        (tmp_path/'videos'/key).parent.mkdir(parents=True, exist_ok=True)
        write_mp4(tmp_path/'videos'/key, g.integers(0, 255, (3, 3, 20, 20)).astype(np.uint8))
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, down_block_types=('DownEncoderBlock2D',),
                  up_block_types=('UpDecoderBlock2D',)).save_pretrained(tmp_path/'vae')

    killed = start(tmp_path, 600)
    assert killed.stdout.readline() == 'encoding\n'
    assert files(tmp_path) == ['A/.0.mp4.safetensors.claim', 'A/.lock']
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path/'latents'/'A'/f'.0.mp4.{killed.pid}.tmp.safetensors').write_bytes(b'half')      # as if it had been writing

    both = [start(tmp_path, .3) for _ in range(2)]
    done = [json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in both]
    assert all(p.returncode == 0 for p in both)
    written = [written for written, _, _ in done]
    assert sorted(written[0] + written[1]) == keys, 'each video is encoded once, also that of the killed process'
    assert files(tmp_path) == sorted([f'{key}.safetensors' for key in keys] + [f'{c}/{name}' for c in 'AB' for name in ('.lock', 'SHA256SUMS')])
    assert all(load_file(tmp_path/'latents'/f'{key}.safetensors')['latents'].shape == (3, 4, 16, 16) for key in keys)
