// y[m, n] = sum over slots, in their order, of parts[m, slot, n]
// grid (N, M, 1), threadgroup (32, 1, 1): a thread owns one output.
// Template: T, N, TOPK. N % 32 == 0.
const uint column = thread_position_in_grid.x;
const size_t token = thread_position_in_grid.y;
float total = 0.0f;
for (int slot = 0; slot < TOPK; slot++) {
  total += parts[(token * TOPK + slot) * N + column];
}
y[token * N + column] = T(total);
