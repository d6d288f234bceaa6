"""Every injector, every pair of them and all together: nothing changes at step 0, everything lives by step 2, no unknown frame is ever seen;
and faults put into the library are caught."""
import warnings
from copy import deepcopy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from dfot_vggt.geometry import features as looking
from dfot_vggt.inject import controlnet as control, points as memory, tokens
from dfot_vggt.geometry.aggregator import random_weights
from dfot_vggt.inject.align import AlignCfg
from dfot_vggt.data.clips import Batch
from dfot_vggt.inject.checks import (Probe, check_addressing, check_trains, check_branches, check_in_place, check_in_view, check_gradient_path, check_no_leak, check_same_init,
                                     check_same_output)
from dfot_vggt.inject.controlnet import ControlCfg
from dfot_vggt.weights import LoadError
from dfot_vggt.denoiser.diffusion import DiffusionCfg, make_diffusion
from dfot_vggt.geometry.features import features
from dfot_vggt.denoiser.guidance import HistoryGuidance, guidance_from
from dfot_vggt.inject.injector import GeometryGuide, Injected, base_hash, by_length, load_injected, window_geometry
from dfot_vggt.inject.memory import MemoryCfg, MemoryNet
from dfot_vggt.learn.ablate import tap_changes
from dfot_vggt.learn.config import RunCfg
from dfot_vggt.learn.losses import injected_loss
from dfot_vggt.learn.runs import INJECTORS as MAKERS
from dfot_vggt.denoiser.rollout import stream
from dfot_vggt.denoiser.sampling import frame_noise, sample_window
from dfot_vggt.data.scenes import Room, render, walk
from dfot_vggt.geometry.feature_cache import CacheCfg
from dfot_vggt.denoiser.tasks import GENERATED, CONTEXT, PAD, PrefixMixture
from dfot_vggt.inject.tokens import TokenCfg, TokenInjector
from dfot_vggt.trace import liveness
from dfot_vggt.learn.train import weights
from dfot_vggt.denoiser.pose_cache import CachedUViT3DPose
from dfot_vggt.denoiser.uvit import Level, UViTCfg, golden_weights
from dfot_vggt.geometry.vggt import VGGT, VGGTCfg
from safetensors.torch import save_file

EYE, LAYERS, T = VGGTCfg.tiny(), (2, 4), 4
WIDTH = 2*EYE.dim*len(LAYERS)
SETTINGS = dict(control=ControlCfg(latent=WIDTH, camera=WIDTH, first=0), tokens=TokenCfg(latent=WIDTH, camera=WIDTH, tokens=4, width=32),
                memory=MemoryCfg(first=0))             # copies of the way down too: they speak into a skip and into the middle
INJECTORS = [*SETTINGS]
SETS = [names for n in (1, 2, 3) for names in combinations(INJECTORS, n)]
together = pytest.mark.parametrize('names', SETS, ids='+'.join)

def denoiser(): return golden_weights(CachedUViT3DPose(UViTCfg.tiny(channels=(32, 48), heads=2, mid=2, emb=32, size=32, frames=T, dropout=(0., 0.))))
def injected(base, names, settings=SETTINGS, **kw):
    torch.manual_seed(0)
    return Injected(base, {n: MAKERS[n](base, settings[n]) for n in names}, **kw).eval()

@pytest.fixture(scope='module')
def base():
    torch.set_num_threads(1)
    return denoiser()

class World:
    "Two walks: windows of four frames, of which two are known, and one frame of history behind each."
    def __init__(self):
        self.vggt = random_weights(VGGT(EYE, heads=('camera_head', 'depth_head'))).eval().requires_grad_(False)
        cams = torch.stack([walk(Room(i))[[0, 2, 4, 6, 12]] for i in (3, 4)])
        self.batch = Batch(torch.stack([render(Room(i), c, 32).rgb for i, c in zip((3, 4), cams)]), cams, ['a', 'b'], torch.arange(5).repeat(2, 1))
        self.observed_frames = torch.tensor([[True, False, True, False], [True, True, False, False]])
        self.video, self.cams = self.batch.video[:, :T], self.batch.cams[:, :T]
        g = torch.Generator().manual_seed(0)
        self.probe = Probe(torch.randn(2, T, 3, 32, 32, generator=g), torch.randn(2, T, generator=g), self.cams,
                           self.geometry(self.video, self.cams, self.observed_frames))

    def look(self, video, cams, known): return features(self.vggt, video, cams, known, LAYERS, depth=True)

    def geometry(self, video, cams, known):
        "What the injectors get: of the known frames and of the history."
        def whole(mine, all_): return torch.cat([mine, all_[:, T:]], 1)
        batch = Batch(whole(video, self.batch.video), whole(cams, self.batch.cams), self.batch.keys, self.batch.index)
        return window_geometry(self.look, batch, known)

    def cut(self, video, cams, known):
        "The leak: a run over all frames, of which the known ones are taken."
        every = self.geometry(video, cams, torch.ones_like(known))
        hidden = torch.cat([~known, torch.zeros(len(known), 1, dtype=torch.bool)], 1)
        return replace(every, index=every.index.masked_fill(hidden, -2))

