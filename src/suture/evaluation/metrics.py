"""The metrics of tasks: their units, and whether more is better."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric: its name, whether less is better, and whether it is a share in [0, 1], which is shown in percent."""

    name: str
    lower: bool = False
    share: bool = True


ACCURACY = Metric("accuracy")
_KNOWN = {
    metric.name: metric
    for metric in (
        Metric("bits_per_byte", lower=True, share=False),
        Metric("perplexity", lower=True, share=False),
        Metric("word_perplexity", lower=True, share=False),
        Metric("byte_perplexity", lower=True, share=False),
    )
}


def metric(name: str) -> Metric:
    """The metric of this name; unknown ones are shares of which more is better."""
    return _KNOWN.get(name, Metric(name))
