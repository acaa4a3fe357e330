"""What `ffsplit inspect` prints: a model's FFNs, what budgets would give, and which engines that suits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffsplit.cli.columns import Table, print_sentence
from ffsplit.cli.tables import experts_in_words
from ffsplit.ffn.engines import suited
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.report.humanize import layout, percent, unchanged_in_words

if TYPE_CHECKING:
    from ffsplit.forecasts import FFNGroup, Inspection


def print_inspection(found: Inspection) -> None:
    """The FFNs of a model, what each budget would give, and which engines its widths suit."""
    share = found.ffn_elements / found.num_parameters
    print_sentence(f"{found.architecture} ({found.model_type}): {len(found.shapes)} FFNs")
    print_sentence(f"parameters {found.num_parameters:,}, FFNs {found.ffn_elements:,} ({percent(share)})")
    print()
    table = Table("", ("FFNs", "number", "sizes", "activation", "biases", "of all parameters"))
    for group in found.groups:
        shape = group.shape
        sizes = f"{shape.hidden_size} -> {shape.num_neurons} -> {shape.hidden_size}"
        has = [name for name, there in (("up", shape.up_bias), ("down", shape.down_bias)) if there]
        count = f"{group.num_ffns}" if group.num_ffns == group.num_blocks else _in_blocks(group)
        gated = ", gated" if shape.gated else ""
        part = percent(group.num_elements / found.num_parameters)
        table.add(group.what, count, sizes, group.activation + gated, ", ".join(has) or "none", part)
    table.print()
    about = found.ffn_elements - sum(each.num_elements for each in found.left_out_ffns)
    if unchanged := unchanged_in_words(found.left_out_ffns, ffn_elements=about):
        print_sentence(unchanged)
    names = ("--keep", "an FFN becomes", "parameters", "in the blocks", "plain")
    print()
    table = Table(f"recipe {found.recipe}", names, left=("an FFN becomes",))
    for each in found.budgets:
        blocks = each.num_parameters_without_embeddings / found.num_parameters_without_embeddings - 1
        plain = "yes" if each.plain else "no"
        layouts = " / ".join(dict.fromkeys(map(layout, each.layouts)))
        layouts += experts_in_words(each.experts_per_block)
        table.add(f"{each.keep:g}", layouts, f"{each.num_parameters:,}", f"{blocks:+.1%}", plain)
    table.print()
    print()
    _print_engines(found)


def _in_blocks(group: FFNGroup) -> str:
    return f"{group.num_ffns} in {group.num_blocks} blocks"


def _print_engines(found: Inspection) -> None:
    """Which engines run the widths of each budget at their best."""
    names = ("--keep", "widths", "int8 tensor cores", "vLLM, on GPUs", "llama.cpp k-quants")
    table = Table("engines that suit the widths", names)
    rows = [(each.keep, each.layouts) for each in found.budgets]
    for keep, layouts in [(1.0, tuple(map(LayerLayout.dense, found.shapes))), *rows]:
        widths = {part.num_neurons: None for each in layouts for part in each.parts}
        suits = suited(layouts)
        table.add(
            f"{keep:g}",
            ", ".join(f"{width:,}" for width in widths),
            "yes" if suits.int8_tensor_cores else "no",
            ", ".join(map(str, suits.vllm_gpus)) or "none",
            "yes" if suits.k_quants else "no",
        )
    table.print()
