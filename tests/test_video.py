"Videos of many kinds, read by number; checksums under several processes, kills and flipped bits."
import os, signal, struct, subprocess, sys, time, warnings
from fractions import Fraction
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from dfot_vggt.app.check import dfot_check
from dfot_vggt.app.generate import growing_mp4
from dfot_vggt.checksums import LISTING, check_file, check_folder, checked_write, listed
from dfot_vggt.core import golden
from dfot_vggt.data import video
from dfot_vggt.data.camera import look_at
from dfot_vggt.data.re10k import Layout, check_clip, read_npz, read_pose_table, read_poses, write_npz, write_pose_table, write_poses
from dfot_vggt.data.video import check_mp4, probe_mp4, read_mp4, write_mp4

N = 40

def picture(i, h=96, w=128):
    "A frame `h w 3` that shows its number: six bars in the lower half."
    f = np.full((h, w, 3), 60, np.uint8)
    f[:h//2] = np.linspace(0, 255, w)[None, :, None]
    for b in range(6): f[h//2:, int(w*b/6):int(w*(b + 1)/6)] = 255*(i >> b & 1)
    return f

def code(f):
    "Number that a frame `3 h w` shows."
    h, w = f.shape[1:]
    row = f.astype(float).mean(0)[h*3//4]
    return sum(int(row[int(w*(b + .5)/6)] > 128) << b for b in range(6))

def make(path, n=N, codec='libx264', pix='yuv420p', h=96, w=128, options={}, fmt='mp4', mux={}, times=None, turn=0, first=None, **settings):
    "Write numbered frames; `first`: function that adds other tracks before this one and returns their packets."
    with av.open(str(path), 'w', format=fmt, options=mux) as box:
        others = first(box) if first else []
        track = box.add_stream(codec, rate=10, width=w, height=h, pix_fmt=pix, options=options)
        if turn: track.set_display_rotation(turn)
        for k, v in settings.items(): setattr(track.codec_context, k, v)
        if times: track.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i, h, w), format='rgb24')
            if times: frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            packets += track.encode(frame)
        packets += track.encode()
        box.start_encoding()
        for other, encode in others: packets += encode(other)
        packets.sort(key=lambda p: p.dts*p.time_base)
        for p in packets: box.mux(p)
    return path

def sound(box):
    "A track of silence, before that of the frames."
    track = box.add_stream('aac', rate=8000)
    def encode(track):
        for i in range(4*N//4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), format='fltp', layout='mono')
            frame.sample_rate, frame.pts, frame.time_base = 8000, i*800, Fraction(1, 8000)
            yield from track.encode(frame)
        yield from track.encode(None)
    return [(track, encode)]

def still(codec, n, cover):
    "A second track of grey frames; `cover`: marked as the picture of the cover."
    def add(box):
        track = box.add_stream(codec, rate=10, width=32, height=32, pix_fmt='yuvj420p' if codec == 'mjpeg' else 'yuv420p')
        if cover: track.disposition = av.stream.Disposition.attached_pic
        def encode(track):
            for _ in range(n): yield from track.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9, np.uint8), format='rgb24'))
            yield from track.encode(None)
        return [(track, encode)]
    return add

def boxes(data, at, end):
    while at < end:
        size, name = struct.unpack('>I4s', data[at:at + 8])
        yield name, at, at + size
        at += size

