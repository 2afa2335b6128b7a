"""Source of what shortens the host's part of a call: the second of a kind is recorded, those after it are repeated.

Python takes longer to launch the kernels of a small problem than the GPU takes to run them, and most of that time goes
into finding out again what the sizes of tensors decided at the call before: windows, tiles, grids, what is compiled.
"""

from __future__ import annotations

REPEAT = '''
_TAPES = {}  # what calls of a kind do, by function and kind: see _repeated
_TAPE_MEMORY = 2**28  # bytes that a repeated call makes at most; with more, its kernels take longer than the host
_recording = threading.local()  # .tape: that of the call which this thread records, if any


class _Choices(dict):
    """Configurations in use. A change makes forget the calls that were recorded before."""

    def __setitem__(self, key, config):
        _TAPES.clear()
        super().__setitem__(key, config)

    def clear(self):
        _TAPES.clear()
        super().clear()


class _Tape(TorchDispatchMode):
    """While entered, writes down new tensors, operations of PyTorch, and what ``_launch`` launches."""

    def __init__(self, given, times):
        super().__init__()
        self.times = times
        self.given, self.device, self.made, self.steps, self.valid = given, given[0].device, [], [], True
        self.owners, self.alive = {}, []  # whose memory a view is in; all tensors, so that no two get the same id

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        self.alive += [*arguments, *results]
        by_value = torch.Tag.dynamic_output_shape in operation.tags or operation._schema.is_mutable
        elsewhere = not all([isinstance(t, torch.Tensor) and t.device == self.device for t in results])
        if by_value or elsewhere or _tensors(list((options or {}).values())):
            self.valid = False
        elif operation.is_view:
            self.owners.update({id(t): self.owners.get(id(arguments[0]), arguments[0]) for t in results})
        elif "empty" in operation.name() and results[0].is_contiguous():
            self.made += results
        else:
            self.steps.append((operation, arguments, options or {}, results))
        return result

    def launched(self, compiled, grid, pointers, rest):
        self.steps.append((_shortest(compiled, grid, len(pointers), rest), pointers))

    def written(self, returned):
        """What ``_repeat`` does: (new tensors, addresses within tensors, steps, what is returned); None if impossible.

        A place is the number of a tensor among those given, made, and results of operations, the bytes from there,
        and for a view its size and strides. What only kernels see shares the memory of one tensor.
        """
        operations = [step for step in self.steps if len(step) > 2]
        seen = [*_tensors(returned), *[t for step in operations for t in _tensors(step[1])]]
        seen = {id(self.owners.get(id(t), t)) for t in seen}
        shown = [t for t in self.made if id(t) in seen]
        shapes, places, hidden = [(tuple(t.shape), t.dtype) for t in shown], {}, 0
        for t in self.made:
            if id(t) not in seen:
                places[id(t)] = len(self.given) + len(shown), hidden
                hidden += (t.numel() * t.element_size() // 256 + 1) * 256  # an address of its own, if it is empty too
        shapes += [((hidden,), torch.uint8)] if hidden else []
        later = [None] if hidden else []  # the place of that one tensor
        numbered = [*self.given, *shown, *later, *[t for step in operations for t in step[3]]]
        places.update({id(t): (i, 0) for i, t in enumerate(numbered)})
        bytes_made = sum([t.numel() * t.element_size() for t in self.made])
        if not self.valid or bytes_made > self.times * _TAPE_MEMORY or len(operations) == len(self.steps):
            return None
        try:
            steps = [(step[0], self._placed(step[1], places), *step[2:3]) for step in self.steps]
            return self._addressed(shapes, steps, self._placed(returned, places))
        except KeyError:  # a tensor of which the tape does not know where it comes from
            return None

    def _addressed(self, shapes, steps, returned):
        """Launches with what takes their addresses out of a list: None, those within tensors, those of all tensors."""
        pointers = [p for step in steps if len(step) == 2 for p in step[1] if p is not None]
        within = sorted({p[:2] for p in pointers if p[1]})
        if any([number >= len(self.given) + len(shapes) for number, _ in within]):
            raise KeyError("within the result of an operation")
        entries = {pair: 1 + i for i, pair in enumerate(within)}

        def getter(pointers):
            at = [0 if p is None else entries[p[:2]] if p[1] else 1 + len(within) + p[0] for p in pointers]
            # of one entry it would give the entry, not a tuple
            return operator.itemgetter(*at) if len(at) > 1 else operator.itemgetter(slice(at[0], at[0] + 1))

        return shapes, within, [(s[0], getter(s[1])) if len(s) == 2 else s for s in steps], returned

    def _placed(self, x, places):
        """``x`` with the place of each tensor instead."""
        if isinstance(x, (tuple, list)):
            return [self._placed(y, places) for y in x]
        if not isinstance(x, torch.Tensor):
            return x
        owner = self.owners.get(id(x), x)
        (number, begin), shape = places[id(owner)], (x.size(), x.stride())
        begin += x.data_ptr() - owner.data_ptr()
        if x.data_ptr() == owner.data_ptr() and shape == (owner.size(), owner.stride()):
            shape = None, None
        elif x.dtype != owner.dtype:
            raise KeyError(x.dtype)
        return _Place((number, begin, *shape))


def _tensors(x):
    """All tensors in lists of lists."""
    if isinstance(x, (tuple, list)):
        return [t for y in x for t in _tensors(y)]
    return [x] if isinstance(x, torch.Tensor) else []


class _Place(tuple):
    """Which tensor of a call: see ``_Tape.written``."""


def _repeated(function, times=1):
    """``function``, of which calls of the same kind, from the third on, are a list of steps.

    It takes tensors, None, and what decides with their shapes, dtypes and alignment all that it does on the host:
    values of tensors do not. What it does is make tensors, launch kernels by ``_launch``, call PyTorch; a call in
    which anything else was seen is not repeated.

    ``times`` as much memory as others may make is allowed to a function that holds what it makes until it ends, as
    a list of steps does.
    """

    @functools.wraps(function)
    def call(*arguments):
        if getattr(_recording, "tape", None) is not None or _hooked():  # part of a call that is being recorded
            return function(*arguments)
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        kinds = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
        addresses = [t.data_ptr() for t in given]
        same = () if len(set(addresses)) == len(addresses) else map(addresses.index, addresses)  # a tensor given twice
        key = (function, given[0].device, *kinds, *[a % 16 for a in addresses], *same)
        tape = _TAPES.get(key, 0)
        if isinstance(tape, tuple):
            return _repeat(tape, given, addresses)
        if tape is None:
            return function(*arguments)
        if tape == 0:  # seen for the first time: lengths that never come again are not worth recording
            result = function(*arguments)
            if len(_TAPES) >= 256:
                _TAPES.clear()
            _TAPES[key] = 1
            return result
        _recording.tape = tape = _Tape(given, times)
        try:
            with tape:
                result = function(*arguments)
        finally:
            _recording.tape = None
        _TAPES[key] = tape.written(result)
        return result

    return call


def _repeat(tape, tensors, addresses):
    """The steps of a recorded call with other tensors of the same kind."""
    made, within, steps, returned = tape
    device = tensors[0].device
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in made]
    tensors += made
    addresses += [t.data_ptr() for t in made]
    addresses = [None, *[addresses[i] + begin for i, begin in within], *addresses]
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    for call, which, *options in steps:
        if not options:
            call(stream, which(addresses))
        else:
            results = call(*_at(which, tensors), **options[0])
            results = results if isinstance(results, (tuple, list)) else [results]
            tensors += results
            addresses += [t.data_ptr() for t in results]
    return tuple(_at(returned, tensors))


def _shortest(compiled, grid, count, rest):
    """``compiled[grid](*addresses, *rest)``, as a function of stream and addresses, without Triton's Python between.

    That is for the hooks of profilers and takes longer than the driver. What is called behind it is found by going
    through it once, with marks for stream and addresses and a launcher that only looks.
    """
    marks, calls = [object() for _ in range(count + 1)], []
    stream, addresses = marks[0], marks[1:]
    launcher = copy.copy(compiled.run)
    direct = getattr(launcher, "launch", None)
    own = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")  # with these a launch is not as the one before
    if direct is not None and not any([getattr(launcher, name, False) for name in own]):
        launcher.launch, copied = lambda *given: calls.append(given), copy.copy(compiled)
        try:
            copied._run, copied.launch_metadata = launcher, lambda *_: None
            copied[grid](*addresses, *rest, stream=stream)
        finally:
            copied.module = None  # which is the original's to unload
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    given = [None if any([x is hook for hook in hooks]) else x for call in calls for x in call]
    packed = bool(given) and isinstance(given[-1], tuple)  # newer Triton: what a kernel is given is one tuple
    last = list(given.pop()) if packed else given
    if len(calls) != 1 or not all([sum([x is mark for x in given + packed * last]) == 1 for mark in marks]):
        runner = compiled[grid]
        return lambda stream, addresses: runner(*addresses, *rest, stream=stream)
    first, at = last.index(marks[1]), given.index(stream)
    head, middle, tail = given[:at], given[at + 1 : None if packed else first], last[first + count :]
    if packed:
        return lambda stream, addresses: direct(*head, stream, *middle, (*addresses, *tail))
    return lambda stream, addresses: direct(*head, stream, *middle, *addresses, *tail)


def _hooked():
    """Whether a profiler wants to see every launch."""
    hooks = triton.knobs.runtime
    return any([getattr(h, "calls", h) for h in (hooks.launch_enter_hook, hooks.launch_exit_hook)])


def _at(place, tensors):
    """What is at a place, or at each of a list."""
    if isinstance(place, list):
        return [_at(x, tensors) for x in place]
    if not isinstance(place, _Place):
        return place
    number, begin, size, stride = place
    owner = tensors[number]
    if size is None:
        return owner
    return owner.as_strided(size, stride, owner.storage_offset() + begin // owner.element_size())

'''
