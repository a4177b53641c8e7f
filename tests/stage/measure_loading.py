"""A program that loads one stage in float32 and prints its held bytes and its peak memory as JSON.

python -m tests.stage.measure_loading MODEL_FOLDER FIRST_LAYER END_LAYER [DENSE_BITS]
"""

import json
import sys
from pathlib import Path

import mlx.core as mx

from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.stage.host import peak_resident_bytes
from mlx_k2.stage.loading import load_stage_model
from tests.model.chain import open_shards
from tests.model.checkpoints import read_config


def main() -> None:
    """Load the stage and print the measurements."""
    folder, layers = Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3]))
    dense_bits = int(sys.argv[4]) if len(sys.argv) > 4 else None
    config = read_config(folder)
    cache = LatentCache(len(layers), 1, 256, config.cache_row_dim, mx.float32)
    pieces: list[int] = []
    model = load_stage_model(
        config, open_shards(folder, config), layers, cache, lambda piece: pieces.append(piece.held_bytes), dense_bits
    )
    measured = {
        "pieces": pieces,
        "held": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
        "rss": peak_resident_bytes(),
    }
    del model  # kept until here, so that its memory is counted
    sys.stdout.write(json.dumps(measured))


if __name__ == "__main__":
    main()
