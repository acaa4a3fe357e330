"""Parameters and bytes of a checkpoint, from its headers."""

from __future__ import annotations

from collections.abc import Sequence

from ffsplit.ffn.shapes import LayerLayout, ModelShape
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.routing import routing_of
from ffsplit.store.manifest import Size

PARAMETER_DTYPES = ("F64", "F32", "F16", "BF16")


def original_size(checkpoint: Checkpoint) -> Size:
    """The size of a dense checkpoint."""
    layouts = [LayerLayout.dense(shape) for shape in checkpoint.shapes]
    return compressed_size(checkpoint, layouts, file_bytes=_file_bytes(checkpoint))


def model_shape(checkpoint: Checkpoint, *, drops_experts: bool = False) -> ModelShape:
    """What budgets and plans need to know about a dense checkpoint.

    With `drops_experts`, raises UnsupportedModelError if its experts cannot be dropped.
    """
    size, groups = original_size(checkpoint), checkpoint.width_groups
    return ModelShape(
        shapes=checkpoint.shapes,
        itemsize=checkpoint.itemsize,
        num_parameters=size.num_parameters,
        num_parameters_without_embeddings=size.num_parameters_without_embeddings,
        width_groups=groups if set(groups) != {0} else None,
        mixture=routing_of(checkpoint).mixture if drops_experts else None,
    )


def compressed_size(original: Checkpoint, layouts: Sequence[LayerLayout], *, file_bytes: int) -> Size:
    """The size of a compressed checkpoint: the original's other tensors and the layouts' elements.

    Its FFNs are all of the model's, those that are left out as well.
    """
    shapes = original.shapes
    dense_elements = sum(shape.num_elements for shape in shapes)
    left_out = sum(ffn.shape.num_elements for ffn in original.left_out)
    elements = sum(layout.num_elements(shape) for layout, shape in zip(layouts, shapes, strict=True))
    fewer = dense_elements - elements + _router_elements(original, layouts)
    parameters = {n: info for n, info in original.tensors.items() if info.dtype in PARAMETER_DTYPES}
    total = sum(info.num_elements for info in parameters.values())
    in_blocks = sum(
        info.num_elements for name, info in parameters.items() if name in original.names_in_all_blocks
    )
    itemsize = original.itemsize
    return Size(
        num_parameters=total - fewer,
        num_parameters_without_embeddings=in_blocks - fewer,
        ffn_elements=elements + left_out,
        ffn_bytes=left_out * itemsize
        + sum(layout.size_bytes(shape, itemsize) for layout, shape in zip(layouts, shapes, strict=True)),
        file_bytes=file_bytes,
    )


def _router_elements(original: Checkpoint, layouts: Sequence[LayerLayout]) -> int:
    """Elements of the routers that go with dropped experts."""
    if not any(layout.is_dropped for layout in layouts):
        return 0
    mixture = routing_of(original).mixture
    return mixture.num_dropped(layouts) * mixture.router_elements


def _file_bytes(checkpoint: Checkpoint) -> int:
    return sum((checkpoint.directory / name).stat().st_size for name in checkpoint.weight_files)
