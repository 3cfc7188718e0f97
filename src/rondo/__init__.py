"""Rondo: pretrained language models made depth-recurrent, proved, trained, measured, served.

With this package imported, `AutoModelForCausalLM.from_pretrained` loads its checkpoints without
remote code.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_EXPORTS = {
    "RecurrentConfig": "rondo.modeling.configuration_recurrent",
    "RecurrentForCausalLM": "rondo.modeling.modeling_recurrent",
    "RecurrentModel": "rondo.modeling.modeling_recurrent",
    "RecurrentCache": "rondo.modeling.cache_recurrent",
    "ExitRule": "rondo.modeling.exits_recurrent",
    "Contrast": "rondo.modeling.generation_recurrent",
    "convert_model": "rondo.convert.convert",
    "UserError": "rondo.errors",
}
__all__ = sorted(_EXPORTS)
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'rondo' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _register() -> None:
    """Make transformers' Auto classes know the model."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from rondo.modeling.configuration_recurrent import RecurrentConfig
    from rondo.modeling.modeling_recurrent import RecurrentForCausalLM, RecurrentModel

    AutoConfig.register("rondo", RecurrentConfig, exist_ok=True)
    AutoModel.register(RecurrentConfig, RecurrentModel, exist_ok=True)
    AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM, exist_ok=True)


class _RegisterWithTransformers(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the model once transformers' Auto classes are imported, and not before.

    Importing them here would cost every `rondo --help` and every reader of a config three
    seconds; leaving registration to the user would make the order of imports matter.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        self.loader = spec.loader
        return importlib.util.spec_from_loader(fullname, self, origin=spec.origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


if _AUTO_CLASSES in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
