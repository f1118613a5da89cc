"""stub"""
from __future__ import annotations
from typing import Any
from torch import nn
class BlockPlan:
    def try_run(self, module: nn.Module, args: Any, kwargs: Any) -> Any: ...
def plan_block(module: nn.Module, example: Any = None) -> BlockPlan | str:
    return ""
def verify(module: nn.Module, plan: BlockPlan, example: Any = None) -> Any: ...