def with_edits(path, entries):
    "Replace the edit list of the first track; `entries`: (frames shown, first frame or -1 for nothing). moov must be the last box."
    data = path.read_bytes()
    moov = next(b for b in boxes(data, 0, len(data)) if b[0] == b'moov')
    trak = next(b for b in boxes(data, moov[1] + 8, moov[2]) if b[0] == b'trak')
    inside = {b[0]: b for b in boxes(data, trak[1] + 8, trak[2])}
    movie = next(b for b in boxes(data, moov[1] + 8, moov[2]) if b[0] == b'mvhd')
    per_second, = struct.unpack('>I', data[movie[1] + 20:movie[1] + 24])
    media = next(b for b in boxes(data, inside[b'mdia'][1] + 8, inside[b'mdia'][2]) if b[0] == b'mdhd')
    ticks, = struct.unpack('>I', data[media[1] + 20:media[1] + 24])
    offset = 2*ticks//10                                                  # B-frames: the first frame is shown two frames late
    rows = b''.join(struct.pack('>Iihh', n*per_second//10, -1 if at < 0 else offset + at*ticks//10, 1, 0) for n, at in entries)
    elst = struct.pack('>I4sII', 16 + len(rows), b'elst', 0, len(entries)) + rows
    edts = struct.pack('>I4s', 8 + len(elst), b'edts') + elst
    old = inside.get(b'edts', (b'', inside[b'mdia'][1], inside[b'mdia'][1]))
    data = bytearray(data[:old[1]] + edts + data[old[2]:])
    for at in (moov[1], trak[1]):
        size, = struct.unpack('>I', data[at:at + 4])
        data[at:at + 4] = struct.pack('>I', size + len(edts) - (old[2] - old[1]))
    path.write_bytes(data)
    return path

X265 = 'log-level=none'
KINDS = {
    'as write_mp4': {}, 'one frame': dict(n=1), 'no B-frames': dict(options=dict(bf='0')), 'only key frames': dict(options=dict(g='1')),
    'short GOPs': dict(options=dict(g='7')), 'open GOPs': dict(options={'x264-params': 'open-gop=1:keyint=12:b-adapt=0:scenecut=0'}),
    'intra refresh': dict(options={'x264-params': 'intra-refresh=1:keyint=10'}), 'repeated headers': dict(options={'x264-params': 'repeat-headers=1'}),
    'h265': dict(codec='libx265', options={'x265-params': X265}),
    'h265 open GOPs': dict(codec='libx265', options={'x265-params': f'open-gop=1:keyint=8:min-keyint=8:bframes=3:{X265}'}),
    'h265 10 bits': dict(codec='libx265', pix='yuv420p10le', options={'x265-params': f'keyint=8:{X265}'}),
    'vp9': dict(codec='libvpx-vp9', options=dict(g='10')), 'vp9 hidden frames': dict(codec='libvpx-vp9', options={'auto-alt-ref': '1', 'lag-in-frames': '20'}),
    'webm': dict(codec='libvpx-vp9', fmt='webm'), 'vp8 in webm': dict(codec='libvpx', fmt='webm', options={'auto-alt-ref': '1', 'lag-in-frames': '20'}),
    'av1': dict(codec='libsvtav1', options=dict(g='10', preset='10')), 'mpeg4': dict(codec='mpeg4', options=dict(bf='2', g='10', b='2000k')),
    'avi': dict(codec='mpeg4', fmt='avi', options=dict(bf='2', g='10')), 'mpegts': dict(fmt='mpegts'), 'mkv': dict(fmt='matroska'),
    '10 bits': dict(pix='yuv420p10le'), 'yuv444': dict(pix='yuv444p'), 'odd size': dict(pix='yuv444p', h=65, w=97),
    'full range': dict(pix='yuvj420p', color_range=2), 'bt709': dict(colorspace=1), 'mjpeg': dict(codec='mjpeg', pix='yuvj420p'),
    'prores': dict(codec='prores_ks', pix='yuv422p10le', fmt='mov'), 'gif': dict(codec='gif', pix='rgb8', fmt='gif'), 'png': dict(codec='png', pix='rgb24', fmt='mov'),
    'interlaced': dict(options={'flags': '+ildct+ilme', 'x264-params': 'tff=1'}), 'fragments': dict(mux=dict(movflags='frag_keyframe+empty_moov')),
    'a fragment per frame': dict(mux=dict(movflags='frag_every_frame+empty_moov+default_base_moof')), 'faststart': dict(mux=dict(movflags='faststart')),
    'no edit list': dict(mux=dict(use_editlist='0')), 'varying rate': dict(times=[i*100 + i % 3*20 for i in range(N)]),
    'a gap': dict(times=[i*100 + 500*(i > 20) for i in range(N)]), 'late': dict(times=[i*100 + 700 for i in range(N)]),
    'turned 90': dict(turn=90), 'turned 180': dict(turn=180), 'turned -90': dict(turn=-90), 'wide pixels': dict(sample_aspect_ratio=Fraction(4, 3)),
    'sound first': dict(first=sound), 'a cover': dict(first=still('mjpeg', 1, True))}

def sequential(path):
    "All frames in the order of decoding, upright: what a player shows."
    with av.open(str(path)) as box:
        track = next(s for s in box.streams.video if not s.disposition & av.stream.Disposition.attached_pic)
        return np.stack([video._upright(f, path) for f in box.decode(track)]).transpose(0, 3, 1, 2)

def lists(n):
    draw = np.random.default_rng(0)
    return [[*range(n)], [*range(n)][::-1], [*range(0, n, 5)], [n - 1, 3 % n, n//2], *([i] for i in range(n)), *(draw.integers(0, n, 6).tolist() for _ in range(9))]

def agrees(path, n=N):
    "Read every list with and without decord; compare with the sequence; returns the numbers that the frames show."
    truth, probe = sequential(path), probe_mp4(path)
    assert len(truth) == len(probe) == len(check_mp4(path)) == n
    for index in lists(n):
        assert np.array_equal(read_mp4(path, index, n), truth[index]), index
        assert np.array_equal(video._pyav(path, index)[1]().transpose(0, 3, 1, 2), truth[index]), index
    return [code(f) for f in truth]

@pytest.mark.parametrize('kind', KINDS)
def test_F01_frame_i_is_frame_i_in_every_kind_of_file(tmp_path, kind):
    how = KINDS[kind]
    shown = agrees(make(tmp_path/'clip.mp4', **how), how.get('n', N))
    if 'turn' not in how: assert shown == [*range(how.get('n', N))]

@pytest.mark.parametrize('name,shown', [('F01_open_gop', [*range(48)]), ('F03_cut', [*range(18, 39), 40]), ('F04_av1', [*range(20)]),
                                        ('F05_fragmented', [*range(20)])])
def test_F01_F03_F04_F05_files_of_the_field(tmp_path, name, shown):
    path, n = golden(f'field/{name}.mp4'), len(shown)
    assert agrees(path, n) == shown
    with pytest.raises(ValueError, match=f'expected {n + 6} frames, one per pose, got {n}'): read_mp4(path, [0], n + 6)
    assert video._pyav(path, [0, n - 1])[0] == n
    with patch.object(video, 'find_spec', return_value=None): assert [code(f) for f in read_mp4(path, range(n), n)] == shown

def clip(root, data, n):
    "A data set of one clip: this video and `n` poses."
    place, x = Layout(root, 'training'), torch.linspace(0, 1, n)
    place.mp4('a').parent.mkdir(parents=True, exist_ok=True)
    place.mp4('a').write_bytes(data)
    write_pose_table(place.table('a'), look_at(torch.stack([x, 0*x, 0*x], -1), torch.tensor([0., 0., 9.]).expand(n, 3)))
    return place

def test_F05_a_film_of_a_rollout_passes_the_check(tmp_path):
    with growing_mp4(tmp_path/'film.mp4', 96, 128) as write: write(np.stack([picture(i) for i in range(20)]).transpose(0, 3, 1, 2))
    assert agrees(tmp_path/'film.mp4', 20) == [*range(20)]
    assert check_clip(clip(tmp_path, (tmp_path/'film.mp4').read_bytes(), 20), 'a') == 20
    with pytest.raises(ValueError, match='expected 21 frames, one per pose of a.pt, got 20'): check_clip(clip(tmp_path, (tmp_path/'film.mp4').read_bytes(), 21), 'a')

@pytest.mark.parametrize('source', ['short GOPs', 'open GOPs', 'h265 open GOPs', 'vp9'])
@pytest.mark.parametrize('start', [.7, 1.2, 1.75])
def test_F03_cuts_without_encoding(tmp_path, source, start):
    make(tmp_path/'source.mp4', **KINDS[source])
    with av.open(str(tmp_path/'source.mp4')) as box, av.open(str(tmp_path/'cut.mp4'), 'w') as out:
        track = box.streams.video[0]
        to, begin = out.add_stream_from_template(track), int(start/track.time_base)
        box.seek(begin, stream=track)
        for p in box.demux(track):
            if p.dts is None or p.dts*p.time_base > 3.5: continue
            p.pts, p.dts, p.stream = p.pts - begin, p.dts - begin, to
            out.mux(p)
    n = len(sequential(tmp_path/'cut.mp4'))
    shown = agrees(tmp_path/'cut.mp4', n)
    assert shown == sorted(set(shown)) and shown[0] >= int(start*10)

@pytest.mark.parametrize('entries', [[(20, 10)], [(10, 0), (10, 25)], [(10, 25), (10, 5)], [(5, -1), (20, 3)], [(8, 4), (8, 4)]], ids=str)
def test_F03_edit_lists(tmp_path, entries):
    "A part, two parts, two parts in another order, a pause at the beginning, the same part twice: as a decoder shows them, or refused."
    path = with_edits(make(tmp_path/'clip.mp4', options=dict(g='7')), entries)
    n = len(sequential(path))
    shown = agrees(path, n)
    assert shown == [i for k, at in entries if at >= 0 for i in range(at, at + k)], shown

REFUSED = {
    'two tracks': (lambda p: make(p, first=still('libx264', N, False)), 'one video track, got 2 video tracks; keep one: ffmpeg -i clip.mp4 -map 0:v:0'),
    'oblique': (lambda p: make(p, turn=45), 'quarter turns'),
    'only sound': (lambda p: only_sound(p), 'one video track, got 0 video tracks'),
    'a web page': (lambda p: p.write_bytes(b'<html>404</html>'), 'on opening'), 'empty': (lambda p: p.write_bytes(b''), '0 bytes'),
    'text': (lambda p: p.write_bytes(b'hello\n'*50), 'on opening'), 'a playlist': (lambda p: playlist(p), 'on opening'),
    'half, index at the end': (lambda p: p.write_bytes(make(p).read_bytes()[:2000]), 'on opening'),
    'no frame': (lambda p: make(p, n=0), 'expected a video'), 'a folder': (lambda p: p.mkdir(), 'no file')}

def only_sound(path):
    with av.open(str(path), 'w', format='mp4') as box:
        (track, encode), = sound(box)
        for p in encode(track): box.mux(p)

def playlist(path):
    make(path.with_name('other.mp4'))
    path.write_bytes(b'ffconcat version 1.0\nfile other.mp4\n')

@pytest.mark.parametrize('what', REFUSED)
def test_F04_what_cannot_be_read_is_one_sentence_for_reader_and_check(tmp_path, what):
    act, text = REFUSED[what]
    path = tmp_path/'clip.mp4'
    act(path)
    for read in (lambda: read_mp4(path, [0]), lambda: check_mp4(path)):
        with pytest.raises((ValueError, FileNotFoundError)) as e: read()
        assert text in str(e.value) and str(e.value).startswith(str(path)) and '\n' not in str(e.value), str(e.value)

def test_truncated_files_show_the_frames_before_the_cut(tmp_path):
    for mux in ('faststart', 'frag_every_frame+empty_moov+default_base_moof', 'frag_keyframe+empty_moov'):
        whole, counts = make(tmp_path/'whole.mp4', options=dict(g='5'), mux=dict(movflags=mux)).read_bytes(), []
        truth = sequential(tmp_path/'whole.mp4')
        for share in np.linspace(.1, 1, 19):
            (tmp_path/'cut.mp4').write_bytes(whole[:int(share*len(whole))])
            try: n = len(probe_mp4(tmp_path/'cut.mp4'))
            except ValueError as e:
                assert 'on opening' in str(e) or 'no frame that can be decoded' in str(e), e
                continue
            shown = [code(f) for f in read_mp4(tmp_path/'cut.mp4', range(n), n)]
            counts.append(n)
            assert shown == sorted(set(shown)) and shown[:max(n - 4, 0)] == [*range(max(n - 4, 0))], (mux, share, shown)
            if n < N:
                with pytest.raises(ValueError, match='one per pose'): read_mp4(tmp_path/'cut.mp4', [0], N)
        assert counts == sorted(counts) and counts[-1] == N == len(truth) and len(counts) > 5, (mux, counts)

def test_a_file_that_is_written_again_is_looked_at_again(tmp_path):
    path = tmp_path/'clip.mp4'
    for n in (3, 9, 9, 5):
        write_mp4(path, np.stack([picture(i + n) for i in range(n)]).transpose(0, 3, 1, 2))
        assert [code(f) for f in read_mp4(path, range(n), n)] == [*range(n, 2*n)]

def test_turned_by_a_phone(tmp_path):
    plain = read_mp4(make(tmp_path/'a.mp4', n=3), [2])[0]
    for quarter, turn in enumerate((90, 180, 270), 1):
        assert np.array_equal(read_mp4(make(tmp_path/f'{turn}.mp4', n=3, turn=turn), [2])[0], np.rot90(plain, quarter, axes=(1, 2)))

# --- checksums

def data_set(root):
    "One clip with all its files; returns {suffix: (path, reader)}."
    place, x = Layout(root, 'training'), torch.linspace(0, 1, 12)
    cams = look_at(torch.stack([x, 0*x, 0*x], -1), torch.tensor([0., 0., 9.]).expand(12, 3))
    frames = np.stack([picture(i, 64, 64) for i in range(12)]).transpose(0, 3, 1, 2)
    write_poses(place.txt('a'), 'https://example.org/a', torch.arange(12)*100_000, cams)
    write_pose_table(place.table('a'), cams)
    write_npz(place.npz('a'), frames)
    write_mp4(place.mp4('a', 64), frames)
    weights = root/'model.safetensors'
    with checked_write(weights) as tmp: save_file({'w': torch.randn(50, 50)}, tmp)
    return {'mp4': (place.mp4('a', 64), lambda p: read_mp4(p, [0, 5, 11])), 'npz': (place.npz('a'), read_npz), 'pt': (place.table('a'), read_pose_table),
            'txt': (place.txt('a'), read_poses), 'safetensors': (weights, check_file)}

@pytest.mark.parametrize('kind', ['mp4', 'npz', 'pt', 'txt', 'safetensors'])
def test_R13_no_flipped_bit_is_silent(tmp_path, kind, capsys):
    path, read = data_set(tmp_path)[kind]
    good, draw = path.read_bytes(), np.random.default_rng(13)
    for bit in draw.integers(0, 8*len(good), 60):
        bits = bytearray(good)
        bits[bit//8] ^= 1 << bit % 8
        path.write_bytes(bits)
        with pytest.raises(ValueError, match=f'{path.name}: expected .* with the checksum in SHA256SUMS'): read(path)
    with pytest.raises(SystemExit) as e: dfot_check(str(tmp_path))
    out = capsys.readouterr().out.splitlines()
    assert e.value.code == 1 and len(out) == 2 and out[0].startswith(str(path)) and '1 damaged' in out[1], out
    path.write_bytes(good)
    read(path)
    dfot_check(str(tmp_path), clips=True)

def test_R13_worlds_without_checksums_are_read_and_get_some(tmp_path, capsys):
    files = data_set(tmp_path)
    for p in tmp_path.rglob(LISTING): p.unlink()
    for path, read in files.values(): read(path)
    dfot_check(str(tmp_path))
    assert '5 files without a checksum: --write records them' in capsys.readouterr().out
    dfot_check(str(tmp_path), write=True)
    assert 'checksums of 5 files recorded' in capsys.readouterr().out
    dfot_check(str(tmp_path))
    assert '5 files compared with their checksums, 0 damaged or absent\n' in capsys.readouterr().out

def python(code, *args, **kw):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

WRITER = """import sys
from pathlib import Path
import numpy as np
from dfot_vggt.data.re10k import write_npz
root, me, n = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print('ready', flush=True)
for k in range(n): write_npz(root/f'{me}_{k}.npz', np.full((1, 3, 8, 8), k + me, np.uint8)); write_npz(root/'all.npz', np.full((1, 3, 8, 8), k + me, np.uint8))
"""

def test_R13_several_writers_at_once(tmp_path):
    writers = [python(WRITER, tmp_path, me, 60) for me in range(3)]
    for p in writers:
        out, err = p.communicate(timeout=200)
        assert p.returncode == 0, err
    lines = (tmp_path/LISTING).read_text().splitlines()
    assert len(lines) == 3*60*2 and all(len(line.split('  ')) == 2 for line in lines)
    report = check_folder(tmp_path)
    assert (report.checked, report.damaged, report.unlisted) == (181, (), ())

def test_R13_a_killed_writer_leaves_no_false_alarm(tmp_path):
    for k in range(6):
        p = python(WRITER, tmp_path, 0, 10**6)
        assert p.stdout.readline() == 'ready\n'
        time.sleep(.15 + .05*k)
        p.send_signal(signal.SIGKILL)
        p.communicate()
        report = check_folder(tmp_path)
        assert not [d for d in report.damaged if 'got none' not in d] and not report.unlisted, report
        assert len([d for d in report.damaged if 'got none' in d]) <= 1                # the file that was about to receive its name
        read_npz(tmp_path/'all.npz')
    with open(tmp_path/LISTING, 'r+b') as f: f.truncate(f.seek(0, 2) - 30)              # and a disk that was full
    write_npz(tmp_path/'all.npz', np.zeros((1, 3, 8, 8), np.uint8))
    read_npz(tmp_path/'all.npz')
    assert not [d for d in check_folder(tmp_path).damaged if 'got none' not in d]

def test_R13_an_interrupted_check_says_so(tmp_path):
    "Ctrl-C: exit code 130, one sentence, and no other file."
    for k in range(3): (tmp_path/f'{k}.npy').write_bytes(b'x'*10)
    os.mkfifo(tmp_path/'hangs.npy')                                                    # no regular file: left out
    p = python("from dfot_vggt.app.check import dfot_check\nimport dfot_vggt.checksums as c, time, sys\n"
               "c.check_folder = lambda *a: print('ready', flush=True) or time.sleep(60)\ndfot_check(sys.argv[1])", tmp_path)
    assert p.stdout.readline() == 'ready\n'
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'dfot_check: interrupted; no file was changed' in err and 'Traceback' not in err, err
    assert not (tmp_path/LISTING).exists()

def test_times_are_compared(tmp_path):
    "F03: a clip of the right number of frames at other times than its poses."
    gap = make(tmp_path/'gap.mp4', times=[i*100 + 500*(i > 20) for i in range(N)]).read_bytes()
    place = clip(tmp_path, gap, N)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        assert check_clip(place, 'a') == N
    assert 'no camera file tells the times of the poses' in str(warned[0].message)
    write_poses(place.txt('a'), 'https://example.org/a', torch.arange(N)*100_000, read_pose_table(place.table('a')))
    with pytest.raises(ValueError, match='expected 3.9 s from first to last frame as in the camera file'): check_clip(place, 'a')
    assert 'model.safetensors' not in listed(tmp_path)
