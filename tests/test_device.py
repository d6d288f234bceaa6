"Unchanged on a GPU: what researchers call runs on another device, nothing is left behind on the CPU, and the numbers are the CPU's."
from copy import deepcopy

import pytest
import torch
from dfot_vggt.app import compare as study
from dfot_vggt.learn import ablate as ablation, metrics, muon, runs, train as training
from dfot_vggt.inject.align import AlignCfg
from dfot_vggt.data.camera import interpolate_cams, ray_encoding
from dfot_vggt.data.clips import Batch
from dfot_vggt.denoiser.diffusion import DiffusionCfg, make_diffusion
from dfot_vggt.widgets.level_explorer import LevelExplorer, activations
from dfot_vggt.denoiser.guidance import HistoryGuidance
from dfot_vggt.inject.injector import GeometryGuide, Injected
from dfot_vggt.learn.ablate import plot_ablation, tap_changes, mismatched_scene, ablate
from dfot_vggt.learn.config import RunCfg, WorldCfg
from dfot_vggt.learn.losses import base_loss, injected_loss
from dfot_vggt.geometry.reconstruct import cloud
from dfot_vggt.learn.runs import INJECTORS as MAKERS
from dfot_vggt.denoiser.rollout import stream
from dfot_vggt.data.scenes import Room, render, walk
from dfot_vggt.geometry.feature_cache import CacheCfg
from dfot_vggt.show import show_cams, show_clip, show_pca, video_tag
from dfot_vggt.learn.train_vggt import Views, geometry_loss, evaluate_vggt, new_vggt
from dfot_vggt.denoiser.tasks import GENERATED, CONTEXT, PAD, PrefixMixture
from dfot_vggt.inject.tokens import attention_shares
from dfot_vggt.geometry.vggt import VGGTCfg

from elsewhere import ELSEWHERE, Afar, Elsewhere, afar
from test_inject import EYE, INJECTORS, LAYERS, SETS, SETTINGS, T, WIDTH, World, answer, denoiser, trained, window

@pytest.fixture(scope='module')
def here():
    torch.set_num_threads(1)
    return World()

@pytest.fixture(autouse=True)
def autocast(monkeypatch):
    "None for this device; what asks for none is let through."
    class Autocast(torch.autocast):
        def __init__(self, device_type, **kw): super().__init__('cpu' if device_type == ELSEWHERE.type else device_type, **kw)
    monkeypatch.setattr(torch, 'autocast', Autocast)

class Moved(World):
    def __init__(self, w):
        self.vggt, self.batch, self.observed_frames = afar(deepcopy(w.vggt)), afar(w.batch), Afar(w.observed_frames)
        self.video, self.cams = self.batch.video[:, :T], self.batch.cams[:, :T]
        self.probe = type(w.probe)(Afar(w.probe.x), Afar(w.probe.noise_levels), self.cams, self.geometry(self.video, self.cams, self.observed_frames))

@pytest.fixture
def there(here):
    with Elsewhere(): yield Moved(here)

def agree(far, near, eps=1e-4):
    "The numbers of the CPU, and none of them on it. The median: a point of a memory that jumps a cell by rounding moves a few of them."
    if isinstance(near, dict):
        assert far.keys() == near.keys()
        for n in near: agree(far[n], near[n], eps)
    elif isinstance(near, torch.Tensor):
        assert isinstance(far, Afar), 'an answer on the CPU'
        assert far.shape == near.shape and (far.held - near).abs().median() <= eps*near.abs().max().clamp(min=1e-3)
    else: assert far == pytest.approx(near, rel=eps, abs=eps)

def test_what_is_left_behind_is_found():
    x = torch.arange(6.).view(2, 3)
    for f in (lambda a: a + torch.ones(2, 3), lambda a: torch.cat([a, torch.ones(1, 3)]), lambda a: a @ torch.ones(3, 3),
              lambda a: torch.where(torch.ones(2, 3) > 0, a, a), lambda a: a.gather(0, torch.zeros(1, 3).long()), lambda a: a.numpy()):
        f(x)
        with Elsewhere(), pytest.raises((RuntimeError, TypeError), match='elsewhere'): f(Afar(x))
    with Elsewhere():                                                                 # and what CUDA allows is allowed
        a = Afar(x)
        agree(a[torch.tensor([1, 0])] + 1 + torch.tensor(2.), x.flip(0) + 3)
        agree(a[[1, 0], 1:] + a.new_tensor([[1.], [0.]]) + torch.zeros(2, 2).to(a), torch.tensor([[5., 6.], [1., 2.]]))
        assert a.sum().item() == 15 and a.cpu().tolist() == x.tolist() and torch.zeros(2, device=a.device).device == ELSEWHERE
        a[0] = 0
        a.mul_(2)
        agree(a, torch.tensor([[0., 0., 0.], [6., 8., 10.]]))