@pytest.fixture(scope='module')
def world():
    torch.set_num_threads(1)
    return World()

# --- step 0, step 2, no unknown frame

@together
def test_step_0_is_the_base_bit_for_bit(names, base, world):
    net = injected(base, names)
    assert not check_same_output(net, world.probe)
    change = tap_changes(base, net, world.probe.x, world.probe.noise_levels, world.cams, world.probe.geometry)
    assert len(change) == len(base.tap_names) and not torch.stack([*change.values()]).any(), 'grey everywhere'

@together
def test_alive_by_step_2_and_nothing_frozen_moves(names, base, world):
    net, before = injected(base, names), base_hash(base)
    assert {n.split('.')[1] for n, p in net.named_parameters() if p.requires_grad} == set(names)
    assert not check_trains(net, world.probe)
    assert torch.equal(base_hash(base), before)
    assert not check_gradient_path(net, world.probe) and not check_branches(net, world.probe)

@together
def test_with_the_base_trained_along_all_of_it_lives(names, world):
    base = denoiser()
    net, p = injected(base, names, train_base=True), world.probe
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.)
    with torch.no_grad(): assert torch.equal(p.base(net), p.base(net, control=p.control(net)))
    def step(i):
        loss = (p.base(net, control=p.control(net)) - 1).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    liveness(net, step).assert_ok()

@together
def test_no_unknown_frame_is_seen(names, base, world):
    net = injected(base, names)
    assert not check_no_leak(net, world.probe, world.geometry, world.video, world.observed_frames)
    assert check_no_leak(net, world.probe, world.cut, world.video, world.observed_frames), 'the leak that this test is for'

# --- faults in the library: a part alone is caught, and in a pair the other part does not hide it

def loud(right): return lambda module: module                                       # a zero layer that is not
def afresh(right):
    def fresh(module):
        module = deepcopy(module)
        for p in module.parameters(): torch.nn.init.normal_(p, std=.1)
        return module
    return fresh
def skipped(right):                                                                 # the copies are there, and the base's own blocks run
    def sections(self):
        own = self.base.sections()
        return {n: (i, Level([*own[n][1]][:len(level)])) for n, (i, level) in right(self).items()}
    return sections
def no_grad(right): return torch.no_grad()(right)
def next_frame(right): return lambda *a: right(*a).roll(1, 1)
def mirrored(right): return lambda *a, **kw: tuple(x.flip(-1) for x in right(*a, **kw))
def blurred(right):
    def sources(self, cams, g, cond_mask=False):
        return right(self, cams, replace(g, latents=g.latents.mean((3, 4), keepdim=True).expand_as(g.latents)), cond_mask)
    return sources
def one_more(right): return lambda video, cams, known: right(video, cams, known) | (torch.arange(known.shape[1]) == 3)

FAULTS = {'a zero is dropped': dict(control=(control, 'zero_init', loud), memory=(control, 'zero_init', loud), tokens=(tokens, 'zero_init', loud)),
          'the copy is not one': dict(control=(control, 'deepcopy', afresh), memory=(control, 'deepcopy', afresh)),
          'the copy is skipped': dict(control=(control.ControlNet, 'sections', skipped), memory=(MemoryNet, 'sections', skipped)),
          'a gradient is cut': dict(control=(control.ControlNet, 'entry_maps', no_grad), memory=(MemoryNet, 'entry_maps', no_grad),
                                    tokens=(TokenInjector, 'prepared', no_grad)),
          'the layout is scrambled': dict(control=(control, 'place', next_frame), memory=(memory, 'splat', mirrored),
                                          tokens=(TokenInjector, 'sources', blurred)),
          'a frame leaks': {n: (looking, 'aligned', one_more) for n in INJECTORS}}

def complaints(fault, part, names, base, world):
    "What the check says that this fault is the business of."
    net = injected(base, names)
    one = net.injectors[part]
    match fault:
        case 'a zero is dropped': return check_same_output(net, world.probe)
        case 'the copy is not one': return check_same_init(one)
        case 'the copy is skipped' | 'a gradient is cut': return [c for c in check_trains(net, world.probe) if f'.{part}.' in c]
        case 'the layout is scrambled': return dict(control=check_in_place, memory=check_in_view, tokens=check_addressing)[part](one, world.probe)
        case 'a frame leaks': return check_no_leak(net, world.probe, world.geometry, world.video, world.observed_frames)

