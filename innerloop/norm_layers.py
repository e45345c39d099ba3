"""The model's normalisation layers: which they are, and whose statistics they normalise with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Normalisation = Literal["batch", "running", "support"]
"""Statistics that normalise the query set: its own batch's (transductive), or, for answers that do not depend on what
else is asked (inductive), the running ones of training or those of the support set at the same fast weights.

A layer that the user froze, by ``layer.eval()`` in a model that trains, keeps its own statistics whatever is chosen."""

NORM_LAYERS: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Batch and instance normalisation of any dimension, layer, group and RMS normalisation, and their subclasses."""


def norm_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every normalisation layer: those of ``NORM_LAYERS``, and others with running statistics."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, NORM_LAYERS) or _keeps_statistics(m))


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a module of the user's own is a batch norm: its running statistics have the usual names."""
    return {"running_mean", "running_var"} <= module._buffers.keys()


def norm_parameter_names(model: nn.Module) -> set[str]:
    """Names of the weights and biases (gamma, beta) of the normalisation layers."""
    return {
        f"{layer}.{name}".lstrip(".")
        for layer, m in norm_layers(model)
        for name, p in m.named_parameters(recurse=False)
        # A layer of the user's own may do more than normalise: what has a value a channel is gamma or beta.
        if isinstance(m, NORM_LAYERS) or p.shape == m.get_buffer("running_mean").shape
    }


def norm_buffer_names(model: nn.Module) -> set[str]:
    """Names of the running statistics of the normalisation layers."""
    return {
        f"{layer}.{name}".lstrip(".") for layer, m in norm_layers(model) for name, _ in m.named_buffers(recurse=False)
    }


class Modes:
    """Which of a model's norm layers are frozen.

    A layer is when it is in evaluation mode while the model trains. A model that as a whole is in evaluation mode says
    nothing of single layers (it is what one does before asking it something): what counts then is how it was last seen
    in training, or, if it never was, when this object was made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = dict(norm_layers(model))
        self._frozen = self._in_evaluation_mode()
        self.inner_loop_trains = False
        """Whether the model keeps the graphs of its own gradients in training mode alone, as force fields do."""

    def _in_evaluation_mode(self) -> frozenset[str]:
        return frozenset(name for name, layer in self._layers.items() if not layer.training)

    def seen(self, training: bool = False) -> frozenset[str]:
        """Names of the frozen layers as the model is now; ``training`` says that it is about to be trained so."""
        if training or self._model.training or any(layer.training for layer in self._layers.values()):
            self._frozen = self._in_evaluation_mode()
        return self._frozen

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """The model's own modes, but for dropout."""
        modes = {module: module.training for module in self._model.modules()}
        for module in modes:
            module.training = module.training and "dropout" not in type(module).__name__.lower()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def adapting(self) -> Iterator[None]:
        """Modes of the inner loop in use: evaluation mode, norm layers with the batch's statistics.

        Or, with ``inner_loop_trains``, training mode without dropout.
        """
        with self.evaluating("batch"):
            if self.inner_loop_trains:
                frozen = {self._layers[name] for name in self.seen()}
                for module in self._model.modules():
                    module.training = module not in frozen and "dropout" not in type(module).__name__.lower()
            yield

    @contextmanager
    def evaluating(self, normalisation: Normalisation) -> Iterator[None]:
        """Evaluation mode (no dropout) with norm layers that use the batch's statistics or those in their buffers."""
        frozen = self.seen()
        modes = {module: module.training for module in self._model.modules()}
        # Not by module.train(), which people override, and which changes a layer's submodules.
        for module in modes:
            module.training = False
        if normalisation == "batch":
            for name, layer in self._layers.items():
                layer.training = name not in frozen
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def whole_batch_statistics(model: nn.Module) -> Iterator[None]:
    """In this block a call leaves its own batch's statistics in the norm layers' buffers, nothing of those before.

    Raises:
        TypeError: a norm layer of the user's own says nothing of its momentum.
    """
    layers = [(name, m) for name, m in norm_layers(model) if _keeps_statistics(m)]
    for name, layer in layers:
        if layer.training and not hasattr(layer, "momentum"):
            raise TypeError(
                f"normalisation='support' lets each norm layer keep the statistics of one batch, by momentum = 1; "
                f"{name} ({type(layer).__name__}) has no attribute momentum. Give it one, or take "
                "normalisation='batch' or 'running'"
            )
    momenta = [(layer, layer.momentum) for _, layer in layers if hasattr(layer, "momentum")]
    for layer, _ in momenta:
        layer.momentum = 1.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum


def can_keep_a_batch(model: nn.Module, frozen: frozenset[str]) -> bool:
    """Whether there are norm layers, and all that are not frozen, that ``whole_batch_statistics`` is of use for."""
    layers = [m for name, m in norm_layers(model) if _keeps_statistics(m) and name not in frozen]
    return bool(layers) and all(hasattr(layer, "momentum") for layer in layers)


class _OfClass:
    """Base of the classes that ``use_batch_statistics`` makes; pickled as the class they come from, and remade."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, base = type(self).__bases__
        return _made, (mixin, base), self.__dict__


class _ByBatch(_OfClass):
    """To ``forward``, there are no running statistics.

    ``None`` in their place is PyTorch's own way to say that a layer normalises with its batch's statistics in
    evaluation mode too. The buffers stay where they are for everybody else: a state dict has all keys of the model.
    """

    running_mean = running_var = num_batches_tracked = property(lambda self: None)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer does with its batch's statistics."""
        try:
            y: Tensor = super().forward(x)  # type: ignore[misc]
        except ValueError as error:
            if "Expected more than 1 value" not in str(error):
                raise
            raise ValueError(
                f"{error}: this {type(self).__name__} uses the statistics of the batch it is given, as "
                "adapt(..., normalisation='batch') made it. Ask about more examples together, or adapt with "
                "normalisation='support', under which each has an answer of its own"
            ) from None
        return y


class _Training(_OfClass):
    """In training mode, whatever the model is told: a user's layer may know no other way to its batch's statistics."""

    training = property(lambda self: True, lambda self, mode: None)

    def forward(self, x: Tensor) -> Tensor:
        """As in training, on statistics that are thrown away: to be asked something changes nothing."""
        base: Any = type(self).__bases__[1]
        asked = base.__new__(base)
        values = vars(self)
        asked.__dict__.update(
            values, _buffers={n: b if b is None else b.clone() for n, b in values["_buffers"].items()}
        )
        asked.__dict__["training"] = True
        y: Tensor = base.forward(asked, x)
        return y


_MIXED: dict[tuple[type, type], type[nn.Module]] = {}


def _mixed(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return _MIXED.setdefault((mixin, base), type(base.__name__, (mixin, base), names))


def _made(mixin: type, base: type[nn.Module]) -> nn.Module:
    made = _mixed(mixin, base)
    return made.__new__(made)


def by_batch_alone(model: nn.Module) -> list[str]:
    """Names of the layers that ``use_batch_statistics`` has changed."""
    return [name for name, module in model.named_modules() if isinstance(module, _OfClass)]


def use_batch_statistics(model: nn.Module, frozen: frozenset[str] = frozenset()) -> None:
    """Make the norm layers normalise with their batch's statistics in evaluation mode too, but for frozen ones."""
    for name, layer in list(norm_layers(model)):
        if name in frozen or not _keeps_statistics(layer) or layer.running_mean is None:
            continue
        base = type(layer)
        ours = base.__module__.partition(".")[0] in ("torch", "innerloop")
        if isinstance(layer, _NormBase):
            layer.track_running_stats = False
        layer.__class__ = _mixed(_ByBatch if ours else _Training, base)