# --- the denoiser and what is injected

@pytest.mark.parametrize('names', SETS, ids='+'.join)
def test_injectors(names, here, there):
    net = trained(denoiser(), names)
    agree(answer(afar(deepcopy(net)), there), answer(net, here))

@pytest.mark.parametrize('scheme', ['conditional', 'vanilla(2)', 'stabilized_vanilla(2, .1)', 'fractional(2, .4)'])
def test_a_window_under_guidance_and_with_padding(scheme, here, there):
    net = trained(denoiser(), INJECTORS)
    masks = torch.where(torch.arange(T) == 0, CONTEXT, GENERATED)*here.observed_frames, torch.tensor([[CONTEXT, 0, 0, PAD], [CONTEXT, 0, GENERATED, 0]])
    for mask in masks: agree(window(afar(deepcopy(net)), there, slice(0, 2), Afar(mask), scheme), window(net, here, slice(0, 2), mask, scheme))

@pytest.mark.parametrize('name', INJECTORS)
def test_a_training_step_of_an_injector_and_alignment(name, here, there):
    base = denoiser()
    run = RunCfg('both', model=base.cfg, task=PrefixMixture(most=2, clips=1.), noised_context=.5, vggt=EYE, layers=LAYERS, cache=CacheCfg(depth=True),
                 train_base=True, align=AlignCfg(WIDTH, len(LAYERS), 'mid.0', width=16), **{name: SETTINGS[name]})
    torch.manual_seed(0)
    net = Injected(base, {n: MAKERS[n](base, getattr(run, n)) for n in (name, 'align')}, train_base=True).train()
    far = afar(deepcopy(net))
    def learnt(net, w):
        losses = injected_loss(run, w.look)(net, (w.batch, 0))
        sum(v.mean() for v in losses.values()).backward()
        return {k: v.detach() for k, v in losses.items()} | {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    agree(learnt(far, there), learnt(net, here), 1e-3)

def test_a_training_step_of_the_base(here, there):
    base = denoiser().train()
    loss = base_loss(RunCfg('base', model=base.cfg, task=PrefixMixture(most=2)))
    def batch(w): return Batch(w.video, w.cams, w.batch.keys, w.batch.index[:, :T])
    agree(loss(afar(deepcopy(base)), (batch(there), 0)), loss(base, (batch(here), 0)))

def test_a_step_of_muon(there, monkeypatch):
    monkeypatch.setattr(muon, 'half_is_fast', lambda device: True)
    near = [torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))) for shape in ((8, 4), (6, 2, 3, 3))]
    far = [torch.nn.Parameter(Afar(p.detach().clone())) for p in near]
    for params in (near, far):
        for p in params: p.grad = p.detach().clone()
        muon.MuonAdamW([dict(params=params, pieces=[2, 1], lr=.1, momentum=.95, weight_decay=.1)]).step()
    for f, n in zip(far, near): agree(f.detach(), n.detach(), 1e-2)

def test_a_walk_with_a_memory(here, there):
    net, cams = trained(denoiser(), INJECTORS), torch.stack([walk(Room(i))[:16:2] for i in (3, 4)])
    first = torch.stack([render(Room(i), c[:1], 32).rgb for i, c in zip((3, 4), cams)])
    def go(net, w, *given):
        guide = GeometryGuide(net, w.look)
        made = stream(net.base, make_diffusion(DiffusionCfg.world()), *given, 2, steps=2, geometry=guide, guidance=HistoryGuidance.vanilla(1.5))
        return dict(video=torch.cat([new for new, _ in made], 1), **guide.state_dict())
    far, near = go(afar(deepcopy(net)), there, Afar(first), Afar(cams)), go(net, here, first, cams)
    agree(far['video'], near['video'])
    assert far.keys() == near.keys() and len(near) > 1

