"""Lightning's main import name, for machines that have ``pytorch_lightning`` alone; goes on PYTHONPATH there.

Both names then stand for the same modules, so that there is one Trainer.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

_REAL = {f"{__name__}.pytorch": "pytorch_lightning", f"{__name__}.fabric": "lightning_fabric"}
__version__ = importlib.import_module("pytorch_lightning").__version__


class _Alias(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):  # noqa: ARG002
        alias = ".".join(fullname.split(".")[:2])
        if alias not in _REAL:
            return None
        real = importlib.import_module(_REAL[alias] + fullname.removeprefix(alias))
        return ModuleSpec(fullname, self, loader_state=(real, real.__spec__))

    def create_module(self, spec):
        return spec.loader_state[0]

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state[1]  # the import has replaced it


sys.meta_path.insert(0, _Alias())
