"""How each matrix of a model becomes ternary: method, spans, planes, basis, and which are left at 8 bits."""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from cordee.compress.gptq import compressed
from cordee.compress.rotation import INPUTS, ROTATED, Basis, block_of, signs_of
from cordee.compress.trits import TernaryMatrix, fitted, kept, mean_magnitudes
from cordee.convert.ternary_file import TernaryModel
from cordee.errors import BadRequest, UnsupportedModel

Method = Literal["absmean", "fit", "gptq"]


@dataclass(frozen=True)
class CompressOptions:
    """How to compress. `span` columns of a row share a scale (0: all, with one plane).

    Matrices whose whole name matches a pattern in `keep` are left at 8 bits. Without a text for `calibration`
    that of the package is read. With `size_bytes` more are left so, chosen by what they lose (budget.py), as
    long as the file is no larger.
    """

    method: Method = "gptq"
    span: int = 128
    planes: int = 1
    rotate: bool = False
    keep: tuple[str, ...] = ()
    head: str = "int8"
    calibration: str | None = None
    memory_bytes: int = 4 << 30
    size_bytes: int | None = None


class Fitter:
    """Makes the matrices of one model; `model` is what its file will be.

    Raises:
        BadRequest: a pattern names no matrix, or planes or kept matrices lack spans.
        UnsupportedModel: the model's widths have no rotation.
    """

    def __init__(self, model: TernaryModel, options: CompressOptions) -> None:
        self._options = options
        names = [f"blk.{layer}.{name}" for layer in range(model.layers) for name in model.matrices()]
        self._kept = frozenset(name for name in names if any(fnmatchcase(name, p) for p in options.keep))
        for pattern in options.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise BadRequest(f"No matrix matches {pattern}: they are called like {names[-1]}.", "keep")
        if not options.span and (options.planes > 1 or options.keep or options.size_bytes):
            raise BadRequest("Planes and kept matrices want scales of groups: add --group 128.", "group")
        block = block_of(model) if options.rotate else 0
        if options.rotate and not block:
            raise UnsupportedModel("The model's widths are not multiples of 16, so it has no rotated basis.")
        self.model = replace(
            model,
            scale_columns=options.span,
            weight_planes=options.planes,
            kept=frozenset(f"{name}.weight" for name in self._kept),
            rotation_block=block,
            rotated=ROTATED if block else (),
        )
        self.signs = {name: signs_of(length) for name, length in self.model.rotations().items()}

    def by_inputs(self, layer: int, name: str, weights: np.ndarray, hessian: np.ndarray) -> TernaryMatrix:
        """A matrix for inputs with that damped H."""
        if f"blk.{layer}.{name}" in self._kept:
            return self._at_8_bits(name, weights)
        basis = self._basis(name)
        if basis is not None:
            weights, hessian = basis.into(weights), basis.statistics(hessian)
        found = compressed(weights, hessian, self._options.planes, self._span(weights))
        return replace(found, basis=basis)

    def by_itself(self, layer: int, name: str, weights: np.ndarray) -> TernaryMatrix:
        """A matrix without regard to its inputs."""
        if f"blk.{layer}.{name}" in self._kept:
            return self._at_8_bits(name, weights)
        basis = self._basis(name)
        scales = mean_magnitudes if self._options.method == "absmean" else None
        turned = weights if basis is None else basis.into(weights)
        return replace(fitted(turned, self._options.planes, self._span(weights), scales), basis=basis)

    def _at_8_bits(self, name: str, weights: np.ndarray) -> TernaryMatrix:
        basis = self._basis(name)
        return replace(
            kept(weights if basis is None else basis.into(weights), self._options.span), basis=basis
        )

    def _basis(self, name: str) -> Basis | None:
        if not self.model.rotated:
            return None
        return Basis(self.signs[f"rotation_{INPUTS[name]}.signs"], self.model.rotation_block)

    def _span(self, weights: np.ndarray) -> int:
        return self._options.span or weights.shape[1]