# a part alone too: what its partner complains of is not taken for its own
@pytest.mark.parametrize('fault,names', [pytest.param(f, s, id=f'{f}-{"+".join(s)}') for f in FAULTS for s in SETS
                                         if len(s) < 3 and FAULTS[f].keys() & set(s)])
def test_a_fault_in_a_part_and_in_either_of_a_pair_is_caught(fault, names, base, world, monkeypatch):
    for part in set(names) & FAULTS[fault].keys():
        where, name, wrong = FAULTS[fault][part]
        assert not complaints(fault, part, names, base, world), part
        with monkeypatch.context() as broken:
            broken.setattr(where, name, wrong(getattr(where, name)))
            assert complaints(fault, part, names, base, world), part

# --- sampling

KINDS = pytest.mark.parametrize('names', [s for s in SETS if len(s) != 2], ids='+'.join)

def window(net, world, rows, mask, scheme='conditional', heard=True):
    "Some clips' windows, denoised: their own noise, geometry of the frames that are not asked."
    n = mask.shape[1]
    video, cams = world.video[rows, :n], world.cams[rows, :n]
    say = by_length(net, cams, world.look(video, cams, mask > 0), mask)
    return sample_window(net.base, make_diffusion(DiffusionCfg.world()), net.base.normalise(video), mask, net.base.pose_cond(cams),
                         frame_noise(0, ['a', 'b'][rows], range(n), (3, 32, 32)), 3, guidance_from(scheme), control=say if heard else None)

@KINDS
@pytest.mark.parametrize('scheme', ['conditional', 'vanilla(2)', 'stabilized_vanilla(2, .1)', 'fractional(2, .4)'])
def test_under_every_guidance_a_clip_hears_its_own_geometry(scheme, names, base, world):
    net, mask = trained(base, names), torch.where(torch.arange(T) == 0, CONTEXT, GENERATED)*world.observed_frames
    both, plain = (window(net, world, slice(0, 2), mask, scheme, heard) for heard in (True, False))
    alone = torch.cat([window(net, world, slice(i, i + 1), mask[i:i + 1], scheme) for i in (0, 1)])
    assert (both - plain)[~world.observed_frames].abs().mean() > 1e-3*both.std(), 'it is heard'
    assert torch.equal(both[world.observed_frames], plain[world.observed_frames]), 'known frames come back as they are'
    assert (both - alone).abs().max() < 1e-3*both.std()

@KINDS
def test_padded_clips_are_denoised_as_if_alone(names, base, world):
    net, mask = trained(base, names), torch.tensor([[CONTEXT, 0, 0, PAD], [CONTEXT, 0, GENERATED, 0]])
    both = window(net, world, slice(0, 2), mask)
    for i, n in ((0, 3), (1, 4)):
        alone = window(net, world, slice(i, i + 1), mask[i:i + 1, :n])
        assert (both[i, :n] - alone[0]).abs().max() < 1e-3*both.std()
        assert not torch.equal(alone, window(net, world, slice(i, i + 1), mask[i:i + 1, :n], heard=False))

# --- alignment beside an injector: the base learns from three losses, the injector from one

@pytest.mark.parametrize('name', INJECTORS)
def test_alignment_and_an_injector_train_together(name, world):
    base, align = denoiser(), AlignCfg(WIDTH, len(LAYERS), 'mid.0', width=16)
    run = RunCfg('both', model=base.cfg, task=PrefixMixture(most=2, clips=1.), vggt=EYE, layers=LAYERS, cache=CacheCfg(depth=True), train_base=True,
                 align=align, **{name: SETTINGS[name]})
    torch.manual_seed(0)
    net = Injected(base, {n: MAKERS[n](base, getattr(run, n)) for n in (name, 'align')}, train_base=True).train()
    loss, opt = injected_loss(run, world.look), torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.)
    def step(i):
        losses = loss(net, (world.batch, i))
        assert {n: v.shape for n, v in losses.items()} == {n: (2,) for n in ('diffusion', 'angular', 'scale')}
        opt.zero_grad(); sum(v.mean() for v in losses.values()).backward(); opt.step()
    liveness(net, step, 4).assert_ok()
    said = net.eval().window(world.cams, None, world.probe.geometry)(world.probe.x, world.probe.noise_levels)
    assert set(net.output_taps) <= set(said) and not any(hasattr(net.injectors.align, n) for n in ('window', 'output_taps')), 'nothing of it in a video'

# --- checkpoints

def trained(base, names):
    "As if it had been trained."
    net, g = injected(base, names), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters(): p.add_(.05*torch.randn(p.shape, generator=g))
    return net

def answer(net, world):
    with torch.no_grad(): return world.probe.base(net, control=world.probe.control(net))

