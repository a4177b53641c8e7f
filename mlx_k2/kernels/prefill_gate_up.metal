// hidden[p, n] = silu(x[t] . gate[e, n]) * (x[t] . up[e, n]) for pairs p sorted by expert; t = order[p] / TOPK
// grid (N / 32 * 128, tiles, 1), threadgroup (128, 1, 1); threadgroups without a tile return.
// A threadgroup owns up to 32 pairs of one expert and 32 columns, of gate (left half) and of up (right half).
// Template: T, K inputs, N columns, E experts, TOPK. K % 32 == 0, N % 32 == 0.
const uint lane = thread_index_in_simdgroup;
const int thread_id = int(thread_index_in_threadgroup);
const int column0 = int(threadgroup_position_in_grid.x) * TILE;
threadgroup float x_tile[TILE * ROW];  // at the end, outputs
threadgroup float gate_tile[TILE * ROW];
threadgroup float up_tile[TILE * ROW];
const PairTile tile = find_tile<E>(offsets, int(threadgroup_position_in_grid.y), lane);
if (tile.expert == NONE) {
  return;
}

constexpr int GROUPS = K / GROUP;
const int x_row = thread_id / 4;  // a thread copies 8 inputs of one pair ...
const int x_column = thread_id % 4 * 8;
const device T* inputs = x + (x_row < tile.pairs ? size_t(order[tile.first + x_row] / TOPK) * K : 0) + x_column;
const int w_row = thread_id / 2 % TILE;  // ... and unpacks half a group of one row of gate or of up
const int w_half = thread_id % 2;
const bool is_up = thread_id >= 64;
const size_t first = (size_t(tile.expert) * N + column0 + w_row) * GROUPS;
const device uint2* codes = (const device uint2*)(is_up ? up_packed : gate_packed) + first * 2 + w_half;
const device T* scales = (is_up ? up_scale : gate_scale) + first;
threadgroup float* w_out = (is_up ? up_tile : gate_tile) + w_row * ROW + w_half * 16;
const int r0 = int(simdgroup_index_in_threadgroup) / 2 * 16;
const int c0 = int(simdgroup_index_in_threadgroup) % 2 * 16;

simdgroup_matrix<float, 8, 8> gate[4];
simdgroup_matrix<float, 8, 8> up[4];
UNROLL
for (int i = 0; i < 4; i++) {
  gate[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  up[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
for (int g = 0; g < GROUPS; g++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int i = 0; i < 8; i++) {
    x_tile[x_row * ROW + x_column + i] = x_row < tile.pairs ? float(inputs[g * GROUP + i]) : 0.0f;
  }
  unpack_half_group(codes[g * 2], float(scales[g]), w_out);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  multiply_group(x_tile, gate_tile, r0, c0, gate);
  multiply_group(x_tile, up_tile, r0, c0, up);
}
UNROLL
for (int i = 0; i < 4; i++) {  // element by element: needs no knowledge of which element a lane holds
  UNROLL
  for (int j = 0; j < 2; j++) {
    const float gate_value = gate[i].thread_elements()[j];
    const float up_value = up[i].thread_elements()[j];
    gate[i].thread_elements()[j] = gate_value / (1.0f + metal::exp(-gate_value)) * up_value;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
store_half(gate, r0, c0, x_tile);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_id; i < TILE * TILE; i += 128) {
  if (i / TILE < tile.pairs) {
    hidden[size_t(tile.first + i / TILE) * N + column0 + i % TILE] = T(x_tile[i / TILE * ROW + i % TILE]);
  }
}
