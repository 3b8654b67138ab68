"""The forms by their names: those of pairs, and with `@` and the name of a quantization their quantized ones."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from compressor.forms.channel import CHANNEL
from compressor.forms.grouped import GROUPED
from compressor.forms.initial import INITIAL, InitialForm
from compressor.forms.names import pair_name, quantization_of
from compressor.forms.pair_form import PairForm
from compressor.forms.pivoted import PIVOTED
from compressor.forms.plain import PLAIN
from compressor.forms.quantized import QuantizedDense, QuantizedPair
from compressor.forms.spatial import SPATIAL

# What a plan says of a layer that stays as it is.
DENSE = "dense"
_INITIAL = "initial+"


class Forms(MutableMapping[str, PairForm]):
    """Forms by name. Iterated over are those that are not quantized; quantized ones are found by their names.

    `plain@4g128` is a plain pair in 4 bits, `dense@4g128` a layer's own matrix, `initial+dense@4g128` what training
    wrote of it.
    """

    def __init__(self, *forms: PairForm) -> None:
        self._forms = {form.name: form for form in forms}
        self._quantized: dict[str, PairForm] = {}

    def __getitem__(self, name: str) -> PairForm:
        if name in self._forms or "@" not in name:
            return self._forms[name]
        if name not in self._quantized:
            self._quantized[name] = self._found(name)
        return self._quantized[name]

    def _found(self, name: str) -> PairForm:
        try:
            quantization = quantization_of(name)
        except ValueError:
            raise KeyError(name) from None
        assert quantization is not None
        pair = pair_name(name)
        if pair.startswith(_INITIAL):
            return InitialForm.of(self[name.removeprefix(_INITIAL)])
        return QuantizedDense.of(quantization) if pair == DENSE else QuantizedPair.of(self._forms[pair], quantization)

    def __setitem__(self, name: str, form: PairForm) -> None:
        self._forms[name] = form

    def __delitem__(self, name: str) -> None:
        del self._forms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)


# Of two that are as small as each other the planner takes the first.
FORMS = Forms(PLAIN, PIVOTED, CHANNEL, SPATIAL, GROUPED, *INITIAL)