def test_right_against_wrong_and_where_it_is_heard(here, there):
    net = trained(denoiser(), INJECTORS)
    def asked(net, w):
        r, p = ablate(net, make_diffusion(DiffusionCfg.world()), w.batch, w.observed_frames, w.look, 1), w.probe
        assert len(plot_ablation(r).data)
        return dict(gap=r.gap()[0], share=r.share(), **tap_changes(net.base, net, p.x, p.noise_levels, w.cams, p.geometry))
    agree(asked(afar(deepcopy(net)), there), asked(net, here), 1e-3)

# --- VGGT

def test_teaching_and_judging_vggt(there):
    cams = torch.stack([walk(Room(i))[:9:4] for i in (3, 4)])
    seen = [render(Room(i), c, 112) for i, c in zip((3, 4), cams)]
    views = Views(torch.stack([s.rgb for s in seen]), cams, ['a', 'b'], torch.arange(3).repeat(2, 1), torch.stack([s.depth for s in seen]))
    vggt = new_vggt(VGGTCfg.tiny())
    far = afar(deepcopy(vggt))
    agree(evaluate_vggt(far.eval(), afar(views)), evaluate_vggt(vggt.eval(), views))
    agree(geometry_loss()(far.train(), (afar(views), 0)), geometry_loss()(vggt.train(), (views, 0)), 1e-3)

# --- numbers and pictures

def test_numbers_about_videos(here, there):
    def told(w):
        a, b = w.batch.video, mismatched_scene(w.batch).video
        out = {f.__name__: f(a, b) for f in (metrics.psnr, metrics.ssim, metrics.sharpness)}
        pairs = [(0, 3), (1, 4)]
        return out | dict(metrics.evaluate(a, b, 1, pairs)['scalars'], **metrics.evaluate(a, b, 1, pairs)['curves'],
                          rays=ray_encoding(w.cams, 4, 4), between=interpolate_cams(w.cams, w.observed_frames))
    agree(told(there), told(here))

def test_pictures(here, there):
    base = denoiser().eval()
    def drawn(base, w):
        "Their types; what is a tensor is told as one of the CPU."
        video, grid = w.batch.video[0], w.probe.geometry.latents[0]
        look = LevelExplorer(video[:T], activations(base, make_diffusion(DiffusionCfg.world()), video[:T], w.cams[0]))
        points = cloud(torch.ones_like(video[:, 0]), w.batch.cams[0], video)
        shown = attention_shares(video[0], (.5, .5), video[1:3], torch.rand(2, 4, 4).to(video.device))
        return [show_clip(video), show_pca(grid), show_cams(w.cams[0]), video_tag(video[None]), look.static('mid', 0, 1), len(points), show_clip(shown)]
    assert [type(p) for p in drawn(afar(deepcopy(base)), there)] == [type(p) for p in drawn(base, here)]

# --- the main job

@pytest.fixture
def moved(monkeypatch):
    "All that asks for the device is told of this one, and what trains is there."
    for module in (runs, ablation, study, training): monkeypatch.setattr(module, 'device', lambda: ELSEWHERE)
    monkeypatch.setattr(runs, 'build_trainable', lambda run, make=runs.build_trainable: afar(make(run)))
    for module in (ablation, study): monkeypatch.setattr(module, 'build_trainable', runs.build_trainable)
    monkeypatch.setattr(training, 'Accelerator', type('Accelerator', (training.Accelerator,), dict(device=ELSEWHERE)))
    monkeypatch.setattr(torch.optim, 'AdamW', type('AdamW', (torch.optim.AdamW,), dict(
        __init__=lambda self, *a, fused=None, init=torch.optim.AdamW.__init__, **kw: init(self, *a, **kw))))       # fused ones know their devices by name
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda device: None)
    with Elsewhere(): yield

def test_study_and_comparison(moved, tmp_path):
    run = study.short_control()
    run = run.replace(world=WorldCfg(rooms=2, test_rooms=2, frames=16), batch=2, finite=2, train=run.train.replace(steps=2, warmup=1, precision='no'))
    mini = study.StudyCfg(run, walks=2, skip=2, steps=2)
    record = study.study(mini, tmp_path/'study', tmp_path)
    record['checks'].pop('check_same_output')                    # bits: with gradients this device takes an attention apart into other sums
    assert not any(record['checks'].values()) and len(record['loss']) == 2
    again = study.compare(mini, tmp_path/'study'/run.name, tmp_path, tmp_path, beyond=2)
    assert again['results'].keys() == {'baseline', run.name, 'mismatched'}
    assert ablation.run_ablation(run, tmp_path/'study'/run.name, tmp_path, 2, 1, 2, '').matched.shape == (2,)
