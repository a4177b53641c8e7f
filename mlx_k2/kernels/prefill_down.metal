// parts[order[p], n] = expert_weights[order[p]] * (hidden[p] . down[e, n]) for pairs p sorted by expert
// grid (ceil(N / 64) * 128, tiles, 1), threadgroup (128, 1, 1); threadgroups without a tile return.
// A threadgroup owns up to 32 pairs of one expert and 64 columns, a left and a right half; columns from N on are not
// stored. The parts of a token are then summed by prefill_combine, in the order of its slots.
// Template: T, K inputs, N columns, E experts. K % 32 == 0, N % 32 == 0.
const uint lane = thread_index_in_simdgroup;
const int thread_id = int(thread_index_in_threadgroup);
const int column0 = int(threadgroup_position_in_grid.x) * 2 * TILE;
threadgroup float x_tile[TILE * ROW];  // at the end, outputs
threadgroup float w_tile[2 * TILE * ROW];
const PairTile tile = find_tile<E>(offsets, int(threadgroup_position_in_grid.y), lane);
if (tile.expert == NONE) {
  return;
}

constexpr int GROUPS = K / GROUP;
const int x_row = thread_id / 4;  // a thread copies 8 inputs of one pair ...
const int x_column = thread_id % 4 * 8;
const device T* inputs = hidden + (x_row < tile.pairs ? size_t(tile.first + x_row) * K : 0) + x_column;
const int w_row = thread_id / 2;  // ... and unpacks half a group of one row
const int w_half = thread_id % 2;
const int column = column0 + w_row < N ? column0 + w_row : 0;
const size_t first = (size_t(tile.expert) * N + column) * GROUPS;
const device uint2* codes = (const device uint2*)down_packed + first * 2 + w_half;
const device T* scales = down_scale + first;
threadgroup float* w_out = w_tile + w_row * ROW + w_half * 16;
const int r0 = int(simdgroup_index_in_threadgroup) / 2 * 16;
const int c0 = int(simdgroup_index_in_threadgroup) % 2 * 16;

simdgroup_matrix<float, 8, 8> left[4];
simdgroup_matrix<float, 8, 8> right[4];
UNROLL
for (int i = 0; i < 4; i++) {
  left[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  right[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
for (int g = 0; g < GROUPS; g++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int i = 0; i < 8; i++) {
    x_tile[x_row * ROW + x_column + i] = x_row < tile.pairs ? float(inputs[g * GROUP + i]) : 0.0f;
  }
  unpack_half_group(codes[g * 2], float(scales[g]), w_out);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  multiply_group(x_tile, w_tile, r0, c0, left);
  multiply_group(x_tile, w_tile + TILE * ROW, r0, c0, right);
}
for (int half_index = 0; half_index < 2; half_index++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (half_index == 0) {
    store_half(left, r0, c0, x_tile);
  } else {
    store_half(right, r0, c0, x_tile);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int out_column = column0 + half_index * TILE + thread_id % TILE;
  for (int i = thread_id; i < TILE * TILE; i += 128) {
    if (i / TILE < tile.pairs && out_column < N) {
      const size_t pair = order[tile.first + i / TILE];
      parts[pair * N + out_column] = expert_weights[pair] * x_tile[i / TILE * ROW + i % TILE];
    }
  }
}
