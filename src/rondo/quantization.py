"""Weights in int8 for inference: the layers' matrices, one scale per row of each (torchao).

Only what is multiplied with is rounded: activations stay in the model's type. What the loop enters
through stays as it is too, and so do deltas, norms, embedding and head. Of these only the head was
seen to lose by rounding (as much as the prelude does, on SmolLM2); injection and deltas are kept
because they are too small for their bytes to matter.

There is no checkpoint of int8 weights, and `save_pretrained` of such a model fails: rounding is a
matter of seconds, the checkpoint stays the one that was proved and trained, and engines that know
no torchao can read it. So int8 is chosen where a model is loaded.
"""

import importlib
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rondo.errors import UserError
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

Weights = Literal["int8"]
# Layers of prelude, core and coda; nothing beside them, whatever a model gets there.
_IN_LAYERS = re.compile(r"model\.layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a model's weights take, before and after they were quantized."""

    before: int
    after: int
    names: tuple[str, ...]
    """The matrices that are in int8 now."""

    @property
    def share(self) -> float:
        """What is left of the bytes, from 0 to 1."""
        return self.after / self.before


def quantize(model: RecurrentForCausalLM, weights: Weights) -> Footprint:
    """Round the matrices of all layers to int8, in place and on the device where they are.

    Experts whose matrices are stacked in one parameter are no linear layers, and are left.

    Args:
        model: The model, of which the shared weights of layers with deltas are rounded as well.
        weights: int8: symmetric, one scale per output channel.

    Raises:
        UserError: torchao is missing, or the model was quantized already.
    """
    assert weights == "int8", weights
    ao = _torchao()
    names = tuple(f"{name}.weight" for name, one in model.named_modules() if is_rounded(one, name))
    if any(is_traceable_wrapper_subclass(model.get_parameter(name)) for name in names):
        raise UserError("the model's weights are quantized already: load it anew")
    before = weight_bytes(model)
    # torchao would set options of the compiler for the whole process.
    how = ao.Int8WeightOnlyConfig(set_inductor_config=False)
    ao.quantize_(model, how, filter_fn=is_rounded)
    return Footprint(before, weight_bytes(model), names)


def is_rounded(module: nn.Module, name: str) -> bool:
    """Whether `quantize` rounds the weight of a module of this name: a linear one in a layer."""
    return isinstance(module, nn.Linear) and _IN_LAYERS.match(name) is not None


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters, shared ones once, with the scales of quantized ones."""
    return sum(_stored_bytes(parameter) for parameter in model.parameters())


def _stored_bytes(tensor: torch.Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    # A quantized tensor claims the bytes of the type it stands for.
    inner, _ = tensor.__tensor_flatten__()
    return sum(_stored_bytes(getattr(tensor, name)) for name in inner)


def _torchao() -> Any:
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise UserError('int8 weights need torchao: pip install "rondo-lm[int8]"') from error
