"""Scaling and imputation of a table's numbers, learnt from noisy statistics: post-processing.

A declared range says where a number can be, not where it is: most incomes are in a thousandth of
theirs, where a network sees hardly any difference. So a network is given each number's place among
the others, by the quantiles of the noisy histogram; what it draws is taken back. A missing number
is given to it as the median. What was learnt is a part of the model: it travels, is stored and is
loaded with it, and no step trains it.
"""

import numpy as np
import torch
from torch import Tensor, nn

from ..data_prep.queries import Noisy
from ..data_prep.queries.tables import fine_histogram, quantiles
from ..data_prep.schema import TableSchema

_PARTS = 16
# As if so many records were spread evenly over the declared range: no part of it is squeezed to
# nothing, so that there is a way back.
_IDENTITY = 0.1
_LOUD = 3.0  # standard deviations of its own noise that a histogram's total must have


class Scaling(nn.Module):
    """A piecewise linear, increasing map of [0, 1] onto itself for each number of a table.

    Attributes:
        shift: [numbers, _PARTS + 1] how far the ends of the parts are from equal parts.
        fill: [numbers] what stands for a missing number.
    """

    def __init__(self, schema: TableSchema) -> None:
        super().__init__()
        numbers = [b for b in schema.blocks if b.column.kind != "categorical"]
        self.columns = tuple(block.column.name for block in numbers)
        self.places = [block.start for block in numbers]
        self.nullable = [block.column.nullable for block in numbers]
        self.shift = nn.Parameter(torch.zeros(len(numbers), _PARTS + 1), requires_grad=False)
        self.fill = nn.Parameter(torch.zeros(len(numbers)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, width] as encoded -> as a network sees it."""
        scaled = x.clone()
        ends = self._ends()
        equal = torch.linspace(0, 1, _PARTS + 1)
        for index, place in enumerate(self.places):
            value = _interpolated(x[:, place], ends[index], equal)
            if self.nullable[index]:
                value = torch.where(x[:, place + 1] < 0.5, self.fill[index], value)
            scaled[:, place] = value
        return scaled

    def inverse(self, x: Tensor) -> Tensor:
        """The way back: [B, width] as a network drew it -> as encoded."""
        encoded = x.clone()
        ends = self._ends()
        equal = torch.linspace(0, 1, _PARTS + 1)
        for index, place in enumerate(self.places):
            value = _interpolated(x[:, place], equal, ends[index])
            if self.nullable[index]:
                value = value * (x[:, place + 1] >= 0.5)
            encoded[:, place] = value
        return encoded

    def _ends(self) -> Tensor:
        return torch.linspace(0, 1, _PARTS + 1) + self.shift


@torch.no_grad()
def learn(scaling: Scaling, statistics: Noisy, schema: TableSchema) -> None:
    """Sets the maps by the quantiles of noisy histograms; one that is drowned is left as it is."""
    share = np.linspace(0, 1, _PARTS + 1)
    for index, column in enumerate(scaling.columns):
        counts, edges, std = fine_histogram(column, statistics, schema)
        if counts.sum() <= _LOUD * std * np.sqrt(len(counts)):
            continue
        # Mixed into the records, not into their quantiles: where they crowd, those are near to
        # each other, and a tenth of the range between two of them would be most of it.
        mixed = (1 - _IDENTITY) * counts / counts.sum() + _IDENTITY * np.diff(edges)
        ends = quantiles(mixed, edges, [*share])
        ends[0], ends[-1] = 0.0, 1.0
        scaling.shift[index] = torch.from_numpy(ends - share).float()
        scaling.fill[index] = 0.5  # the median's place among the others


def _interpolated(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear: from `at` [K], increasing, to `values` [K]; x [B] is kept within [0, 1]."""
    inside = x.clamp(0, 1)
    part = torch.bucketize(inside, at[1:-1].contiguous(), right=True)
    low, high = at[part], at[part + 1]
    share = (inside - low) / (high - low)
    return values[part] + share * (values[part + 1] - values[part])
