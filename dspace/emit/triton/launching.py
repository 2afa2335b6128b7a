"""Source that every Triton section has once: launches, choice of configurations, chunk tables, sizes of tiles."""

from __future__ import annotations

import re

from dspace.emit.triton.repeating import REPEAT

IMPORTS = (
    "import copy",
    "import functools",
    "import operator",
    "import threading",
    "import torch",
    "from torch.utils._python_dispatch import TorchDispatchMode",
)

_KERNEL = '''
try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton here: the forms for the CPU work without it
    triton = tl = None


def _kernel(function=None, **options):
    """triton.jit, or nothing where there is no Triton."""
    if function is None:
        return lambda f: _kernel(f, **options)
    return function if triton is None else triton.jit(function, **options)
'''

_LAUNCH = '''
_COMPILED = {}  # kernels as Triton compiled them, and their constants in order, by all that they were compiled for


def _launch(kernel, grid, pointers, numbers, fixed, **constants):
    """``kernel[grid](*pointers, *numbers, *fixed, **constants)``.

    Triton finds out at each call what a kernel is compiled for, which takes longer than a small one runs. Here that is
    the key: types and alignment of ``pointers`` (tensors or None), ``fixed``, and constants. Kernels are not specialised
    on the values of ``numbers``. A compiled kernel gets addresses: of a tensor, Triton would ask the driver each time.
    """
    addresses = [None if p is None else p.data_ptr() for p in pointers]
    kinds = [None if p is None else p.dtype if a % 16 == 0 else (p.dtype,) for p, a in zip(pointers, addresses)]
    device = next(p.device for p in pointers if p is not None)
    key = (kernel.fn, device, fixed, max(numbers) >= 2**31, *kinds, *constants.values())
    found, tape = _COMPILED.get(key), getattr(_recording, "tape", None)
    if found is not None:
        rest = (*numbers, *fixed, *found[1])
        found[0][grid](*addresses, *rest)
        if tape is not None:
            tape.launched(found[0], grid, pointers, rest)
        return
    if tape is not None:  # not under the interpreter, and not where Triton has to be asked
        tape.valid = False
    compiled = kernel[grid](*pointers, *numbers, *fixed, **constants)
    # not under the interpreter, and not on AMD GPUs, where Triton looks at the sizes of tensors too
    if hasattr(compiled, "run") and torch.version.hip is None:
        _COMPILED[key] = compiled, [constants[name] for name in kernel.arg_names if name in constants]


_TUNED = {}  # what was measured to be the best on this GPU: "family sizes..." -> configuration, set from outside
_PROPOSALS = {}  # what there was to choose from, by key
_CONFIGS = _Choices()  # what is in use, by key


def _chosen(propose, *key):
    """The configuration for ``key``: the tuned one if it is among the proposals, else the first of them.

    The key holds what a kernel is compiled for, so never T: nothing is tuned, or compiled, again for another length.
    """
    config = _CONFIGS.get(key)
    if config is None:
        proposals = _PROPOSALS[key] = propose(*key[1:])
        tuned = _TUNED.get(" ".join(map(str, key)))
        config = _CONFIGS[key] = tuned if tuned in proposals else proposals[0]
    return config
'''

COMMON = "\n\n\n".join(part.strip() for part in (_KERNEL, REPEAT, _LAUNCH)) + "\n"


def common_type(names: list[str]) -> str:
    """The dtype that holds all that tensors of these names do, in source."""
    dtypes = [f"{name}.dtype" for name in names]
    return dtypes[0] if len(dtypes) == 1 else f"_common({', '.join(dtypes)})"


def words(lines: list[str]) -> set[str]:
    """All names, and parts of numbers, in these lines."""
    return set(re.findall(r"\w+", "\n".join(lines)))


def sizes(tensors: list[str], like: str, lines: list[str]) -> list[str]:
    """Lines that read the sizes of a core's tensors, those that ``lines`` use."""
    used = words(lines)
    lines = [f"    size_k, size_v = _sizes({', '.join(tensors)})"] if {"size_k", "size_v"} & used else []
    return lines + ([f"    batch, steps, heads = {like}.shape[:3]"] if {"batch", "steps", "heads"} & used else [])


EXACT = """
_EXACT = "ieee" if torch.version.hip else "tf32x3"  # how float32 is multiplied: AMD GPUs do not split it so
"""

TABLES = (
    '''
def _plan(T, offsets, N, C):
    """Chunk table of a packed batch, made on the device without waiting for it; (spans, bases, NT, chunks)."""
    if offsets is None:
        NT = -(-T // C)
        return None, None, NT, N * NT
    counts = (offsets[1:] - offsets[:-1] + C - 1) // C
    ends = counts.cumsum(0)
    bases = ends - counts
    chunks = T // C + N
    index = torch.arange(chunks, device=offsets.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=N - 1)
    begin = offsets[sequence] + (index - bases[sequence]) * C
    end = torch.minimum(begin + C, offsets[sequence + 1])
    spans = torch.stack((begin, end), 1) * (index < ends[-1])[:, None]
    return spans.contiguous(), bases, 0, chunks


def _typed(tensor, dtype):
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # to asks more, and takes longer to do nothing


def _common(dtype, *others):
    """The type that holds what all of these do."""
    for other in others:
        dtype = dtype if other == dtype else torch.promote_types(dtype, other)
    return dtype


'''
    + EXACT.lstrip()
    + '''

def _operands(dtype):
    """Operand type of the matmuls and how float32 ones are multiplied: half keeps its range by going through tf32."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "tf32" if dtype == torch.float16 else _EXACT


_KEPT = 2**25  # bytes: so much is kept for the backward pass, where launches cost more than memory


def _cdiv(size, tile):
    return -(-size // tile)  # Triton's own costs microseconds on the host


def _tile(size, most):
    return max(16, min(1 << (size - 1).bit_length(), most))
'''
)

MULTIPROCESSORS = """
@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128
"""
"""What decides by how many programs a GPU holds."""

FAST = '''
def _fast(tensor):
    """Whether kernels on this device may use instructions of NVIDIA GPUs."""
    return tensor.is_cuda and torch.version.hip is None


@_kernel
def _reciprocal(x, FAST: tl.constexpr):
    """1 / x; FAST takes the reciprocal of the special function unit (relative error 1e-7, denormals are zero)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x
'''
"""What kernels with approximate reciprocals need."""
