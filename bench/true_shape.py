"""Kimi K2's true widths on two local stages: hidden 7168, 64 heads, experts of 2048, but 5 layers and 16 experts.

python -m bench.true_shape FOLDER

Writes the checkpoint (4.3 GB) to FOLDER if it does not exist, runs `mlx-k2 generate --json` on two stages in float32,
and prints load time, rates, and for each stage the held bytes and the peak bytes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.weights.known_layout import thinking_config_fields

NUM_LAYERS = 5
NUM_EXPERTS = 16
VOCAB_SIZE = 20480
PROMPT = "Hello Kimi"  # ten tokens of this vocabulary, sent --raw
TOKENS = 8


def main() -> None:
    """Write the checkpoint if it does not exist, run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or is written")
    folder = parser.parse_args().folder
    if not folder.exists():
        began = time.monotonic()
        write(folder)
        print(f"written in {time.monotonic() - began:.0f} s")
    command = [str(Path(sys.executable).with_name("mlx-k2")), "generate", PROMPT, "--raw", "--model", str(folder)]
    command += ["--json", "--stages", "2", "--max-tokens", str(TOKENS), "--seed", "1", "--context", "4096"]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    summary = json.loads(lines[-1])["summary"]
    usage = summary["usage"]
    print(f"{usage['prompt_tokens']} + {usage['generated_tokens']} tokens, loaded in {summary['load_s']:.1f} s")
    print(
        f"prefill {usage['prefill_tokens_per_s']:.2f} tok/s, decode {usage['decode_tokens_per_s']:.2f} tok/s, "
        f"{1000 / usage['decode_tokens_per_s']:.0f} ms a token"
    )
    for number, stage in enumerate(summary["stages"]):
        print(
            f"stage {number}: layers {stage['first_layer']}-{stage['last_layer']}, "
            f"holds {stage['held_bytes'] / 1e9:.2f} GB, took at most {stage['peak_bytes'] / 1e9:.2f} GB, "
            f"{100 * stage['busy_fraction']:.0f}% of the computing"
        )


def write(folder: Path) -> None:
    """Write the random checkpoint of that shape."""
    fields = thinking_config_fields(num_hidden_layers=NUM_LAYERS, n_routed_experts=NUM_EXPERTS, vocab_size=VOCAB_SIZE)
    vocabulary = tiny_vocabulary(VOCAB_SIZE, fields["max_position_embeddings"])
    fields |= {"bos_token_id": vocabulary.bos_token_id, "eos_token_id": vocabulary.eos_token_id}
    write_random_checkpoint(folder, fields, seed=1, tokenizer_files=vocabulary.files)


if __name__ == "__main__":
    main()
