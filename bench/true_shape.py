"""Run of Kimi K2's true widths on two local stages: hidden 7168, 64 heads, experts of 2048; 5 layers, 16 experts.

python -m bench.true_shape FOLDER

The script writes the checkpoint (4.3 GB) to FOLDER if FOLDER does not exist, runs `mlx-k2 generate --json` on two
stages, and prints load time, rates, and each stage's held and peak bytes and share of the computing time. mlx-k2
computes in float32 on a CPU, and in bfloat16 on a GPU.
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
PROMPT = "Hello Kimi"  # ten tokens: a token is a byte here, and --raw adds no chat template
NUM_TOKENS = 8


def main() -> None:
    """Write the checkpoint if it does not exist, run mlx-k2, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkpoint, written if it does not exist")
    folder = parser.parse_args().folder
    if not folder.exists():
        started_at = time.monotonic()
        write_checkpoint(folder)
        print(f"written in {time.monotonic() - started_at:.0f} s")
    command = [str(Path(sys.executable).with_name("mlx-k2")), "generate", PROMPT, "--raw", "--model", str(folder)]
    command += ["--json", "--stages", "2", "--max-tokens", str(NUM_TOKENS), "--seed", "1", "--context", "4096"]
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
            f"holds {stage['held_bytes'] / 1e9:.2f} GB, peak {stage['peak_bytes'] / 1e9:.2f} GB, "
            f"{stage['busy_fraction']:.0%} of the computing time of all stages"
        )


def write_checkpoint(folder: Path) -> None:
    """Write a random checkpoint with K2's widths."""
    fields = thinking_config_fields(num_hidden_layers=NUM_LAYERS, n_routed_experts=NUM_EXPERTS, vocab_size=VOCAB_SIZE)
    vocabulary = tiny_vocabulary(VOCAB_SIZE, fields["max_position_embeddings"])
    fields |= {"bos_token_id": vocabulary.bos_token_id, "eos_token_id": vocabulary.eos_token_id}
    write_random_checkpoint(folder, fields, seed=1, tokenizer_files=vocabulary.files)


if __name__ == "__main__":
    main()
