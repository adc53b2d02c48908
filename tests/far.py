"""A second device for machines without one: "far".

Its tensors hold their numbers on the CPU, so that everything computes as ever; but they say that they are
elsewhere, they give nothing to NumPy, and an operation that mixes them with the CPU's is refused, as CUDA
refuses it. What runs on it therefore needs no CPU that it does not ask for. It does not show what CUDA's kernels
compute, what they cost, pinned memory, streams, or which operations a GPU lacks. Forward-mode derivatives end the
process on a device that is made in Python: they are refused, as of an operation that has none.

Registering a device changes torch for the whole process: what uses it runs in one of its own (`on_far.py`).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")
FAR = torch.device("far", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""CUDA takes indices from the CPU, too."""


class Far(Tensor):
    """A tensor that says it is far; `near` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        far = Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=FAR,
        )  # fmt: skip
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"far {self.near!r}"


def _refuse_a_mixture(func: Any, args: Any, kwargs: Any) -> None:
    """RuntimeError unless tensors with axes are all far or all near; what has none is a number."""
    asked = (args[0], *args[2:]) if func in INDEXING and isinstance(args[0], Far) else args
    tensors = [value for value in tree_leaves((asked, kwargs)) if isinstance(value, Tensor)]
    near = [value for value in tensors if not isinstance(value, Far) and value.ndim]
    if near and len(near) < len(tensors) and any(isinstance(value, Far) for value in tensors):
        shapes = [(str(value.device), list(value.shape)) for value in tensors]
        raise RuntimeError(f"{func} got tensors on different devices: {shapes}")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func not in MOVES:
        _refuse_a_mixture(func, args, kwargs)
    held = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Far)]
    far, device = bool(held), kwargs.get("device")
    if device is not None:
        far, kwargs = torch.device(device).type == FAR.type, kwargs | {"device": "cpu"}
    if func is aten.copy_.default:
        far = isinstance(args[0], Far)
    plain = {id(value.near): value for value in held}
    near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))

    def back(value: Any) -> Any:
        if not far or not isinstance(value, Tensor):
            return value
        return plain[id(value)] if id(value) in plain else Far(value)

    return tree_map(back, func(*near_args, **near_kwargs))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does in C++ without asking anybody: making a tensor of Python numbers, and giving them back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


def _no_jvp(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no forward derivative here")


@contextmanager
def device() -> Iterator[torch.device]:
    """The device "far" is there inside, and `module.to("far")` works."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        stack.enter_context(mock.patch.object(torch.func, "jvp", _no_jvp))
        stack.enter_context(_Dispatch())
        stack.enter_context(_Functions())
        yield FAR
