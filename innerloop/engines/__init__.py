"""Ways to compute a meta-batch: its gradients in training, its outputs in evaluation. All give the same numbers.

``Loop`` works through the tasks one by one, ``Vmapped`` does all at once, ``Compiled`` by graphs that Inductor
compiled, ``Auto`` by those once they pay.
"""

from innerloop.engines.auto import Auto, Estimate
from innerloop.engines.compiled import Compiled
from innerloop.engines.engine import Engine, Plan, Subject
from innerloop.engines.loop import Loop
from innerloop.engines.vmapped import Vmapped

__all__ = ["Auto", "Compiled", "Engine", "Estimate", "Loop", "Plan", "Subject", "Vmapped"]
