"""A stand-in for the recorder of CUDA graphs, where there is no GPU."""

import torch

ON_GPU = torch.cuda.is_available()


class StandIn:
    """Records a function as a graph does: repeated, it reads and writes the same memory and returns nothing."""

    def __init__(self, fault=0.0):
        self.recorded = self.replayed = 0
        self.fault = fault

    def __call__(self, function):
        self.recorded += 1
        packed = function()

        def repeat():
            self.replayed += 1
            packed.copy_(function() * (1 + self.fault))

        return repeat, packed
