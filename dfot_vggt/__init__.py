"""3-D geometry (VGGT) for camera-controlled video diffusion (DFoT). What this package offers by name is loaded when it is first used."""
__version__ = "0.5.0"

from importlib import import_module as _import_module

_PUBLIC = {                                                # module: names that it offers here; semver speaks of these
    'core': 'Cfg build',
    'trace': 'Trace trace_diff',
    'data.camera': 'Cams',
    'data.clips': 'Batch Clips',
    'denoiser.uvit': 'UViT3DPose UViTCfg',
    'denoiser.diffusion': 'DiffusionCfg make_diffusion',
    'denoiser.guidance': 'HistoryGuidance',
    'denoiser.rollout': 'next_frames rollout',
    'denoiser.pose_cache': 'CachedUViT3DPose cached',
    'denoiser.checkpoints': 'load_dfot',
    'geometry.vggt': 'VGGT VGGTCfg load_vggt',
    'geometry.features': 'Geometry features',
    'inject.injector': 'GeometryGuide Injected Injector',
    'inject.controlnet': 'ControlCfg ControlNet',
    'inject.tokens': 'TokenCfg TokenInjector',
    'inject.points': 'SpatialMemory',
    'inject.memory': 'MemoryCfg MemoryNet',
    'learn.train': 'TrainCfg train',
    'learn.config': 'RunCfg',
    'learn': 'recipes'}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = [*_WHERE]

def __getattr__(name):
    if name not in _WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = _import_module(f'{__name__}.{_WHERE[name]}')
    value = _import_module(f'{module.__name__}.{name}') if _WHERE[name] == 'learn' else getattr(module, name)
    globals()[name] = value
    return value

def __dir__(): return sorted({*globals(), *_WHERE})
