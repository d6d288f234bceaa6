"""A second device without a second device. Tensors hold real numbers, say that they live elsewhere, and refuse to meet one that lives on
the CPU, by CUDA's rules; what runs here has no tensor that was left behind. ('meta' is the name of the device: every build of torch knows it.)"""
from dataclasses import fields, is_dataclass, replace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
ELSEWHERE = torch.device('meta')
CROSSES = {aten._to_copy.default, aten.copy_.default}                                          # read on one device, write on another
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

class Afar(torch.Tensor):
    "Holds a tensor of the CPU."
    __torch_function__, is_meta = torch._C._disabled_torch_function_impl, False
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device=ELSEWHERE)
    def __init__(self, held): self.held = held
    def __repr__(self): return f'Afar({self.held})'
    def tolist(self): return self.held.tolist()                                                # allowed: it waits for the device
    def numpy(self, *a, **kw): raise TypeError("can't convert a tensor from elsewhere to numpy: use .cpu() first")
    __array__ = numpy
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

def _near(x): return isinstance(x, torch.Tensor) and not isinstance(x, Afar)

def _held(x):
    if isinstance(x, torch.device) and x == ELSEWHERE: return torch.device('cpu')
    return x.held if isinstance(x, Afar) else x

def _run(func, args, kwargs):
    flat, spec = tree_flatten((args, kwargs))
    far, asked = any(isinstance(x, Afar) for x in flat), kwargs.get('device')
    may = [*args[1]] if func in INDEXED else []                                                # an index may come from the CPU
    stray = [x for x in flat if _near(x) and x.ndim and not any(x is i for i in may)]
    if far and stray and func not in CROSSES:
        raise RuntimeError(f'{func}: a tensor of the CPU ({tuple(stray[0].shape)}, {stray[0].dtype}) meets one from elsewhere')
    same = {id(_held(x)): x for x in flat if isinstance(x, torch.Tensor)}                      # in place: the very object comes back
    args, kwargs = tree_unflatten([_held(x) for x in flat], spec)
    there = torch.device(asked) == ELSEWHERE if asked is not None else far
    def wrap(x): return Afar(x.resolve_conj()) if there and isinstance(x, torch.Tensor) else x    # a shell has no conjugate bit
    return tree_map(lambda x: same[id(x)] if id(x) in same else wrap(x), func(*args, **kwargs))

class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

class Elsewhere(TorchFunctionMode):
    "Where such tensors can be made and met."
    def __enter__(self):
        self.ops = _Ops()
        self.ops.__enter__()
        return super().__enter__()
    def __exit__(self, *e):
        super().__exit__(*e)
        self.ops.__exit__(*e)
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):                       # numbers become tensors out of our sight
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor([*i]) if isinstance(i, list | tuple | range) else i for i in at), *args[2:]
        if func is torch.Tensor.new_tensor: func, args, kwargs = torch.tensor, args[1:], dict(device=args[0].device, dtype=args[0].dtype) | kwargs
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get('device') or 'cpu') == ELSEWHERE:
            return func(*args, **kwargs | dict(device='cpu')).to(ELSEWHERE)
        return func(*args, **kwargs)

def afar(x):
    "A tensor, a module, or a dataclass of tensors, elsewhere."
    if isinstance(x, torch.Tensor): return Afar(x)
    if is_dataclass(x): return replace(x, **{f.name: afar(v) for f in fields(x) if isinstance(v := getattr(x, f.name), torch.Tensor)})
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try: return x._apply(lambda t: t if isinstance(t, Afar) else Afar(t))
    finally: torch.__future__.set_overwrite_module_params_on_conversion(False)
