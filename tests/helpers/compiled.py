"""A model that is compiled in one graph, and how often it was."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters


class Compiled:
    """A model that is compiled in one graph, and how often it was. (`eager` runs what was traced as it is.)"""

    def __init__(self, model, backend="eager", **options):
        torch._dynamo.reset()
        counters.clear()
        self.counter = CompileCounterWithBackend(backend)
        self.function = torch.compile(model, fullgraph=True, backend=self.counter, **options)

    def __call__(self, *inputs):
        return self.function(*inputs)

    @property
    def times(self):
        assert not counters["graph_break"]
        return self.counter.frame_count
