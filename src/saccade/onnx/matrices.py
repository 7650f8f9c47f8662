"""A ViT's matrices in int8: outliers of activations moved into the weights, which are rounded by what they will meet.

A range is of a whole batch of tokens, so one loud channel leaves no steps for the others. What a matrix reads is
therefore divided by a scale for each channel and the matrix multiplied by it (SmoothQuant, arXiv 2211.10438), which
changes nothing in float32; then each row of it is rounded, and the rows after it make up for the error on pictures
that were seen (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from saccade.onnx.files import opened, session
from saccade.vit import ViTConfig

_TO_WEIGHTS = 0.75
"""How much of a channel's range the weights take over: half, as for language models, leaves three times the error."""
_ROWS = 128
"""Rows whose errors are handed on together."""


class Seen(NamedTuple):
    """What came to a matrix: the largest size of each channel, and the sum over tokens of x x^T."""

    largest: Float[Tensor, " i"]
    product: Float[Tensor, "i i"]


class Matrix(NamedTuple):
    """A product of a graph: the node's name, the names of what it reads and of the weight [I O], and its shape."""

    node: str
    reads: str
    weight: str
    shape: tuple[int, int]


def matrices(graph: Any, config: ViTConfig) -> list[Matrix]:
    """The matrices of blocks and of an attention pool, first to last; not the patch embedding, nor a position table."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and len(shapes.get(node.input[1], ())) == 2]
    found = [Matrix(node.name, node.input[0], node.input[1], shapes[node.input[1]]) for node in products]
    embedding = (config.channels * config.patch**2, config.width)
    first = next(one for one in found if one.shape == embedding)
    return [one for one in found if one is not first and min(one.shape) >= config.width]


def schemes(found: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """Which matrices are quantised, fastest first, by what stays float32: errors of the first grow all the way."""
    return {
        "nothing": list(found),
        "the first quarter of the matrices": list(found[len(found) // 4 :]),
        "the first half of the matrices": list(found[len(found) // 2 :]),
    }


def look(graph_file: Path, found: Sequence[Matrix], batches: Iterable[Tensor]) -> dict[str, Seen]:
    """What comes to each matrix on pictures, by the name of what is read; one picture at a time, for all is kept."""
    import onnx

    model = opened(graph_file)
    reads = list(dict.fromkeys(one.reads for one in found))
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in reads)
    talking = graph_file.with_name("talking.onnx")
    onnx.save(model, talking)
    run = session(talking)
    seen: dict[str, Seen] = {}
    for image in (image for batch in batches for image in batch):
        picture = image.float() / 255 if image.dtype == torch.uint8 else image
        for name, value in zip(reads, run.run(reads, {"images": picture[None].numpy()}), strict=True):
            tokens = torch.from_numpy(value).flatten(0, -2)
            largest, product = tokens.abs().amax(0), tokens.T @ tokens
            if name in seen:
                largest, product = torch.maximum(largest, seen[name].largest), product + seen[name].product
            seen[name] = Seen(largest, product)
    return seen


def quantise_matrices(graph_file: Path, new: Path, chosen: Sequence[Matrix], seen: Mapping[str, Seen]) -> None:
    """Writes a copy with the chosen matrices in int8, a scale for each output, activations in uint8 by their range.

    The operators are ONNX's own, which onnxruntime fuses.
    """
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    smooth = opened(graph_file)
    scales = _smooth(smooth.graph, chosen, seen)
    place = graph_file.with_name("smooth.onnx")
    onnx.save(smooth, place)
    quantize_dynamic(
        place, new, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
        nodes_to_quantize=[one.node for one in chosen],
    )  # fmt: skip
    model, exact = opened(new), _weights(smooth.graph)
    stored = _weights(model.graph)
    for one in chosen:
        scale = scales.get(one.reads, torch.ones(one.shape[0]))
        steps = _array(stored[f"{one.weight}_scale"])
        product = seen[one.reads].product / scale / scale[:, None]
        rounded = _round(_array(exact[one.weight]), steps, product)
        name = f"{one.weight}_quantized"
        stored[name].CopyFrom(numpy_helper.from_array(rounded.numpy(), name))
    onnx.save(model, new)


def _weights(graph: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _array(tensor: Any) -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _smooth(graph: Any, chosen: Sequence[Matrix], seen: Mapping[str, Seen]) -> dict[str, Tensor]:
    """Divides what matrices read by scales, which it returns by name, and multiplies the matrices by them.

    After a norm that nothing else reads the norm divides; before a contracting matrix, whose input is worst, a product
    that is added does. What attention gives to its projection is even enough.
    """
    from onnx import helper, numpy_helper

    weights = _weights(graph)
    makers = {output: node for node in graph.node for output in node.output}
    others = {node.name for node in graph.node} - {one.node for one in chosen}
    read_by_others = {name for node in graph.node if node.name in others for name in node.input}
    read_by_others |= {output.name for output in graph.output}
    scales: dict[str, Tensor] = {}

    def put(name: str, values: Tensor) -> None:
        weights[name].CopyFrom(numpy_helper.from_array(values.numpy(), name))

    for reads in dict.fromkeys(one.reads for one in chosen):
        users = [one for one in chosen if one.reads == reads]
        maker = makers[reads]
        norm = maker.op_type == "LayerNormalization" and reads not in read_by_others
        if not norm and users[0].shape[0] <= users[0].shape[1]:
            continue
        spread = torch.cat([_array(weights[one.weight]) for one in users], 1).square().mean(1).sqrt()
        scale = seen[reads].largest.clamp(min=1e-5) ** _TO_WEIGHTS / spread.clamp(min=1e-5) ** (1 - _TO_WEIGHTS)
        scale = scales[reads] = scale / scale.log().mean().exp()
        for one in users:
            put(one.weight, _array(weights[one.weight]) * scale[:, None])
        if norm:
            for name in maker.input[1:]:
                put(name, _array(weights[name]) / scale)
            continue
        divided, by = f"{reads}_divided", f"{reads}_by"
        graph.initializer.append(numpy_helper.from_array((1 / scale).numpy(), by))
        nodes = {node.name: node for node in graph.node}
        for one in users:
            nodes[one.node].input[0] = divided
        place = min(list(graph.node).index(nodes[one.node]) for one in users)
        graph.node.insert(place, helper.make_node("Mul", [reads, by], [divided], name=divided))
    return scales


def _round(
    weight: Float[Tensor, "i o"], steps: Float[Tensor, " o"], product: Float[Tensor, "i i"]
) -> Int8[Tensor, "i o"]:
    """Whole numbers whose products with `steps` do to the tokens of `product` nearly what `weight` does.

    Row by row, the loudest channel first; what rounding one changes, those that come later make up for.
    """
    order = product.diagonal().argsort(descending=True)
    left, product = weight[order], product[order][:, order].double()
    product.diagonal().add_(0.01 * product.diagonal().mean() + 1e-9)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(product))
    hand_on = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    rounded = torch.empty_like(left)
    for start in range(0, len(left), _ROWS):
        rows = range(start, min(start + _ROWS, len(left)))
        errors = torch.empty(len(rows), left.shape[1])
        for row in rows:
            rounded[row] = (left[row] / steps).round().clamp(-127, 127)
            errors[row - start] = (left[row] - rounded[row] * steps) / hand_on[row, row]
            left[row + 1 : rows.stop] -= hand_on[row, row + 1 : rows.stop, None] * errors[row - start]
        left[rows.stop :] -= hand_on[rows.start : rows.stop, rows.stop :].T @ errors
    whole = torch.empty_like(rounded)
    whole[order] = rounded
    return whole.to(torch.int8)
