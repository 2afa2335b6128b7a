"""Run-time text that compiles a native loop and runs it on several threads."""

RUNNING = '''
def _native_fetch(typing, array, token, head, place):
    """For numba: ask the memory for ``array[token, head, place]`` ahead of its use, without looking whether it exists.

    The rows of a head lie apart, and the processor does not foresee them: a loop would wait for memory every token.
    """
    from numba.core import cgutils, types

    def generate(context, builder, signature, values):
        view = context.make_array(signature.args[0])(context, builder, values[0])
        steps = map(builder.mul, cgutils.unpack_tuple(builder, view.strides), values[1:])
        pointer = cgutils.pointer_add(builder, view.data, functools.reduce(builder.add, steps), cgutils.voidptr_t)
        arguments = [cgutils.voidptr_t, *[cgutils.int32_t] * 3]
        made = cgutils.ir.FunctionType(cgutils.ir.VoidType(), arguments)
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", arguments[:1], made)
        builder.call(prefetch, [pointer, *(cgutils.int32_t(flag) for flag in (0, 3, 1))])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(array, token, head, place), generate


@functools.cache
def _native(loop):
    """``loop`` compiled by numba at its first call, and kept beside this file for the next process."""
    import numba
    import numba.extending
    from numba.core.compiler import CompilerBase, DefaultPassBuilder

    class DistinctArrays(CompilerBase):
        """The usual compiler, told that no two arrays overlap: without it the inner loops do not vectorise."""

        def define_pipelines(self):
            self.state.flags.noalias = True
            return [DefaultPassBuilder.define_nopython_pipeline(self.state)]

    options = {
        "nogil": True,
        "error_model": "numpy",  # a division by zero is inf or nan, as in PyTorch
        "fastmath": {"contract", "reassoc", "nsz", "arcp"},  # NaN and infinity keep their meaning
        "pipeline_class": DistinctArrays,
    }
    # Numba keeps the name of the function's module with the code and imports it by that name, whatever name the file
    # has in the next process: so the module is one that is always there.
    used = {name: globals()[name] for name in loop.__code__.co_names if name in globals()}
    plain = numba.config.DISABLE_JIT  # NUMBA_DISABLE_JIT=1: the loops run as Python, for a debugger
    used["_native_fetch"] = (lambda *_: None) if plain else numba.extending.intrinsic(_native_fetch)
    loop = types.FunctionType(loop.__code__, {**used, "__name__": "numpy"}, loop.__name__)
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # nowhere to keep the compiled code
        return numba.njit(**options)(loop)


@functools.cache
def _native_crew(process, threads):
    """The queue from which worker threads of this process take jobs (a fork has none of its parent's, hence the key)."""
    jobs = queue.SimpleQueue()

    def serve():
        while True:
            jobs.get()()

    for _ in range(threads):
        threading.Thread(target=serve, name="native", daemon=True).start()
    return jobs


@functools.cache
def _native_pool():
    """``GOMP_parallel`` of the OpenMP under PyTorch, or None where it is absent or must not be called.

    After a parallel operation of PyTorch the threads of this pool spin for milliseconds, on the cores that threads of
    our own would need: so they get our work. A forked process has the pool without its threads, and would wait for
    them for ever; Linux tells by the flag 0x40, and a system that tells nothing at all is not trusted.
    """
    try:
        with open("/proc/self/stat") as stat:
            flags = int(stat.read().rpartition(")")[2].split()[6])
        pool = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    if not flags or flags & 0x40:
        return None
    pool.argtypes, pool.restype = (_NativeShare, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return pool


_NativeShare = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_native_pool.cache_clear)


def _native_team(pool, threads, work):
    """``work()`` in this thread and the others of ``pool``; what it raises in any of them is raised here."""
    caller = threading.get_ident()
    errors = {caller: KeyboardInterrupt()}  # stays if Ctrl-C comes before the lines that would see it

    def share(_):
        try:
            work()
            errors[threading.get_ident()] = None
        except BaseException as error:
            errors[threading.get_ident()] = error

    pool(_NativeShare(share), None, threads, 0)
    for error in errors.values():
        if error is not None:
            raise error


def _native_scratch(shapes, dtype):
    """Zeroed arrays, each from a multiple of 64 bytes on as PyTorch's are: vectors across two lines of memory are slow."""
    counts = [math.prod(shape) for shape in shapes]
    starts = list(itertools.accumulate((-(-count // 16) * 16 for count in counts), initial=0))
    room = numpy.zeros(starts[-1] + 16, dtype)
    room = room[-room.ctypes.data % 64 // room.itemsize :]
    return [room[a : a + count].reshape(shape) for a, count, shape in zip(starts, counts, shapes)]


def _native_run(loop, shapes, tasks, heads, every, sizes, scale, offsets, tensors, grain):
    """Run ``loop`` over all tasks, on as many threads as PyTorch may use; every task writes its own rows only.

    Those of PyTorch's pool if the call needs them all, since a pool that is resized starts its threads again; else
    plain threads. Never numba's own: calls from several threads at once, or after a fork, end its process. A thread
    must have at least ``grain`` state elements times tokens to update, or waking it costs more than it saves.
    """
    loop = _native(loop)
    arrays = [t.detach().numpy() for t in tensors]
    updates = arrays[0].shape[0] * heads * sizes[0] * sizes[1]
    threads = max(1, min(torch.get_num_threads(), tasks, 1 + updates // (2 * grain)))
    shares = threads if threads == 1 else min(tasks, 4 * threads)
    turn = itertools.count()  # whoever is free takes the next share

    def work():
        scratch = _native_scratch(shapes(*sizes, every), arrays[0].dtype)
        while (i := next(turn)) < shares:
            first, last = tasks * i // shares, tasks * (i + 1) // shares
            loop(first, last, heads, every, *sizes, scale, offsets, *arrays, *scratch)

    if threads == 1:
        return work()
    if threads == torch.get_num_threads() and (pool := _native_pool()):
        return _native_team(pool, threads, work)
    helpers = [_NativeHelper(work) for _ in range(threads - 1)]
    for helper in helpers:
        _native_crew(os.getpid(), threads - 1).put(helper)
    work()
    for helper in helpers:
        helper.join()


class _NativeHelper:
    """``work`` as a job for another thread; a lighter future, since a short call takes little longer than one."""

    def __init__(self, work):
        self.work, self.error = work, None
        self.claim, self.running = threading.Lock(), threading.Lock()
        self.running.acquire()

    def __call__(self):
        if self.claim.acquire(blocking=False):
            try:
                self.work()
            except BaseException as error:
                self.error = error
            finally:
                self.running.release()

    def join(self):
        """Wait for the end of the work, unless it has not even started: then all is done already."""
        if not self.claim.acquire(blocking=False):
            self.running.acquire()
            if self.error is not None:
                raise self.error
'''
