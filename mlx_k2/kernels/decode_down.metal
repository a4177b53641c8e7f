// y[m, n] = sum over slots, in their order, of expert_weights[m, slot] * (hidden[m, slot] . down[e, n])
// grid (32, TOPK, M * N / R), threadgroup (32, TOPK, 1).
// A threadgroup owns R rows of one token, a simdgroup the part of one slot: the experts' outputs are summed in
// threadgroup memory and never stored in device memory.
// Template: T, K inputs, N rows, TOPK, R. K % 32 == 0, N % R == 0, R <= 32.
const uint lane = thread_index_in_simdgroup;
const uint slot = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.z / (N / R);
const uint row = (threadgroup_position_in_grid.z % (N / R)) * R;
threadgroup float parts[TOPK * R];
const uint pair = token * TOPK + slot;
const size_t expert = expert_ids[pair];
constexpr int GROUPS = K / GROUP;
const size_t first = (expert * N + row) * GROUPS;
const device uint4* codes = (const device uint4*)down_packed + first;
const device T* scales = down_scale + first;
const device T* inputs = hidden + size_t(pair) * K;
float acc[R];
UNROLL
for (int r = 0; r < R; r++) {
  acc[r] = 0.0f;
}
float scaled[GROUP];
for (int g = int(lane); g < GROUPS; g += 32) {
  float sum = load_group(inputs + g * GROUP, scaled);
  UNROLL
  for (int r = 0; r < R; r++) {
    acc[r] = add_group(codes[r * GROUPS + g], float(scales[r * GROUPS + g]), scaled, sum, acc[r]);
  }
}
const float weight = expert_weights[pair];
UNROLL
for (int r = 0; r < R; r++) {
  float sum = simd_sum(acc[r]);
  if (lane == 0) {
    parts[slot * R + r] = weight * sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (slot == 0 && lane < R) {
  float total = 0.0f;
  for (int i = 0; i < TOPK; i++) {
    total += parts[i * R + lane];
  }
  y[size_t(token) * N + row + lane] = T(total);
}
