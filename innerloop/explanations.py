"""Models that cannot be meta-learned as they are, said in sentences: what it is, where, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


class UnsuitableModelError(RuntimeError):
    """PyTorch cannot compute what this model's meta-gradient or adaptation needs."""


class BatchOfOneError(ValueError):
    """A norm layer was to normalise a single value by its own statistics."""


_COMPILED = (
    "a compiled model cannot be differentiated twice (torch.compile), and {name} is one. Give the MetaLearner the "
    "model itself, not compiled; MetaLearner(..., compile='on') compiles the meta-gradient instead. "
    "First-order meta-gradients (second_order=False) take a compiled model"
)


def check_model(model: nn.Module) -> None:
    """Refuse what can never work, before any work.

    Raises:
        TypeError: it is no module, or one that is made to be called by itself.
        ValueError: its parameters have no shape yet.
    """
    if not isinstance(model, nn.Module):
        hint = ", called: Model()" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise TypeError(f"the model must be an nn.Module{hint}; got {_kind(model)}")
    for name, module in model.named_modules():
        name = name or "the model"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{name} is a {type(module).__name__}, which copies the parameters it has to each device, and not fast "
                "weights: give its .module. Several devices share tasks out: innerloop train --devices N, or "
                "task_gradients on each and accumulate"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{name} is a TorchScript module, whose parameters cannot be exchanged for fast weights: give the "
                "nn.Module that it was made from"
            )
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                raise ValueError(
                    f"{key} of {name} ({type(module).__name__}) has no shape yet: call the model on a batch of inputs "
                    "once, before the MetaLearner is made"
                )
            if isinstance(tensor, torch.Tensor) and tensor.is_inference():
                raise ValueError(
                    f"{key} of {name} was made under torch.inference_mode and cannot be learned: make the model outside"
                )


def check_loss(loss: object, model: nn.Module) -> None:
    """Refuse what is no loss, or one that learns by itself.

    Raises:
        TypeError: it cannot be called, or is a class.
        ValueError: it has parameters that are not the model's.
    """
    if isinstance(loss, type):
        raise TypeError(
            f"the loss must be a function loss(outputs, targets), and {loss.__name__} is a class: {loss.__name__}()"
        )
    if not callable(loss):
        raise TypeError(f"the loss must be a function loss(outputs, targets), got {loss!r:.80}")
    if isinstance(loss, nn.Module):
        known = {id(p) for p in model.parameters()}
        own = [name for name, p in loss.named_parameters() if p.requires_grad and id(p) not in known]
        if own:
            raise ValueError(
                f"the loss {type(loss).__name__} has parameters of its own ({', '.join(own[:3])}), which nobody would "
                "learn: make it a part of the model, or freeze them (requires_grad_(False))"
            )


@contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Errors of PyTorch's that people cannot be expected to read, as sentences.

    Raises:
        UnsuitableModelError: of a model that cannot be meta-learned so.
        BatchOfOneError: of one image normalised by its own batch.
    """
    try:
        yield
    except (UnsuitableModelError, BatchOfOneError):
        raise
    except TypeError as error:
        if "must be Tensor, not list" not in str(error):
            raise
        raise TypeError(
            f"{error}: a list of tensors or arrays is given to the model as a list. If it is to be one tensor, stack "
            "it: torch.stack(inputs)"
        ) from error
    except (RuntimeError, ValueError) as error:
        message, where = str(error), _module_of(model, error.__traceback__)
        if isinstance(error, ValueError):
            if not message.startswith("Expected more than 1 "):  # value per channel, spatial element
                raise
            raise BatchOfOneError(
                f"{where or 'a batch norm layer'} normalises with the statistics of its batch, and a single value a "
                f"channel has no variance ({message}). Give more examples at once; or, for a query set of one, "
                "normalisation='running' or 'support'; or freeze the layer: layer.eval()"
            ) from error
        sentence = _sentence(model, message, where)
        if sentence is None:
            raise
        raise UnsuitableModelError(sentence) from error


def _sentence(model: nn.Module, message: str, where: str | None) -> str | None:
    if "donated buffer" in message or "does not currently support double backward" in message:
        return str(compiled_twice(model))
    if "Checkpointing is not compatible with" in message or "use_reentrant" in message:
        return (
            "activation checkpointing with use_reentrant=True works with loss.backward() alone: take "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off"
        )
    missing = re.search(r"erivative for '?([\w:.]+)'? is not implemented", message)
    if missing or "once_differentiable" in message:
        operator = missing[1] if missing else "a function marked once_differentiable"
        named = _modules_named_like(model, operator)
        return (
            f"{operator}{f' ({named})' if named else ''} has no second derivative in PyTorch, which a second-order "
            "meta-gradient needs. Take first-order meta-gradients (second_order=False, fomaml()), keep its parameters "
            "out of the inner loop (adapt_except) with nothing adapted before it, or replace it: nn.EmbeddingBag by "
            f"nn.Embedding and a mean, for example. PyTorch says: {message.splitlines()[0]}"
        )
    return None


def compiled_twice(model: nn.Module) -> UnsuitableModelError:
    """What to say of a second derivative through something that ``torch.compile`` made."""
    return UnsuitableModelError(_COMPILED.format(name=_compiled(model) or "a function that it or the loss calls"))


def _compiled(model: nn.Module) -> str | None:
    """The name of a compiled module in the model."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            return name or type(model).__name__
    return None


def _modules_named_like(model: nn.Module, operator: str) -> str:
    """Modules whose class has the operator's name: ``_embedding_bag_dense_backward`` is an EmbeddingBag's."""
    letters = re.sub(r"[\W_]", "", operator).lower()
    found = [
        f"{name or 'the model'}: {type(module).__name__}"
        for name, module in model.named_modules()
        if len(type(module).__name__) > 3 and type(module).__name__.lower() in letters
    ]
    return ", ".join(found[:3])


def _module_of(model: nn.Module, traceback: TracebackType | None) -> str | None:
    """The innermost module of the model that a traceback goes through."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if id(owner) in names:
            found = f"{names[id(owner)] or 'the model'} ({type(owner).__name__})"
        traceback = traceback.tb_next
    return found


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r:.80}"
