"""A model file cut into shards, as the hub has large ones."""

import os
from pathlib import Path

import numpy as np
from gguf import GGUFWriter


def write_shards(header, folder: Path) -> Path:
    """Write a model as two shards; gives the path of the first."""
    half = len(header.tensors) // 2
    paths = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, tensors in enumerate((header.tensors[:half], header.tensors[half:])):
        writer = GGUFWriter(paths[number], header.architecture)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(header.tensors))
        writer.add_uint32("llama.block_count", header.layers)
        for tensor in tensors:
            with tensor.path.open("rb") as file:
                data = os.pread(file.fileno(), tensor.nbytes, tensor.offset)
            rows = np.frombuffer(data, np.uint8).reshape(*tensor.shape[:0:-1], -1)
            writer.add_tensor(tensor.name, rows, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]
