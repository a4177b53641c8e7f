"""Program that loads one stage in float32 and prints its memory as JSON.

python -m tests.stage.measure_loading MODEL_FOLDER FIRST_LAYER END_LAYER [DENSE_BITS]
"""

import sys
from pathlib import Path

import mlx.core as mx
import msgspec

from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.stage.host import peak_resident_bytes
from mlx_k2.stage.loading import load_stage_model
from tests.model.chain import open_shards
from tests.model.checkpoints import read_config


class LoadingMemory(msgspec.Struct):
    """Output of this program, in bytes.

    ``pieces`` are the sizes of the loaded pieces: layers, embedding and head. ``held`` and ``peak`` are MLX's memory
    after and while loading. ``peak_resident`` is the peak resident memory of the process.
    """

    pieces: list[int]
    held: int
    peak: int
    peak_resident: int


def main() -> None:
    """Load the stage and print its memory."""
    folder, layers = Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3]))
    dense_bits = int(sys.argv[4]) if len(sys.argv) > 4 else None
    config = read_config(folder)
    cache = LatentCache(len(layers), num_slots=1, context_tokens=256, row_dim=config.cache_row_dim, dtype=mx.float32)
    pieces: list[int] = []
    model = load_stage_model(
        config, open_shards(folder, config), layers, cache, lambda piece: pieces.append(piece.held_bytes), dense_bits
    )
    memory = LoadingMemory(pieces, mx.get_active_memory(), mx.get_peak_memory(), peak_resident_bytes())
    del model  # not freed earlier, so that its memory is counted
    sys.stdout.buffer.write(msgspec.json.encode(memory))


if __name__ == "__main__":
    main()
