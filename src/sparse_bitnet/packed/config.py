"""The ``quantization_config`` of a packed model in ``config.json``.

    {"quant_method": "sparse_bitnet", "format_version": 1, "storage": "two-bit",
     "modules": {"model.layers.0.self_attn.q_proj": {"pattern": "6:8", "activation_bits": 8}, …}}

A module with several matrices fused into its rows also has ``segments``, the rows of each. A model
with an int8 head also has ``"int8": ["model.embed_tokens", "lm_head"]``, the modules that are int8,
and format version 2, so that older readers say what they lack.

transformers without this package skips a ``quant_method`` that it does not know, finds that no
linear weight has the shape it expects, and refuses with "look at the above report", a table of
tensor names. So every packed file has an empty tensor whose name says what to install.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_bitnet.core import PackedFormatError, Pattern, PatternError
from sparse_bitnet.formats import STORAGES
from sparse_bitnet.nn.packed_module import PackedSpec

QUANT_METHOD = "sparse_bitnet"
FORMAT_VERSION = 2
WITHOUT_INT8 = 1  # the version that is written where nothing needs a newer one
HINT = "to load this model: pip install sparse-bitnet, then import sparse_bitnet"
FIELDS = {"quant_method", "format_version", "storage", "modules", "int8"}
MODULE_FIELDS = {"pattern", "activation_bits", "segments"}


class SparseBitNetConfig(QuantizationConfigMixin):
    """The quantization configuration of a packed model.

    Args:
        modules: module name → its pattern, activation bits and shard sizes, as in ``config.json``.
        storage: how the bytes of all of them are stored.
        format_version: of the directory.
        int8: names of the embedding and head that are int8, if they are.

    Raises:
        PackedFormatError: if a field is missing, unknown or out of range, or if a newer version of
            this package wrote it.
    """

    def __init__(
        self,
        modules: object = None,
        storage: object = None,
        format_version: object = None,
        int8: object = (),
        quant_method: object = QUANT_METHOD,
        **unknown: object,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise _wrong("quant_method", quant_method, f"it should be {QUANT_METHOD!r}")
        if type(format_version) is not int or format_version < 1:
            raise _wrong("format_version", format_version, "it should be a positive integer")
        if format_version > FORMAT_VERSION:
            raise PackedFormatError(
                f"config.json: this model has format version {format_version}, and this "
                f"sparse-bitnet reads versions up to {FORMAT_VERSION}; "
                "run: pip install --upgrade sparse-bitnet"
            )
        if unknown:
            raise _wrong(", ".join(sorted(unknown)), "present", f"only {sorted(FIELDS)} are known")
        if storage not in list(STORAGES):
            raise _wrong("storage", storage, f"it should be among {sorted(STORAGES)}")
        if not isinstance(modules, dict) or not modules:
            raise _wrong("modules", modules, "it should name the packed modules")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' enum is closed
        self.format_version = format_version
        self.storage = storage
        self.modules: dict[str, dict[str, Any]] = modules
        if not isinstance(int8, list | tuple) or not all(isinstance(name, str) for name in int8):
            raise _wrong("int8", int8, "it should be a list of module names")
        self.int8 = list(int8)
        self.specs()

    @classmethod
    def of(cls, specs: dict[str, PackedSpec], int8: list[str]) -> SparseBitNetConfig:
        """The configuration of modules that all have the same storage, and of an int8 head."""
        (name,) = {spec.storage for spec in specs.values()}
        version = FORMAT_VERSION if int8 else WITHOUT_INT8
        return cls({key: _to_json(spec) for key, spec in specs.items()}, name, version, int8)

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it: ``int8`` only where something is."""
        fields = super().to_dict()
        return fields if self.int8 else {k: v for k, v in fields.items() if k != "int8"}

    def specs(self) -> dict[str, PackedSpec]:
        """Module name → what its packed form has to know."""
        return {name: self._spec(name, value) for name, value in self.modules.items()}

    def _spec(self, name: str, value: object) -> PackedSpec:
        where = f"modules[{name!r}]"
        if not isinstance(value, dict) or not {"pattern"} <= value.keys() <= MODULE_FIELDS:
            raise _wrong(where, value, f"it should have fields among {sorted(MODULE_FIELDS)}")
        try:
            pattern = Pattern.parse(str(value["pattern"]))
        except PatternError as error:
            raise _wrong(where, value["pattern"], str(error)) from None
        bits = value.get("activation_bits", 8)
        if bits not in (8, 4):
            raise _wrong(f"{where}.activation_bits", bits, "it should be 8 or 4")
        shard_sizes = value.get("segments", [])
        if not isinstance(shard_sizes, list) or not all(
            type(rows) is int and rows > 0 for rows in shard_sizes
        ):
            raise _wrong(f"{where}.segments", shard_sizes, "it should be a list of row counts")
        return PackedSpec(self.storage, pattern, bits, tuple(shard_sizes))  # type: ignore[arg-type]


def _to_json(spec: PackedSpec) -> dict[str, Any]:
    value: dict[str, Any] = {
        "pattern": str(spec.pattern),
        "activation_bits": spec.activation_bits,
    }
    return value | ({"segments": list(spec.shard_sizes)} if spec.shard_sizes else {})


def _wrong(field: str, value: object, expected: str) -> PackedFormatError:
    return PackedFormatError(
        f"config.json: quantization_config.{field} is {str(value)[:200]}; {expected}. The file was "
        "edited or damaged: get it again, or pack the model again"
    )
