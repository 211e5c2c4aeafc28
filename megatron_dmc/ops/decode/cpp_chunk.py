"""The C++ of the cache on a CPU: many new tokens of each sequence. See cpp_source.py.

A row takes its tokens in one after another, as in decoding, and notes what each of them leaves: the ring's next token, its own
view of the open slot, and when a slot became full. Then its queries see all of these, part by part and each key from one
token until another, by products of small matrices in registers. So a prompt costs what is kept of it, not what it was.
"""

CHUNK = r"""
// Many tokens of each sequence.

// Slots that tokens of a chunk's queries see: token i of it sees a key from token ``from`` until before token ``until``.
constexpr int64_t QUERIES = 64, AT_ONCE = 4;
// Channels are filled up with zeros to a multiple of it.
constexpr int64_t PADDED = 16;

struct Key {
  const void* slot;
  int32_t from, until;
  float bias;
};

// What one row's chunk has left for its queries.
template <typename T>
struct Chunk {
  Row row;
  int64_t start, count;                     // of its tokens
  int64_t held, last;                       // in the ring before; of the kept slots as many are seen
  std::vector<T> window, own;               // [held + count, 2 d] rotated, and [count, 2 d]
  std::vector<char> own_codes;              // or [count, slot_bytes]
  std::vector<float> biases;                // [count] of ``own``
  std::vector<int32_t> appeared;            // from which token on a kept slot is seen, of the last ones

  const T* at(const std::vector<T>& of, int64_t i, int64_t d) const { return of.data() + i * 2 * d; }
};

template <typename T>
void take_chunk(const Step& s, int64_t row, Chunk<T>& chunk) {
  const int64_t d = s.head_dim, sequence = row / s.kv_heads;
  const Row& r = chunk.row = row_of(s, row);
  chunk.start = whole(s.starts, INT64, sequence);
  chunk.count = whole(s.counts, INT64, sequence);
  const int64_t before = whole(s.tokens, s.tokens_type, sequence) - chunk.count;
  chunk.held = std::min(before, s.window);
  chunk.last = 0;
  if (chunk.count <= 0) return;
  if (s.window) chunk.window.resize((chunk.held + chunk.count) * 2 * d);
  const auto keep = [&](int64_t at) {
    const T* slot = near_at<T>(s, r, (before - chunk.held + at) % s.window);
    T* to = chunk.window.data() + at * 2 * d;
    if (!slot) std::fill_n(to, 2 * d, T{});
    else std::copy_n(slot, 2 * d, to);
  };
  for (int64_t i = 0; i < chunk.held; ++i) keep(i);
  const bool sees_own = s.merges || s.absorbs, own_is_coded = s.code && s.merges;
  if (sees_own) {
    if (own_is_coded) chunk.own_codes.resize(chunk.count * s.slot_bytes);
    else chunk.own.resize(chunk.count * 2 * d);
    chunk.biases.assign(chunk.count, LOWEST);
  }
  const int64_t kept = count_of(s, r, before);
  Taken taken;
  for (int64_t i = 0; i < chunk.count; ++i) {
    advance<T>(s, r, chunk.start + i, before + i + 1, taken);
    if (s.window) keep(chunk.held + i);
    if (taken.appends) chunk.appeared.push_back(int32_t(i));
    if (!taken.leaves || !sees_own) continue;
    if (own_is_coded) {
      encode(s, taken.seen, taken.seen + d, reinterpret_cast<uint8_t*>(chunk.own_codes.data()) + i * s.slot_bytes);
    } else {
      T* own = chunk.own.data() + i * 2 * d;
      for (int64_t c = 0; c < 2 * d; ++c) narrow(taken.seen[c], own + c);
    }
    if (s.merges) chunk.biases[i] = 0;
    else if (taken.mass > 0) chunk.biases[i] = std::log2(std::max(taken.mass, LEAST_MASS));
  }
  // A slot that is merged into is seen by way of ``own``, until another one is opened.
  const int64_t open = s.merges;
  if (s.merges && kept == 0 && !chunk.appeared.empty()) chunk.appeared.erase(chunk.appeared.begin());
  chunk.last = std::max<int64_t>(taken.count - open, 0);
}

// Keys, 16 or 64 of them: transposed, so that a vector of scores is a sum over channels; then values.
template <int SIZE>
struct Tile {
  alignas(64) float keys[MOST * SIZE];
  alignas(64) float values[SIZE * MOST];
  alignas(64) float biases[SIZE];
  alignas(64) int32_t from[SIZE], until[SIZE];
  int32_t earliest, latest, last_from, first_until;

  // coded: slots are codes; otherwise they are T [2 d].
  template <typename T>
  void fill(const Step& s, bool coded, const Key* found, int64_t n, int64_t padded) {
    const int64_t d = s.head_dim;
    earliest = first_until = INT32_MAX;
    latest = last_from = INT32_MIN;
    for (int64_t j = 0; j < SIZE; ++j) {
      const bool exists = j < n && found[j].slot;
      biases[j] = exists ? found[j].bias : LOWEST;
      from[j] = exists ? found[j].from : 0;
      until[j] = exists ? found[j].until : INT32_MAX;
      if (exists) {
        earliest = std::min(earliest, from[j]), latest = std::max(latest, until[j]);
        last_from = std::max(last_from, from[j]), first_until = std::min(first_until, until[j]);
      }
      float both[2 * MOST];
      if (!exists) std::fill_n(both, 2 * d, 0.0f);
      else if (coded) decode(s, reinterpret_cast<const uint8_t*>(found[j].slot), both);
      else fetch<T>(s, reinterpret_cast<const T*>(found[j].slot), both);
      for (int64_t c = 0; c < d; ++c) keys[c * SIZE + j] = both[c];
      for (int64_t c = 0; c < d; ++c) values[j * padded + c] = both[d + c];
      for (int64_t c = d; c < padded; ++c) values[j * padded + c] = 0;
    }
  }
};

// Queries of a part of a chunk, with what they have seen so far.
struct Queries {
  int64_t count, group, padded;  // of tokens times group
  std::vector<float> query, turned, part, highest, total;  // turned: as codes need them
  int32_t first;  // token

  int32_t token(int64_t q) const { return first + int32_t(q / group); }
};

// AT_ONCE queries from q on see a tile; D: padded where the compiler is to know it, 0: it is not.
template <int SIZE, int D>
void see(const Tile<SIZE>& tile, const std::vector<float>& given, Queries& queries, int64_t q, int64_t d) {
  constexpr int N = AT_ONCE, W = SIZE / LANES, B = W < SUMS ? W : SUMS;
  const int64_t padded = D ? D : queries.padded;
  lanes scores[N][W];
  const float* query = given.data() + q * padded;
  for (int first = 0; first < W; first += B) {
    lanes sum[N][B];
    for (int i = 0; i < N; ++i)
      for (int b = 0; b < B; ++b) sum[i][b] = load(tile.biases + (first + b) * LANES);
    for (int64_t c = 0; c < d; ++c)
      for (int b = 0; b < B; ++b) {
        const lanes key = load(tile.keys + c * SIZE + (first + b) * LANES);
        for (int i = 0; i < N; ++i) sum[i][b] += query[i * padded + c] * key;
      }
    for (int i = 0; i < N; ++i)
      for (int b = 0; b < B; ++b) scores[i][first + b] = sum[i][b];
  }
  alignas(64) float weights[N][SIZE];
  float shrinks[N];
  for (int i = 0; i < N; ++i) {
    const int32_t token = queries.token(q + i);
    if (token < tile.last_from || token >= tile.first_until) {
      for (int w = 0; w < W; ++w) {
        whole_lanes from, until;
        std::memcpy(&from, tile.from + w * LANES, sizeof from);
        std::memcpy(&until, tile.until + w * LANES, sizeof until);
        scores[i][w] = (from <= token) & (until > token) ? scores[i][w] : lanes{} + LOWEST;
      }
    }
    lanes most = scores[i][0];
    for (int w = 1; w < W; ++w) most = most > scores[i][w] ? most : scores[i][w];
    alignas(64) float each[LANES];
    store(most, each);
    float highest = queries.highest[q + i];
    for (int64_t l = 0; l < LANES; ++l) highest = std::max(highest, each[l]);
    // Where nothing was seen yet, nothing may get a weight.
    const float base = std::max(highest, LOWEST / 2);
    lanes total{};
    for (int w = 0; w < W; ++w) {
      // What is not seen weighs nothing, however large its value is; NaN stays NaN.
      const lanes weight = scores[i][w] <= LOWEST / 2 ? lanes{} : power(scores[i][w] - base);
      store(weight, weights[i] + w * LANES);
      total += weight;
    }
    shrinks[i] = power(std::max(queries.highest[q + i], LOWEST / 2) - base);
    queries.total[q + i] = queries.total[q + i] * shrinks[i] + sum_of(total);
    queries.highest[q + i] = highest;
  }
  float* part = queries.part.data() + q * padded;
  const auto add = [&](int64_t first, auto vectors) {
    constexpr int M = decltype(vectors)::value;
    lanes sum[N][M];
    for (int i = 0; i < N; ++i)
      for (int m = 0; m < M; ++m) sum[i][m] = load(part + i * padded + first + m * LANES) * shrinks[i];
    for (int64_t j = 0; j < SIZE; ++j)
      for (int m = 0; m < M; ++m) {
        const lanes value = load(tile.values + j * padded + first + m * LANES);
        for (int i = 0; i < N; ++i) sum[i][m] += weights[i][j] * value;
      }
    for (int i = 0; i < N; ++i)
      for (int m = 0; m < M; ++m) store(sum[i][m], part + i * padded + first + m * LANES);
  };
  int64_t c = 0;
  for (; c + SUMS * LANES <= padded; c += SUMS * LANES) add(c, std::integral_constant<int, SUMS>{});
  for (; c < padded; c += LANES) add(c, std::integral_constant<int, 1>{});
}

template <int SIZE, int D>
void see_all(const Tile<SIZE>& tile, const std::vector<float>& given, Queries& queries, int64_t d) {
  const auto none = [&](int64_t first, int64_t last) {
    return queries.token(last) < tile.earliest || queries.token(first) >= tile.latest;
  };
  for (int64_t q = 0; q < queries.count; q += AT_ONCE)
    if (!none(q, q + AT_ONCE - 1)) see<SIZE, D>(tile, given, queries, q, d);
}

template <typename T, int SIZE, int D>
void see_keys(const Step& s, bool coded, const std::vector<Key>& keys, Queries& queries) {
  thread_local Tile<SIZE> tile;
  for (size_t at = 0; at < keys.size(); at += SIZE) {
    tile.template fill<T>(s, coded, keys.data() + at, std::min<int64_t>(keys.size() - at, SIZE), queries.padded);
    see_all<SIZE, D>(tile, coded ? queries.turned : queries.query, queries, s.head_dim);
  }
}

// Some tokens of a chunk, from ``first`` on, of one row.
template <typename T, int D>
void attend_chunk(const Step& s, const Chunk<T>& chunk, int64_t first) {
  const int64_t d = s.head_dim, padded = (d + PADDED - 1) / PADDED * PADDED;
  const int64_t stop = std::min(first + QUERIES, chunk.count);
  thread_local Queries queries;
  const int64_t real = (stop - first) * s.group;
  // Always as many at once, or results would hang on how long a chunk is, by their last bit.
  queries.count = (real + AT_ONCE - 1) / AT_ONCE * AT_ONCE, queries.group = s.group, queries.padded = padded;
  queries.first = int32_t(first);
  queries.query.assign(queries.count * padded, 0);
  queries.part.assign(queries.count * padded, 0);
  queries.highest.assign(queries.count, LOWEST);
  queries.total.assign(queries.count, 0);
  for (int64_t i = first; i < stop; ++i)
    read_queries(s, chunk.row, chunk.start + i, queries.query.data() + (i - first) * s.group * padded, padded);

  if (s.code) queries.turned = queries.query;
  for (int64_t q = 0; q < real && s.code && s.code != FP8; ++q) turn_blocks(queries.turned.data() + q * padded, d);

  thread_local std::vector<Key> keys;
  keys.clear();
  // Slots: those of before, then those that have become full since.
  const int64_t grown = chunk.last - int64_t(chunk.appeared.size());
  for (int64_t k = 0; k < chunk.last; ++k) {
    const int32_t from = k < grown ? 0 : chunk.appeared[k - grown];
    if (from >= stop) break;
    keys.push_back({kept_slot<T>(s, chunk.row, k), from, INT32_MAX, 0});
  }
  see_keys<T, 64, D>(s, s.code, keys, queries);
  keys.clear();
  if (s.window)
    for (int64_t k = std::max<int64_t>(first - s.window + 1 + chunk.held, 0); k < stop + chunk.held; ++k) {
      const int64_t from = k - chunk.held;
      keys.push_back({chunk.at(chunk.window, k, d), int32_t(from), int32_t(from + s.window), 0});
    }
  // By themselves, for the same reason: later tokens of the ring must not move them.
  see_keys<T, 16, D>(s, false, keys, queries);
  keys.clear();
  const bool own_is_coded = s.code && s.merges;
  const auto own = [&](int64_t i) -> const void* {
    if (own_is_coded) return chunk.own_codes.data() + i * s.slot_bytes;
    return chunk.at(chunk.own, i, d);
  };
  if (!chunk.biases.empty())
    for (int64_t i = first; i < stop; ++i)
      if (chunk.biases[i] > LOWEST)
        keys.push_back({own(i), int32_t(i), int32_t(i + 1), chunk.biases[i]});
  see_keys<T, 16, D>(s, own_is_coded, keys, queries);

  for (int64_t q = 0; q < real; ++q) {
    const int64_t head = chunk.row.head * s.group + q % s.group;
    T* out = reinterpret_cast<T*>(s.out) + ((chunk.start + queries.token(q)) * s.kv_heads * s.group + head) * d;
    const float total = queries.total[q];
    for (int64_t c = 0; c < d; ++c) narrow(total == 0 ? 0.0f : queries.part[q * padded + c] / total, out + c);
  }
}

template <typename T>
void take_in(const Step& s) {
  const int64_t rows = s.batch * s.kv_heads, padded = (s.head_dim + PADDED - 1) / PADDED * PADDED;
  std::vector<Chunk<T>> chunks(rows);
  std::vector<std::pair<int64_t, int64_t>> tasks;
  int64_t tokens = 0;
  for (int64_t sequence = 0; sequence < s.batch; ++sequence) tokens += whole(s.counts, INT64, sequence);
  const bool shared = tokens * s.kv_heads * s.group * s.head_dim >= MUCH / 8;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(s.threads)) if (shared)
  for (int64_t row = 0; row < rows; ++row) take_chunk<T>(s, row, chunks[row]);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t first = 0; first < chunks[row].count; first += QUERIES) tasks.push_back({row, first});
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(s.threads)) if (shared)
  for (int64_t t = int64_t(tasks.size()) - 1; t >= 0; --t) {
    const auto& chunk = chunks[tasks[t].first];
    if (padded == 64) attend_chunk<T, 64>(s, chunk, tasks[t].second);
    else if (padded == 128) attend_chunk<T, 128>(s, chunk, tasks[t].second);
    else attend_chunk<T, 0>(s, chunk, tasks[t].second);
  }
}

// How many slots a row will have kept once its chunk has been taken in.
int64_t kept_after(const Step& s, int64_t row) {
  const int64_t sequence = row / s.kv_heads;
  const Row r = row_of(s, row);
  const int64_t start = whole(s.starts, INT64, sequence), count = whole(s.counts, INT64, sequence);
  const int64_t before = whole(s.tokens, s.tokens_type, sequence) - count;
  int64_t kept = count_of(s, r, before);
  for (int64_t i = std::max<int64_t>(before - s.window, 0); i < before + count - s.window; ++i) {
    if (i >= before)
      kept += !s.alpha[(start + i - before) * s.alpha_sequence + r.head * s.alpha_head] || i == 0;
    else
      kept += std::signbit(held(s.decisions, s.decisions_sequence, s.decisions_head, r)[i % s.window]);
  }
  return kept;
}
"""
