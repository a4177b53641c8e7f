// Common part of the prefill kernels: the (token, slot) pairs that a threadgroup owns, and the product of its tile.
// A threadgroup has 128 threads, four simdgroups of 16 x 16 outputs in each of two 32 x 32 halves.
// Tiles are float32: a weight, scale * (q - 8), has more bits than bfloat16 and is not rounded.
#ifndef UNROLL
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

constant constexpr int GROUP = 32;
constant constexpr int TILE = 32;          // pairs, and columns of one half
constant constexpr int ROW = GROUP + 4;    // floats from one tile row to the next: rows start in different banks

struct PairTile {
  int expert;  // of all its pairs; NONE when the grid has more threadgroups than there are tiles
  int first;   // in the order sorted by expert
  int pairs;   // 1..TILE
};
constant constexpr int NONE = -1;

// Tile number `want` when every expert's pairs offsets[e]..offsets[e + 1] are cut into tiles. 32 experts a step; all
// simdgroups find the same answer. Offsets is a template because MLX places an input of few elements in `constant`.
template <int E, typename Offsets>
METAL_FUNC PairTile find_tile(Offsets offsets, int want, uint lane) {
  for (int base = 0; base < E; base += 32) {
    const int expert = base + int(lane);
    const int begin = expert < E ? offsets[expert] : 0;
    const int end = expert < E ? offsets[expert + 1] : 0;
    const int tiles = (end - begin + TILE - 1) / TILE;
    const int upto = simd_prefix_inclusive_sum(tiles);
    const int total = simd_shuffle(upto, ushort(31));
    if (want < total) {
      const ushort owner = ushort(simd_sum(upto <= want ? 1 : 0));
      PairTile tile;
      tile.expert = base + int(owner);
      tile.first = simd_shuffle(begin, owner) + (want - simd_shuffle(upto - tiles, owner)) * TILE;
      tile.pairs = metal::min(TILE, simd_shuffle(end, owner) - tile.first);
      return tile;
    }
    want -= total;
  }
  PairTile none;
  none.expert = NONE;
  none.first = 0;
  none.pairs = 0;
  return none;
}

// Half a group of one weight row into threadgroup memory.
METAL_FUNC void unpack_half_group(uint2 codes, float scale, threadgroup float* out) {
  UNROLL
  for (int i = 0; i < 8; i++) {
    out[i] = scale * (float((codes.x >> (4 * i)) & 15u) - 8.0f);
    out[8 + i] = scale * (float((codes.y >> (4 * i)) & 15u) - 8.0f);
  }
}

// acc += rows r0..r0+15 of x times rows c0..c0+15 of w, transposed, over one group of inputs.
METAL_FUNC void multiply_group(
    const threadgroup float* x, const threadgroup float* w, int r0, int c0,
    thread simdgroup_matrix<float, 8, 8>* acc) {
  UNROLL
  for (int k = 0; k < GROUP; k += 8) {
    simdgroup_matrix<float, 8, 8> rows[2];
    simdgroup_matrix<float, 8, 8> columns[2];
    UNROLL
    for (int i = 0; i < 2; i++) {
      simdgroup_load(rows[i], x + (r0 + i * 8) * ROW + k, ROW);
      simdgroup_load(columns[i], w + (c0 + i * 8) * ROW + k, ROW, ulong2(0), true);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
      simdgroup_multiply_accumulate(acc[i], rows[i / 2], columns[i % 2], acc[i]);
    }
  }
}

// One half of the tile's outputs into threadgroup memory.
METAL_FUNC void store_half(const thread simdgroup_matrix<float, 8, 8>* acc, int r0, int c0, threadgroup float* out) {
  UNROLL
  for (int i = 0; i < 4; i++) {
    simdgroup_store(acc[i], out + (r0 + i / 2 * 8) * ROW + c0 + i % 2 * 8, ROW);
  }
}
