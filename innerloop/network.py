"""The user's model and loss as pure functions of their tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from innerloop import together
from innerloop.closed_forms.cross_entropy import FusedCrossEntropy
from innerloop.model_state import ModelState, Randomness
from innerloop.norm_layers import Modes, norm_buffer_names
from innerloop.precision import Bfloat16Convolutions, MixedBatchNorm, Precision
from innerloop.tasks import SHARED, Examples

Loss = Callable[[Any, Any], Tensor]


@dataclass(eq=False)
class Network:
    """A model and a loss, called with the tensors that an inner loop gives in the place of the model's own.

    Attributes:
        model: any.
        loss_function: of its outputs and the targets.
        precision: of convolutions.
        recomputes: whether the model is called again while a gradient is taken (activation checkpointing), and must
            have the same tensors then.
    """

    model: nn.Module
    loss_function: Loss
    precision: Precision = "float32"
    recomputes: bool = False

    @cached_property
    def state(self) -> ModelState:
        """Where the model's tensors are."""
        return ModelState(self.model)

    @cached_property
    def modes(self) -> Modes:
        """Which norm layers are frozen."""
        return Modes(self.model)

    @cached_property
    def recurrent(self) -> bool:
        """Whether there are recurrent layers, whose gradients cuDNN cannot differentiate; PyTorch's own kernels can."""
        return any(isinstance(module, nn.RNNBase) for module in self.model.modules())

    @cached_property
    def norm_buffers(self) -> set[str]:
        """Names of the norm layers' running statistics."""
        return norm_buffer_names(self.model)

    @contextmanager
    def differentiated(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Around a gradient of what was called with these tensors, for models that compute again meanwhile."""
        if not self.recomputes:
            yield
            return
        with self.state.exchanged(parameters, {name: b.clone() for name, b in buffers.items()}):
            yield

    def outputs(self, parameters: Mapping[str, Tensor], buffers: dict[str, Tensor], inputs: Any) -> Any:
        """What the model makes of ``inputs``. ``buffers`` hold afterwards what the model made of them."""
        with self.state.exchanged(parameters, buffers):
            return self._called(inputs)

    def answers(self, parameters: Mapping[str, Tensor], buffers: dict[str, Tensor], inputs: Any) -> Any:
        """``outputs`` as constants; of a model that takes gradients itself (forces of an energy) too."""
        before = {name: b.clone() for name, b in buffers.items()}
        try:
            with torch.no_grad():
                return self.outputs(parameters, buffers, inputs)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        buffers.update(before)
        with torch.enable_grad():
            return pytree.tree_map_only(Tensor, torch.detach, self.outputs(parameters, buffers, inputs))

    def loss(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], examples: Examples
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """The scalar loss on ``examples``, the model's outputs, and the buffers as the call left them.

        The loss too sees the model with these tensors, should it look at it (a penalty on the fast weights, an
        auxiliary loss that the forward keeps there). ``buffers`` are copied first: batch norm updates its running
        statistics in place, which neither autograd nor ``torch.func`` may see happen to a tensor that outlives the
        call. They are state, and carry no gradient from call to call.

        Raises:
            TypeError: the loss function returned something other than a real scalar tensor.
        """
        buffers = together.copies(buffers)
        # A transform refuses changes in place by itself, and would have the copies as its own tensors.
        targets = examples.targets if torch._C._are_functorch_transforms_active() else own_copies(examples.targets)
        with self.state.exchanged(parameters, buffers):
            outputs = self._called(examples.inputs)
            with FusedCrossEntropy():
                loss = self.loss_function(outputs, targets)
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"the loss must be a floating-point tensor without dimensions, got {found}; "
                "reduce it first, for example with .mean()"
            )
        return loss, outputs, {name: b.detach() for name, b in buffers.items()}

    def _called(self, inputs: Any) -> Any:
        # A tuple holds positional arguments and a dict keyword arguments. The model may change them in place.
        inputs = own_copies(inputs)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        with ExitStack() as stack:
            stack.enter_context(_MATH_ATTENTION)
            if self.recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if torch._C._are_functorch_transforms_active():
                stack.enter_context(MixedBatchNorm())
            if self.precision == "bf16":
                stack.enter_context(Bfloat16Convolutions())
            return self.model(*(args if isinstance(args, tuple) else (args,)), **kwargs)


def own_copies(tree: Any) -> Any:
    """The same nest, with containers, tensors and whatever else it holds of its own."""
    return pytree.tree_map(_own_copy, tree)


def _own_copy(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return leaf if isinstance(leaf, SHARED) else copy.deepcopy(leaf)


class _MathAttention:
    """Attention by the MATH backend: the fused kernels have neither second derivatives nor forward-mode ones.

    The choice is the process's, not the thread's: it holds until the last of the threads that made it has left.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._choice = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._choice.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._choice.close()


_MATH_ATTENTION = _MathAttention()


@contextmanager
def replayed_randomness(state: Randomness, device: torch.device) -> Iterator[None]:
    """The random numbers (dropout masks) that were drawn from ``state`` on, and then those of now again."""
    now = Randomness.now(device)
    state.restore(device)
    try:
        yield
    finally:
        now.restore(device)
