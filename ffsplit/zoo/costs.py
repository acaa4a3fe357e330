"""What a model's stages reserved, and its price by the zoo file's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ffsplit.zoo.batch import Cost, ModelResult, StageUse

CPU = "CPU"
"""The name of a core in `prices`. Every other name is a part of a GPU's name, such as H100."""


def cost_of(result: ModelResult, prices: Mapping[str, float]) -> Cost | None:
    """What a result took in this batch; None if an earlier batch published it."""
    if result.state == "committed already":
        return None
    return cost_of_stages(result.stages, prices, gpu=result.gpu)


def cost_of_stages(stages: Iterable[StageUse], prices: Mapping[str, float], *, gpu: str | None) -> Cost:
    """The sum of stages, and its price. Without a price for all that they reserved, there is none."""
    stages = tuple(stages)
    cpu_s, gpu_s = sum(each.cpu_s for each in stages), sum(each.gpu_s for each in stages)
    of_cpu, of_gpu = prices.get(CPU), _gpu_price(prices, gpu)
    price = None
    if prices and not (gpu_s and of_gpu is None) and not (of_cpu is None and not gpu_s):
        price = round((cpu_s * (of_cpu or 0) + gpu_s * (of_gpu or 0)) / 3600, 6)
    return Cost(stages=stages, cpu_s=round(cpu_s, 3), gpu_s=round(gpu_s, 3), price=price)


def _gpu_price(prices: Mapping[str, float], gpu: str | None) -> float | None:
    """The price of a GPU by the longest part of its name, or the only one if its name is not known."""
    known = {name: price for name, price in prices.items() if name.upper() != CPU}
    if gpu is None:
        return next(iter(known.values())) if len(known) == 1 else None
    named = [name for name in known if name.lower() in gpu.lower()]
    return known[max(named, key=len)] if named else None
