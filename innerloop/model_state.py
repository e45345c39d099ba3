"""A model called with other tensors in the place of its own, and what such a call leaves behind.

Buffers, changed in place or reassigned, are state: they go from step to step. Attributes are left as PyTorch would
leave them (a feature kept to be looked at, a weight that a hook computes); that no answer depends on them is found out
once, see ``rehearsal``.
"""

from __future__ import annotations

import copy
import operator
import os
import random
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Tensors = Mapping[str, Tensor]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)


class ModelChangedError(RuntimeError):
    """The model's parameters or buffers are no longer those that a learner was made with."""


class _Slot(NamedTuple):
    """Where a module keeps a tensor; ``name`` is its first name in the model, where it has several."""

    module: nn.Module
    kind: str
    key: str
    name: str
    where: str


class _Seen(NamedTuple):
    """What a learner knows of a tensor of its model."""

    tensor: Tensor
    requires_grad: bool
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    version: int
    value: int
    """Of a counter; 0 of others."""


class _Absent:
    """In the place of an attribute that is not there."""


class ModelState:
    """The places of a model's tensors.

    Args:
        model: whose parameters and buffers stay the same objects from now on; ``check`` says so.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slots = list(_slots(model))
        self._seen = {slot.where: _seen(_tensor(slot)) for slot in self._slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's tensors count their changes anew."""
        self.__dict__.update(state)
        self._seen = {where: _seen(seen.tensor) for where, seen in self._seen.items()}

    def check(self, copied: frozenset[str] = frozenset(), counters: frozenset[str] = frozenset()) -> None:
        """Find the model to be the one that it was.

        Changes in place are the outer optimiser's, or ``load_state_dict``'s, and are fine; not so of the tensors named
        in ``copied``, of which somebody made a copy. ``counters`` count calls in training; of statistics beside one
        there are copies too, which calls may leave behind, and a loaded state may not.

        Raises:
            ModelChangedError: it is not.
        """
        slots = {slot.where: slot for slot in _slots(self._model)}
        changed = [f"{where} is new" for where in slots if where not in self._seen]
        for slot in self._slots:
            seen, now = self._seen[slot.where], slots.get(slot.where)
            if now is None:
                changed.append(f"{slot.where} is no longer there")
                continue
            tensor = _tensor(now)
            if now.module is not slot.module:
                changed.append(f"{slot.where} is in another layer ({type(now.module).__name__})")
                continue
            if tensor is not seen.tensor and slot.kind == "_buffers" and _alike(tensor, seen.tensor):
                # A forward of the user's own call reassigned it: its value is the buffer's, its place is not.
                with torch.no_grad():
                    seen.tensor.copy_(tensor)
                now.module._buffers[now.key] = seen.tensor
                continue
            changed += _changes(slot, seen, tensor, slot.name in copied)
            if slot.name in counters and _loaded(seen, tensor):
                changed.append(f"{slot.where} was loaded, and the learner keeps statistics for every inner step")
        if changed:
            more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise ModelChangedError(
                f"{type(self._model).__name__} is no longer the model that this MetaLearner was made with: "
                f"{', '.join(changed[:5])}{more}. Make a new MetaLearner of it, and a new outer optimiser"
            )

    @contextmanager
    def exchanged(self, parameters: Tensors, buffers: MutableMapping[str, Tensor]) -> Iterator[None]:
        """Within it, the model has these tensors in the place of its own.

        ``buffers`` are changed in place, or hold afterwards what a forward put in their place.

        Raises:
            ValueError: the call left a buffer of another shape, or a new one.
        """
        own: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        attributes = Attributes(self._model)
        registered = [(module._buffers, dict(module._buffers)) for module in self._model.modules()]
        try:
            for slot in self._slots:
                tensor = parameters.get(slot.name) if slot.kind == "_parameters" else buffers.get(slot.name)
                if tensor is not None:
                    place = getattr(slot.module, slot.kind)
                    own.append((place, slot.key, place[slot.key]))
                    place[slot.key] = tensor
            yield
            self._read_back(buffers, registered)
        except BaseException:
            attributes.put_back()
            raise
        else:
            # Of a transform's call nothing may stay behind: its tensors mean nothing outside.
            if torch._C._are_functorch_transforms_active():
                attributes.put_back()
        finally:
            for place, before in registered:
                for key in place.keys() - before.keys():
                    del place[key]
                place.update(before)
            for place, key, tensor in reversed(own):
                place[key] = tensor

    def _read_back(
        self,
        buffers: MutableMapping[str, Tensor],
        registered: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]],
    ) -> None:
        """Take over what was put in the place of the buffers."""
        names = {id(module._buffers): name for name, module in self._model.named_modules()}
        for place, before in registered:
            for key, tensor in place.items():
                if tensor is not None and before.get(key) is None:
                    where = f"{names[id(place)]}.{key}".lstrip(".")
                    raise ValueError(
                        f"{type(self._model).__name__}.forward makes the buffer {where}, which is state from the next "
                        f"call on; register it in __init__, with its shape, before the MetaLearner is made"
                    )
        for slot in self._slots:
            if slot.kind != "_buffers" or slot.name not in buffers:
                continue
            given, now = buffers[slot.name], slot.module._buffers.get(slot.key)
            if now is given:
                continue
            if now is None or now.shape != given.shape or now.dtype != given.dtype or now.device != given.device:
                found = "None" if now is None else f"{now.dtype} of shape {list(now.shape)} on {now.device}"
                raise ValueError(
                    f"{type(self._model).__name__}.forward put {found} in the place of the buffer {slot.where}, "
                    f"{given.dtype} of shape {list(given.shape)} on {given.device}. A buffer goes from step to step, "
                    "and is averaged over tasks: it keeps its shape, type and device"
                )
            buffers[slot.name] = now


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model whose forward leaves a computed tensor on it (``weight_norm``, ``spectral_norm``).

    Raises:
        TypeError: something on the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        kept = [value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
        for value in pytree.tree_leaves(kept):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        for where, module in model.named_modules():
            for name, value in vars(module).items():
                if name not in _OF_EVERY_MODULE and not _can_be_copied(value, dict(memo)):
                    raise TypeError(
                        f"an adapted model is a copy, and {f'{where}.{name}'.lstrip('.')} ({type(value).__name__}) "
                        f"cannot be copied: {error}. Keep it outside the model, or give its class __deepcopy__"
                    ) from error
        raise


def functions_kept(model: nn.Module) -> list[str]:
    """Names of attributes that are functions, and of layers with hooks."""
    found = []
    for where, module in model.named_modules():
        found += [
            f"{where}.{n}".lstrip(".") for n, v in vars(module).items() if callable(v) and n not in _OF_EVERY_MODULE
        ]
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(f"a hook on {where or 'the model'}")
    return found


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, memo)
    except Exception:
        return False
    return True


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LOCKS.clear)  # a thread that held one is not in the child


