"""A deeper model from a given one: its layers several times over, real weights and vocabulary.

It says nothing sensible, but a token takes as long as one of a model that large: for measuring what stages
cost with models that need them.
"""

from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

LAYER = "blk."


def deepen(source: Path, target: Path, times: int) -> None:
    """Write a GGUF with the layers of `source` `times` over, each time in order."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    count_key = f"{architecture}.block_count"
    layers = int(reader.fields[count_key].contents())
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers * times if name == count_key else field.contents()
        is_array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        for name in _names(tensor.name, layers, times):
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(name: str, layers: int, times: int) -> list[str]:
    if not name.startswith(LAYER):
        return [name]
    number, _, rest = name.removeprefix(LAYER).partition(".")
    return [f"{LAYER}{int(number) + layers * time}.{rest}" for time in range(times)]