def quiet(load, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return load(*args, **kw)

@together
def test_checkpoint_holds_what_trains_and_comes_back(names, base, world, tmp_path):
    net, file = trained(base, names), tmp_path/'model.safetensors'
    save_file(weights(net), file)
    assert set(weights(net)) == {n for n, _ in net.named_parameters()} | {'base_hash'}
    again = injected(base, names)
    quiet(load_injected, again, file)
    assert torch.equal(answer(again, world), answer(net, world))
    assert not torch.equal(answer(again, world), world.probe.base(net).detach())

@pytest.mark.parametrize('names', [s for s in SETS if len(s) > 1], ids='+'.join)
def test_any_part_can_be_left_out(names, base, tmp_path):
    net, file = trained(base, names), tmp_path/'model.safetensors'
    save_file(weights(net), file)
    for left in names:
        fewer, rest = injected(base, [n for n in names if n != left]), {n for n in weights(net) if not n.startswith(f'injectors.{left}.')}
        with pytest.raises(LoadError, match=f'unexpected: injectors.{left}.'): load_injected(fewer, file)
        quiet(load_injected, fewer, file, without=[left])                           # left out of the model
        assert all(torch.equal(fewer.state_dict()[n], net.state_dict()[n]) for n in rest)
        save_file(weights(fewer), tmp_path/'fewer.safetensors')
        full = injected(base, names)
        with pytest.raises(LoadError, match=f'missing: injectors.{left}.'): load_injected(full, tmp_path/'fewer.safetensors')
        fresh = {n: p.clone() for n, p in full.state_dict().items()}
        quiet(load_injected, full, tmp_path/'fewer.safetensors', without=[left])    # left out of the file
        assert all(torch.equal(full.state_dict()[n], (net if n in rest else injected(base, names)).state_dict()[n]) for n in fresh)

def test_R12_another_base_is_refused_and_both_are_named(base, tmp_path):
    file = tmp_path/'model.safetensors'
    save_file(weights(trained(base, INJECTORS)), file)
    strange = denoiser()
    with torch.no_grad(): next(strange.parameters()).view(-1)[0].add_(1e-4)
    with pytest.raises(LoadError, match='control, tokens, memory') as e: load_injected(injected(strange, INJECTORS), file)
    assert all(bytes(base_hash(b).tolist()).hex()[:12] in str(e.value) for b in (base, strange))
    net = injected(strange, INJECTORS)
    load_injected(net, file, mismatch_ok=('base',))
    assert torch.equal(net.base_hash, base_hash(base)), 'the model keeps the hash of the base that its injectors were trained on'

WIDER = dict(control=SETTINGS['control'].replace(latent=WIDTH + 1), tokens=SETTINGS['tokens'].replace(width=64),
             memory=SETTINGS['memory'].replace(features=8))

@pytest.mark.parametrize('name', INJECTORS)
def test_mis_shaped_parts_are_named_and_nothing_is_loaded(name, base, tmp_path):
    file = tmp_path/'model.safetensors'
    save_file(weights(trained(base, INJECTORS)), file)
    wide = injected(base, INJECTORS, SETTINGS | {name: WIDER[name]})
    before = {n: p.clone() for n, p in wide.state_dict().items()}
    with pytest.raises(LoadError, match=rf'mis-shaped: injectors\.{name}\.'): load_injected(wide, file)
    assert all(torch.equal(p, before[n]) for n, p in wide.state_dict().items())

# --- a walk

@together
def test_a_walk_goes_on_where_it_stopped(names, base, world):
    "Memory included: what `GeometryGuide` puts down after a window and takes up again gives the same frames, bit for bit."
    net, cams = trained(base, names), torch.stack([walk(Room(i))[:16:2] for i in (3, 4)])
    first = torch.stack([render(Room(i), c[:1], 32).rgb for i, c in zip((3, 4), cams)])
    def walk_on(guide, past=None):
        return stream(base, make_diffusion(DiffusionCfg.world()), first, cams, 2, steps=2, geometry=guide, state=past,
                      guidance=HistoryGuidance.vanilla(1.5))
    guide, made, places = GeometryGuide(net, world.look), [], []
    for new, past in walk_on(guide):
        made.append(new)
        places.append((past, {n: x.clone() for n, x in guide.state_dict().items()}))
    assert sum(x.shape[1] for x in made) == 8 and len(places) > 3
    assert bool(guide.state_dict()) == ('memory' in names)
    again = GeometryGuide(net, world.look)
    again.load_state_dict(places[2][1])
    rest = [new for new, _ in walk_on(again, places[2][0])]
    assert torch.equal(torch.cat(rest, 1), torch.cat(made[3:], 1))
    if 'memory' in names:
        forgetful = [new for new, _ in walk_on(GeometryGuide(net, world.look), places[2][0])]
        assert not torch.equal(torch.cat(forgetful, 1), torch.cat(made[3:], 1)), 'without its memory another walk'
