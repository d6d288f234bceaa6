"Weights come from the Hub once, then from its cache: the real client against a server on this machine, in processes of their own."
import hashlib, http.server, json, os, subprocess, sys, threading

import pytest
from conftest import ROOT

REPO, FILE, COMMIT = 'kiwhansong/DFoT', 'pretrained_models/DFoT_RE10K.ckpt', 'c0ffee'.ljust(40, '0')
BODY = (ROOT/'data'/'golden'/'lightning'/'training.ckpt').read_bytes()

CLIENT = '''
import json, sys
from dfot_vggt.denoiser.checkpoints import load_dfot
from dfot_vggt.denoiser.uvit import UViTCfg
mini = UViTCfg(channels=(16, 16), blocks=('T', 'T'), mid=1, heads=1, emb=8, size=16, frames=2, freqs=1)
def ask(what):
    try: return sum(p.double().sum().item() for p in load_dfot(cfg=mini, **what).parameters())
    except FileNotFoundError as e: return str(e)
print(json.dumps([ask(what) for what in json.loads(sys.argv[1])]))
'''

class Hub(http.server.BaseHTTPRequestHandler):
    asked = []
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def log_message(self, *a): pass
    def answer(self, body):
        self.asked.append((self.command, self.path))
        known = self.path == f'/{REPO}/resolve/main/{FILE}'
        self.send_response(200 if known else 404)
        if known:
            for k, v in {'ETag': f'"{hashlib.sha256(BODY).hexdigest()}"', 'X-Repo-Commit': COMMIT, 'Content-Length': len(BODY)}.items(): self.send_header(k, str(v))
        else:
            self.send_header('X-Error-Code', 'EntryNotFound' if REPO in self.path else 'RepoNotFound'); self.send_header('Content-Length', '0')
        self.end_headers()
        if known and body: self.wfile.write(BODY)

@pytest.fixture
def hub():
    Hub.asked.clear()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()

def ask(hub, home, *what, **env):
    "What `load_dfot(**kw)` does for each of `what`, in a new process: the sum of the weights, or its message."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HOME': str(home), 'HF_ENDPOINT': f'http://127.0.0.1:{hub.server_port}',
           'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_OFFLINE': '0', 'NO_PROXY': '127.0.0.1', **env}
    p = subprocess.run([sys.executable, '-c', CLIENT, json.dumps(what)], env=env, capture_output=True, text=True, timeout=200)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout.splitlines()[-1])

def test_fetched_once_then_from_the_cache(hub, tmp_path):
    default, again, no_file, no_repo = ask(hub, tmp_path, {}, {}, dict(file='none.ckpt'), dict(source='nobody/nothing'))
    assert isinstance(default, float) and again == default
    assert [path for c, path in Hub.asked if c == 'GET'] == [f'/{REPO}/resolve/main/{FILE}'], 'one download'
    Hub.asked.clear()
    cached, absent = ask(hub, tmp_path, {}, dict(file='none.ckpt'), HF_HUB_OFFLINE='1')
    assert cached == default and not Hub.asked, 'offline: the cache, and no question'
    for said, message in {'RemoteEntryNotFoundError': no_file, 'RepositoryNotFoundError': no_repo, 'LocalEntryNotFoundError': absent}.items():
        assert said in message and 'hf download' in message and len(message.splitlines()) == 1, message

@pytest.mark.slow
def test_the_line_is_cut(hub, tmp_path):
    "The client tries for half a minute, then takes what it has, or says so."
    default, = ask(hub, tmp_path, {})
    assert ask(hub, tmp_path, {}, HF_ENDPOINT='http://127.0.0.1:9') == [default]
    message, = ask(hub, tmp_path/'empty', {}, HF_ENDPOINT='http://127.0.0.1:9')
    assert 'LocalEntryNotFoundError' in message and 'hf download' in message
