"""What cannot live in the scenes notebook: rooms rendered by several processes, and by processes that are killed."""
import signal, subprocess, sys, time

import pytest
from dfot_vggt.data.re10k import Layout, read_npz, read_pose_table
from dfot_vggt.data.scenes import make_re10k

def test_processes_agree(tmp_path):
    "Two processes write the bytes of one."
    one, two = tmp_path/'one', tmp_path/'two'
    keys = make_re10k(one, 'training', 3, frames=6)
    assert make_re10k(two, 'training', 3, frames=6, workers=2) == keys
    files = {p.relative_to(one) for p in one.rglob('*') if p.is_file()}
    assert files == {p.relative_to(two) for p in two.rglob('*') if p.is_file()} and len(files) == 3*3 + 1 + 3, 'and three listings'
    for k in keys:
        assert (read_npz(Layout(one, 'training').npz(k)) == read_npz(Layout(two, 'training').npz(k))).all()
        assert read_pose_table(Layout(one, 'training').table(k)).equal(read_pose_table(Layout(two, 'training').table(k)))

def test_killed(tmp_path):
    "What a killed run leaves behind is whole, and the next run completes it."
    code = f'from dfot_vggt.data.scenes import make_re10k; make_re10k({str(tmp_path)!r}, "test", 200, frames=4)'
    run = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL)
    place, deadline = Layout(tmp_path, 'test'), time.time() + 120
    while len(list(place.table('_').parent.glob('[!.]*.pt'))) < 3:
        assert run.poll() is None and time.time() < deadline, 'the run ended or hung before it could be killed'
        time.sleep(.01)
    run.send_signal(signal.SIGKILL); run.wait()
    found = place.keys()
    assert 3 <= len(found) < 200
    for k in found: assert len(read_npz(place.npz(k))) == len(read_pose_table(place.table(k))) == 4
    assert make_re10k(tmp_path, 'test', len(found) + 2, frames=4)[:len(found)] == found
    assert len(place.keys()) == len(found) + 2

def test_error_in_a_process_arrives(tmp_path):
    "A room that fails in a worker is an error here, not a missing clip."
    (tmp_path/'training_64').write_text('a file where a folder should be')
    with pytest.raises(OSError): make_re10k(tmp_path, 'training', 1, frames=4, workers=1)
