"""The user's model and loss as pure functions of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from innerloop.per_step import norm_layers
from innerloop.precision import Bfloat16Convolutions, Precision
from innerloop.tasks import Examples

Loss = Callable[[Any, Any], Tensor]
Normalisation = Literal["batch", "running", "support"]
"""Statistics that normalise the query set: its own batch's (transductive), or, for answers that do not depend on what
else is asked (inductive), the running ones of training or those of the support set at the same fast weights."""


@dataclass(frozen=True)
class Network:
    """A model and a loss, called with the tensors that an inner loop gives in the place of the model's own."""

    model: nn.Module
    loss_function: Loss
    precision: Precision = "float32"

    def outputs(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Any) -> Any:
        """What the model makes of ``inputs``. Buffers that the model changes are changed in place."""
        # A tuple holds positional arguments and a dict keyword arguments. Attention's fused kernels have neither
        # second derivatives nor forward-mode ones, the MATH backend has both.
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
        with sdpa_kernel(SDPBackend.MATH), Bfloat16Convolutions() if self.precision == "bf16" else nullcontext():
            return functional_call(self.model, {**parameters, **buffers}, args, kwargs, tie_weights=self._tied)

    @cached_property
    def _tied(self) -> bool:
        """Whether a tensor has two names in the model, which takes time to find out."""
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        return len({id(t) for _, t in named}) < len(named)

    def loss(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], examples: Examples
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """The scalar loss on ``examples``, the model's outputs, and the buffers as the call left them.

        ``buffers`` are copied first: batch norm updates its running statistics in place, which neither autograd nor
        ``torch.func`` may see happen to a tensor that outlives the call.

        Raises:
            TypeError: the loss function returned something other than a real scalar tensor.
        """
        buffers = {name: b.clone() for name, b in buffers.items()}
        outputs = self.outputs(parameters, buffers, examples.inputs)
        loss = self.loss_function(outputs, examples.targets)
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"the loss must be a floating-point tensor without dimensions, got {found}; "
                "reduce it first, for example with .mean()"
            )
        return loss, outputs, {name: b.detach() for name, b in buffers.items()}


@contextmanager
def evaluating(model: nn.Module, normalisation: Normalisation) -> Iterator[None]:
    """Evaluation mode (no dropout) with norm layers that use the batch's statistics or those in their buffers."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if normalisation == "batch":
        for _, layer in norm_layers(model):
            layer.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def replayed_randomness(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """The random numbers (dropout masks) that were drawn from ``state`` on, and then those of now again."""
    now = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(now, device)


def random_state(device: torch.device) -> list[Tensor]:
    """State of the generators that a model on ``device`` draws from."""
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Go back to a state that ``random_state`` gave."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