@contextmanager
def locked(model: nn.Module) -> Iterator[None]:
    """Wait for other threads that call the model, or another one that shares modules with it."""
    with _LOCKS_LOCK:
        locks = [_LOCKS.setdefault(module, threading.RLock()) for module in model.modules()]
    with ExitStack() as stack:
        for lock in sorted(locks, key=id):  # in one order, so that two never wait for each other
            stack.enter_context(lock)
        yield


def random_state(device: torch.device) -> list[Tensor]:
    """State of PyTorch's generators that a model on ``device`` draws from."""
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Go back to a state that ``random_state`` gave."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


class Randomness(NamedTuple):
    """State of every generator that a forward is likely to draw from: PyTorch's, Python's and NumPy's."""

    of_torch: list[Tensor]
    of_python: Any
    of_numpy: Any

    @staticmethod
    def now(device: torch.device) -> Randomness:
        """As it is."""
        numpy = sys.modules.get("numpy")  # who does not use it does not draw from it
        return Randomness(random_state(device), random.getstate(), numpy and numpy.random.get_state())

    def same(self, other: Randomness) -> bool:
        """Whether nothing was drawn between the two."""
        alike = all(map(torch.equal, self.of_torch, other.of_torch)) and self.of_python == other.of_python
        return alike and (
            self.of_numpy is None
            or all(
                bool((a == b).all() if hasattr(a, "shape") else a == b)
                for a, b in zip(self.of_numpy, other.of_numpy, strict=True)
            )
        )

    def restore(self, device: torch.device) -> None:
        """Go back to it."""
        set_random_state(self.of_torch, device)
        random.setstate(self.of_python)
        if self.of_numpy is not None:
            sys.modules["numpy"].random.set_state(self.of_numpy)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every place of a parameter or buffer of the model."""
    first: dict[int, str] = {}
    for where, module in model.named_modules():
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                if tensor is not None:
                    name = f"{where}.{key}" if where else key
                    yield _Slot(module, kind, key, first.setdefault(id(tensor), name), name)


def _tensor(slot: _Slot) -> Tensor:
    tensor: Tensor = getattr(slot.module, slot.kind)[slot.key]
    return tensor


def _seen(tensor: Tensor) -> _Seen:
    return _Seen(
        tensor, tensor.requires_grad, tensor.shape, tensor.dtype, tensor.device, _version(tensor), _count(tensor)
    )


def _count(tensor: Tensor) -> int:
    return int(tensor) if tensor.ndim == 0 and tensor.dtype == torch.long and tensor.device.type != "meta" else 0


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _loaded(seen: _Seen, counter: Tensor) -> bool:
    """Whether a counter of calls was set, and not counted up: each call adds 1 in one change."""
    changes = _version(counter) - seen.version
    return changes > 0 and _count(counter) - seen.value != changes


def _changes(slot: _Slot, seen: _Seen, tensor: Tensor, copied: bool) -> list[str]:
    """What is not as it was of one tensor, in words."""
    where = slot.where
    for what, now, before in (
        ("shape", list(tensor.shape), list(seen.shape)),
        ("type", tensor.dtype, seen.dtype),
        ("device", tensor.device, seen.device),
        ("requires_grad", tensor.requires_grad, seen.requires_grad),
    ):
        if now != before:
            return [f"{where} has {what} {now}, and had {before}"]
    if tensor is not seen.tensor:
        return [f"{where} is another tensor"]
    if copied and _version(tensor) != seen.version:
        return [f"{where}, of which the learner keeps a copy for every inner step, has another value"]
    return []


class Attributes:
    """What a model's modules have besides parameters and buffers, as it is now; containers with their items."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]

    def changed(self) -> Iterator[tuple[nn.Module, str, Any, Any]]:
        """Module and name of every attribute that is another than before, its value before and its content."""
        for module, before, contents in self._kept:
            now = vars(module)
            if not contents and len(now) == len(before) and all(map(operator.is_, now.values(), before.values())):
                continue
            for name in before.keys() | now.keys():
                old, new = before.get(name, _Absent), now.get(name, _Absent)
                alike = (old is new and _same(contents.get(name), new)) or _equal(old, new)
                if name not in _OF_EVERY_MODULE and not alike:
                    yield module, name, old, contents.get(name)

    def names(self) -> list[str]:
        """Of those that are another than before."""
        modules = {module: name for name, module in self._model.named_modules()}
        return sorted(f"{modules[module]}.{name}".lstrip(".") for module, name, _, _ in self.changed())

    def put_back(self) -> None:
        """As before, as far as it can be: what is inside somebody's own objects stays."""
        for module, name, value, content in list(self.changed()):
            if isinstance(value, _CONTAINERS) and content is not None and not _same(content, value):
                value.clear()
                value.update(content) if isinstance(value, dict | set) else value.extend(content)
            if value is _Absent:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


def _contents(module: nn.Module) -> dict[str, Any]:
    """What the containers and tensors among a module's attributes hold now."""
    if type(module).__module__.startswith("torch."):
        return {}
    contents = {n: _content(v) for n, v in vars(module).items() if n not in _OF_EVERY_MODULE}
    return {n: content for n, content in contents.items() if content is not None}


def _content(value: Any) -> Any:
    """What shows that a value has been changed in place: a container's items, a tensor's version."""
    if isinstance(value, _CONTAINERS):
        return list(value.items()) if isinstance(value, dict) else list(value)
    return _version(value) if isinstance(value, Tensor) else None


def _same(content: Any, value: Any) -> bool:
    if content is None:
        return True
    now = _content(value)
    if isinstance(content, int):
        return bool(content == now)
    return len(content) == len(now) and all(_items_same(a, b) for a, b in zip(content, now, strict=True))


def _items_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is tuple and type(b) is tuple and len(a) == len(b) and all(map(operator.is_, a, b)))


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | float | str | torch.Size | type(None)) and bool(a == b)
