"""The C++ of the cache on a CPU: one new token of each sequence. cpp_chunk.py has the rest.

Strings, so that they are modules like others and an exported model can have them. ``cpp.py`` and the C++ both read FIELDS, so
that they cannot part. Numbers are float32 in here, whatever the cache's dtype is; types in memory are told by codes.
"""

from megatron_dmc.ops.decode.cpp_chunk import CHUNK
from megatron_dmc.ops.decode.cpp_codes import CODES

# Of what lies in memory.
TYPES = ("float", "bfloat16", "int32", "int64")
# Of which a step is given the address, how far it is from one sequence and one head to the next, and the type.
GIVEN = (
    "query",
    "key",
    "value",
    "alpha",
    "omega",
    "cos",
    "sin",
    "leaving_cos",
    "leaving_sin",
    "tokens",
    "place",
    "kept",
)
# Of which sequences that have many new tokens are told, int64: each one's first among all new tokens, and how many it has.
SPANS = ("starts", "counts")
HELD = ("table", "sums", "decisions", "recent", "near")
ADDRESSES = ("slots", "out", "granted_place", "granted", "granted_count", "cursor", "overflow")
NUMBERS = (
    *("cells", "pages", "page", "batch", "kv_heads", "group"),
    *("head_dim", "window", "base", "window_size", "merges", "absorbs"),
    *("clears_last", "granted_sequence", "granted_most", "count_sequence", "cells_per_block", "cache_type"),
    *("threads", "code", "code_group", "slot_bytes", "near_cells", "near_per_cell"),
)
# Name and kind, in order: an address, a whole number, or a real one.
FIELDS = [
    *((name, "address") for name in (*GIVEN, *SPANS, *HELD, *ADDRESSES)),
    *((f"{name}_{part}", "number") for name in (*GIVEN, *HELD) for part in ("sequence", "head")),
    *((f"{name}_type", "number") for name in GIVEN),
    *((name, "number") for name in NUMBERS),
    ("scale", "real"),
]
_C_TYPES = {"address": "char*", "number": "int64_t", "real": "double"}

_NUMBERS = r"""
namespace {

// Numbers of a head at most.
constexpr int64_t MOST = 256;
// Slots that a thread takes at a time, and of these in one go.
constexpr int64_t SHARE = 512, BLOCK = 64;
// Products that are worth a second thread.
constexpr int64_t MUCH = 1 << 18;
// Below every score.
constexpr float LOWEST = -1e30f;
constexpr float LEAST_MASS = 7.888609052210118e-31f;  // 2**-100

enum Type { FLOAT, BFLOAT16, INT32, INT64 };
struct bfloat16 { uint16_t bits; };

inline float wide(float x) { return x; }
inline float wide(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, of two the even one; a NaN stays one.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline int64_t whole(const char* x, int64_t type, int64_t at) {
  return type == INT64 ? reinterpret_cast<const int64_t*>(x)[at] : reinterpret_cast<const int32_t*>(x)[at];
}

inline void read(const char* x, int64_t type, int64_t at, int64_t n, float* to) {
  if (type == BFLOAT16) {
    const auto* from = reinterpret_cast<const bfloat16*>(x) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = wide(from[i]);
  } else {
    std::memcpy(to, reinterpret_cast<const float*>(x) + at, n * sizeof(float));
  }
}

// As wide as this machine's registers: wider ones would live in memory.
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX2__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
typedef float lanes __attribute__((vector_size(VECTOR)));
typedef int32_t whole_lanes __attribute__((vector_size(VECTOR)));
typedef uint16_t half_lanes __attribute__((vector_size(VECTOR / 2)));
constexpr int64_t LANES = VECTOR / 4;
// Sums of 4 queries that are kept in registers at once, of which there are 32 or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 4;
#else
constexpr int SUMS = 2;
#endif

inline lanes load(const float* x) {
  lanes y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
inline lanes load(const bfloat16* x) {
  half_lanes bits;
  std::memcpy(&bits, x, sizeof bits);
  const whole_lanes wider = __builtin_convertvector(bits, whole_lanes) << 16;
  return (lanes)wider;
}
inline void store(lanes x, float* to) { std::memcpy(to, &x, sizeof x); }

template <typename Vector, typename Result>
inline Result halved(Vector x) {
  Result parts[2];
  std::memcpy(parts, &x, sizeof x);
  return parts[0] + parts[1];
}
typedef float sixteen __attribute__((vector_size(64)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
inline float sum_of(four x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline float sum_of(eight x) { return sum_of(halved<eight, four>(x)); }
inline float sum_of(sixteen x) { return sum_of(halved<sixteen, eight>(x)); }

// 2**x for x <= 0, within 2e-7; 2**-126 is the least.
inline lanes power(lanes x) {
  x = x < -126.0f ? lanes{} - 126.0f : x;
  const whole_lanes n = __builtin_convertvector(x - 0.5f, whole_lanes);
  const lanes f = x - __builtin_convertvector(n, lanes);  // in [-1/2, 1/2]
  lanes p = lanes{} + 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return p * (lanes)((n + 127) << 23);
}
inline float power(float x) { return power(lanes{} + x)[0]; }

// x [d] turned by the angles of cos and sin [d].
inline void turn(float* x, const float* cos, const float* sin, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    x[i] = low * cos[i] - high * sin[i];
    x[half + i] = high * cos[i] + low * sin[i];
  }
}

inline void turn_back(float* x, const float* cos, const float* sin, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    // cos and sin may have been rounded.
    const float norm = cos[i] * cos[i] + sin[i] * sin[i], low = x[i], high = x[half + i];
    x[i] = (low * cos[i] + high * sin[i]) / norm;
    x[half + i] = (high * cos[i] - low * sin[i]) / norm;
  }
}

"""

_STEP = r"""
struct Row {
  int64_t sequence, head, at;  // at: where the sequence's state lies
  int32_t* table;
};

Row row_of(const Step& s, int64_t row) {
  Row r{row / s.kv_heads, row % s.kv_heads, 0, nullptr};
  r.at = s.place ? whole(s.place, s.place_type, r.sequence) : r.sequence;
  r.table = reinterpret_cast<int32_t*>(s.table) + r.at * s.table_sequence + r.head * s.table_head;
  return r;
}

inline float* held(char* x, int64_t sequence, int64_t head, const Row& r) {
  return reinterpret_cast<float*>(x) + r.at * sequence + r.head * head;
}

// A page of a row, as bytes; null where there is none.
template <typename T>
char* page_at(const Step& s, const Row& r, int64_t page) {
  if (page < 0 || page >= s.pages) return nullptr;
  const int64_t cell = r.table[page], slot = s.code ? s.slot_bytes : 2 * s.head_dim * int64_t(sizeof(T));
  return cell < 0 || cell >= s.cells ? nullptr : s.slots + cell * s.page * slot;
}

// Slots of the ring and reserved ones that follow one another in memory.
inline int64_t near_run(const Step& s) { return !s.code ? s.page : s.near ? INT64_MAX : s.near_per_cell; }

// One of them, null where there is none. Where pages hold codes they lie beside them, or fill a row's first pages as they are.
template <typename T>
T* near_at(const Step& s, const Row& r, int64_t place) {
  const int64_t size = 2 * s.head_dim;
  if (s.near) return reinterpret_cast<T*>(s.near) + r.at * s.near_sequence + r.head * s.near_head + place * size;
  const int64_t run = near_run(s);
  T* page = place < 0 ? nullptr : reinterpret_cast<T*>(page_at<T>(s, r, place / run));
  return page ? page + place % run * size : nullptr;
}

// A kept slot, by its number: codes, or a key and a value.
template <typename T>
char* kept_slot(const Step& s, const Row& r, int64_t number) {
  if (!s.code) return reinterpret_cast<char*>(near_at<T>(s, r, s.base + number));
  char* page = number < 0 ? nullptr : page_at<T>(s, r, s.near_cells + number / s.page);
  return page ? page + number % s.page * s.slot_bytes : nullptr;
}

// Kept slots that a row can have, beside the ring and the reserved ones where these have pages of their own.
inline int64_t most_kept(const Step& s) { return std::max<int64_t>(s.pages - s.near_cells, 0) * s.page; }

// Slots that its list can have.
inline int64_t most_of_list(const Step& s) { return (s.code ? s.base : 0) + most_kept(s); }

// Pages of a list of so many slots.
inline int64_t pages_of(const Step& s, int64_t length) {
  const int64_t beside = s.code && length > 0 ? s.near_cells : 0;
  const int64_t slots = s.code ? std::max<int64_t>(length - s.base, 0) : length;
  return beside + (slots + s.page - 1) / s.page;
}

template <typename T>
void write(const Step& s, T* to, const float* key, const float* value) {
  if (!to) return;
  const int64_t d = s.head_dim;
  for (int64_t i = 0; i < d; ++i) narrow(key[i], to + i);
  for (int64_t i = 0; i < d; ++i) narrow(value[i], to + d + i);
}

template <typename T>
void write_kept(const Step& s, char* to, const float* key, const float* value) {
  if (!s.code) write<T>(s, reinterpret_cast<T*>(to), key, value);
  else if (to) encode(s, key, value, reinterpret_cast<uint8_t*>(to));
}

template <typename T>
void fetch(const Step& s, const T* from, float* both) {
  for (int64_t i = 0; i < 2 * s.head_dim; ++i) both[i] = wide(from[i]);
}

// The row's list becomes ``length`` long.
void open_pages(const Step& s, const Row& r, int64_t before, int64_t length) {
  for (int64_t page = pages_of(s, before); page < pages_of(s, length); ++page) {
    int64_t place = r.at;
    if (s.granted_place) place = reinterpret_cast<const int32_t*>(s.granted_place)[r.at];
    const int64_t count = place * s.count_sequence;
    auto* cursor = reinterpret_cast<int32_t*>(s.cursor) + count;
    const int64_t granted = reinterpret_cast<const int32_t*>(s.granted_count)[count];
    const int64_t limit = page < s.pages ? std::min(granted, s.granted_most) * s.cells_per_block : 0;
    const int64_t number = __atomic_fetch_add(cursor, 1, __ATOMIC_RELAXED);
    int64_t cell = -1;
    if (number >= 0 && number < limit) {
      const auto* list = reinterpret_cast<const int32_t*>(s.granted) + place * s.granted_sequence;
      cell = int64_t(list[number / s.cells_per_block]) * s.cells_per_block + number % s.cells_per_block;
    } else {
      // Taken back. The cursor never was below the limit since, so nobody else was refused by it.
      __atomic_fetch_sub(cursor, 1, __ATOMIC_RELAXED);
      __atomic_store_n(reinterpret_cast<int32_t*>(s.overflow) + count, 1, __ATOMIC_RELAXED);
    }
    if (page < s.pages) r.table[page] = int32_t(cell);
  }
}

// Slots kept of a row whose sequence had ``before`` tokens. What another one has left in memory is not read, and no count
// leaves the table.
int64_t count_of(const Step& s, const Row& r, int64_t before) {
  if (before <= 0) return 0;
  const int64_t count = whole(s.kept, s.kept_type, r.at * s.kept_sequence + r.head * s.kept_head);
  return std::min(std::max<int64_t>(count, 0), most_kept(s));
}

// The mean of the open slot's last window_size tokens, one of which is new.
template <typename T>
void mean_of_recent(const Step& s, const Row& r, int64_t left, bool appends, float weight, const float* entering,
                    float* mean) {
  const int64_t d = s.head_dim, size = s.window_size, place = left % size;
  float* omega = held(s.recent, s.recent_sequence, s.recent_head, r);
  if (appends) std::fill_n(omega, size, 0.0f);
  omega[place] = weight;
  write<T>(s, near_at<T>(s, r, s.window + place), entering, entering + d);
  float total = 0, both[2 * MOST];
  std::fill_n(mean, 2 * d, 0.0f);
  for (int64_t i = 0; i < size; ++i) {
    const T* slot = near_at<T>(s, r, s.window + i);
    // What has no weight may never have been written.
    if (omega[i] == 0 || !slot) continue;
    fetch<T>(s, slot, both);
    for (int64_t c = 0; c < 2 * d; ++c) mean[c] += omega[i] * both[c];
    total += omega[i];
  }
  for (int64_t c = 0; c < 2 * d; ++c) mean[c] /= std::max(total, LEAST_MASS);
}

// What has become of one token.
struct Taken {
  int64_t count, length;             // slots kept of the row; of its list
  bool leaves = false, appends = false;
  // With ``leaves``: what the new token's query sees beside the ring and the slots that are full: the open slot (merge) or the
  // residual one (absorb, if its mass is not 0).
  float seen[2 * MOST], mass = 1;
};

// One token of one row takes effect, as in triton_kernels.py: advance. number: its own among all new tokens; tokens: its
// sequence's, with it.
template <typename T>
void advance(const Step& s, const Row& r, int64_t number, int64_t tokens, Taken& taken) {
  const int64_t d = s.head_dim, before = tokens - 1;
  const auto at = [&](int64_t sequence, int64_t head) { return number * sequence + r.head * head; };

  // The decision that takes effect: of the token that leaves the ring, or of the new one where there is no ring.
  const bool merged = s.alpha[at(s.alpha_sequence, s.alpha_head)] && before > 0;
  float weight;
  read(s.omega, s.omega_type, at(s.omega_sequence, s.omega_head), 1, &weight);
  bool leaves = true, appends = !merged;
  const int64_t ring = s.window ? before % s.window : 0;
  if (s.window) {
    float* decision = held(s.decisions, s.decisions_sequence, s.decisions_head, r) + ring;
    const float waited = *decision;
    *decision = merged ? weight : -weight;
    leaves = before >= s.window;
    appends = leaves && std::signbit(waited);
    weight = std::abs(waited);
  }

  const int64_t count = count_of(s, r, before), count_after = count + appends;
  const int64_t length = count_after > 0 ? s.base + count_after : std::min(tokens, s.window);
  if (s.cursor) open_pages(s, r, count > 0 ? s.base + count : std::min(before, s.window), length);
  const int64_t kept_at = r.at * s.kept_sequence + r.head * s.kept_head;
  if (s.kept_type == INT64) reinterpret_cast<int64_t*>(s.kept)[kept_at] = count_after;
  else reinterpret_cast<int32_t*>(s.kept)[kept_at] = int32_t(count_after);
  taken.count = count_after;
  taken.length = std::min(length, most_of_list(s));
  taken.leaves = leaves;
  taken.appends = appends;

  float both[2 * MOST], entering[2 * MOST], cos[MOST], sin[MOST];
  read(s.key, s.key_type, at(s.key_sequence, s.key_head), d, both);
  read(s.value, s.value_type, at(s.value_sequence, s.value_head), d, both + d);
  T* ring_slot = s.window ? near_at<T>(s, r, ring) : nullptr;
  if (!s.window) std::copy_n(both, 2 * d, entering);
  else if (leaves && ring_slot) fetch<T>(s, ring_slot, entering);
  else std::fill_n(entering, 2 * d, 0.0f);

  if (leaves && s.merges) {
    read(s.leaving_cos, s.leaving_cos_type, number * s.leaving_cos_sequence, d, cos);
    read(s.leaving_sin, s.leaving_sin_type, number * s.leaving_sin_sequence, d, sin);
    if (s.window) turn_back(entering, cos, sin, d);  // tokens are merged before rotary embedding
    float* mean = taken.seen;
    if (s.window_size) {
      mean_of_recent<T>(s, r, before - s.window, appends, weight, entering, mean);
    } else {
      float* sums = held(s.sums, s.sums_sequence, s.sums_head, r);
      if (appends) std::fill_n(sums, 2 * d + 1, 0.0f);
      for (int64_t i = 0; i < 2 * d; ++i) sums[i] += entering[i] * weight;
      sums[2 * d] += weight;
      for (int64_t i = 0; i < 2 * d; ++i) mean[i] = sums[i] / sums[2 * d];
    }
    // The slot as attention sees it, rotated at its last token's position; written again at every token.
    turn(mean, cos, sin, d);
    if (s.clears_last) mean[d - 1] = 0;
    write_kept<T>(s, kept_slot<T>(s, r, count_after - 1), mean, mean + d);
  } else if (leaves) {
    if (appends) write_kept<T>(s, kept_slot<T>(s, r, count_after - 1), entering, entering + d);
    if (s.absorbs) {
      float* sums = held(s.sums, s.sums_sequence, s.sums_head, r);
      if (count == 0) std::fill_n(sums, 2 * d + 1, 0.0f);
      if (!appends) {
        for (int64_t i = 0; i < 2 * d; ++i) sums[i] += entering[i] * weight;
        sums[2 * d] += weight;
      }
      taken.mass = sums[2 * d];
      for (int64_t i = 0; i < 2 * d; ++i) taken.seen[i] = sums[i] / std::max(taken.mass, LEAST_MASS);
      write<T>(s, near_at<T>(s, r, s.window), taken.seen, taken.seen + d);
    }
  }
  if (s.window) {
    read(s.cos, s.cos_type, number * s.cos_sequence, d, cos);
    read(s.sin, s.sin_type, number * s.sin_sequence, d, sin);
    turn(both, cos, sin, d);
    write<T>(s, ring_slot, both, both + d);
  }
}

// A sequence's only new token, of one row; the length of the row's list.
template <typename T>
int64_t advance_one(const Step& s, int64_t row) {
  const int64_t sequence = row / s.kv_heads, tokens = whole(s.tokens, s.tokens_type, sequence);
  if (tokens <= 0) return 0;  // no sequence at all
  Taken taken;
  advance<T>(s, row_of(s, row), sequence, tokens, taken);
  return taken.length;
}

// A part of a row's list, and what its queries take from it: sums of values, each with its highest score and total weight.
struct Task {
  int64_t row, first, last;
  float *parts, *highest, *total;
};

// q . k for slots' keys; D: head_dim where the compiler is to know it, 0: it is not.
template <typename T, int D>
void scores_of(const float* q, const T* const* slots, int64_t n, int64_t d, float* scores) {
  if constexpr (D > 0) {
    constexpr int V = D / LANES;
    lanes query[V];
    for (int v = 0; v < V; ++v) query[v] = load(q + v * LANES);
    for (int64_t j = 0; j < n; ++j) {
      lanes sum = query[0] * load(slots[j]);
      for (int v = 1; v < V; ++v) sum += query[v] * load(slots[j] + v * LANES);
      scores[j] += sum_of(sum);
    }
  } else {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < d; ++i) scores[j] += q[i] * wide(slots[j][i]);
  }
}

// part [d] = part * shrinks + sum of weights times slots' values.
template <typename T, int D>
void add_values(const float* weights, const T* const* slots, int64_t n, int64_t d, float shrinks, float* part) {
  if constexpr (D > 0) {
    constexpr int V = D / LANES < 8 ? D / LANES : 8;
    for (int64_t first = 0; first < D; first += V * LANES) {
      lanes sum[V];
      for (int v = 0; v < V; ++v) sum[v] = load(part + first + v * LANES) * shrinks;
      for (int64_t j = 0; j < n; ++j)
        for (int v = 0; v < V; ++v) sum[v] += weights[j] * load(slots[j] + d + first + v * LANES);
      for (int v = 0; v < V; ++v) store(sum[v], part + first + v * LANES);
    }
  } else {
    for (int64_t i = 0; i < d; ++i) part[i] *= shrinks;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < d; ++i) part[i] += weights[j] * wide(slots[j][d + i]);
  }
}

// Slots that are looked at in one go: their addresses, and what is added to the scores of each.
template <typename T>
struct Block {
  const T* slots[BLOCK];
  float biases[BLOCK];
  int64_t count = 0;
};

template <typename T, int D>
void take(const Block<T>& block, const Task& task, const float* queries, int64_t group, int64_t d) {
  const int64_t n = block.count;
  for (int64_t g = 0; g < group; ++g) {
    float scores[BLOCK];
    std::copy_n(block.biases, BLOCK, scores);
    scores_of<T, D>(queries + g * MOST, block.slots, n, d, scores);
    float highest = task.highest[g];
    for (int64_t j = 0; j < n; ++j) highest = std::max(highest, scores[j]);
    lanes total{};
    for (int64_t j = 0; j < BLOCK; j += LANES) {
      const lanes weights = power(load(scores + j) - highest);
      store(weights, scores + j);
      total += weights;
    }
    const float shrinks = power(task.highest[g] - highest);
    task.total[g] = task.total[g] * shrinks + sum_of(total);
    task.highest[g] = highest;
    add_values<T, D>(scores, block.slots, n, d, shrinks, task.parts + g * d);
  }
}

// A token's queries of one KV head: rotated, and scaled so that scores are in powers of two.
void read_queries(const Step& s, const Row& r, int64_t number, float* to, int64_t stride) {
  const int64_t d = s.head_dim;
  float cos[MOST], sin[MOST];
  read(s.cos, s.cos_type, number * s.cos_sequence, d, cos);
  read(s.sin, s.sin_type, number * s.sin_sequence, d, sin);
  for (int64_t g = 0; g < s.group; ++g, to += stride) {
    const int64_t head = r.head * s.group + g;
    read(s.query, s.query_type, number * s.query_sequence + head * s.query_head, d, to);
    turn(to, cos, sin, d);
    if (s.clears_last) to[d - 1] = 0;
    for (int64_t i = 0; i < d; ++i) to[i] *= float(s.scale);
  }
}

template <typename T, int D>
void attend(const Step& s, const Task& task) {
  const int64_t d = D ? D : s.head_dim, group = s.group;
  const Row r = row_of(s, task.row);
  thread_local std::vector<float> queries, turned, given_back;
  queries.resize(group * MOST);
  read_queries(s, r, r.sequence, queries.data(), MOST);
  std::fill_n(task.parts, group * d, 0.0f);
  std::fill_n(task.highest, group, LOWEST);
  std::fill_n(task.total, group, 0.0f);
  // Of the reserved places only the residual slot is seen, if it holds something.
  float bias = 0;
  int64_t residual = -1;
  if (s.absorbs) {
    const float mass = held(s.sums, s.sums_sequence, s.sums_head, r)[2 * d];
    if (mass > 0) residual = s.window, bias = std::log2(std::max(mass, LEAST_MASS));
  }
  Block<T> block;
  const auto flush = [&] {
    // What is no slot has a weight that adds nothing.
    std::fill(block.biases + block.count, block.biases + BLOCK, LOWEST);
    take<T, D>(block, task, queries.data(), group, d);
    block.count = 0;
  };
  const auto see = [&](int64_t first, int64_t last, float added) {
    const int64_t run = near_run(s);
    while (first < last) {
      const int64_t stop = std::min(last, (first / run + 1) * run);
      const T* slot = near_at<T>(s, r, first);
      if (!slot) { first = stop; continue; }
      for (; first < stop; ++first, slot += 2 * d) {
        block.biases[block.count] = added;
        block.slots[block.count] = slot;
        if (++block.count == BLOCK) flush();
      }
    }
  };
  see(task.first, std::min(task.last, s.window), 0);
  if (residual >= task.first && residual < task.last) see(residual, residual + 1, bias);
  if (!s.code) see(std::max(task.first, s.base), task.last, 0);
  if (block.count) flush();
  if (!s.code || task.last <= s.base) return;
  turned = queries;
  for (int64_t g = 0; g < group && s.code != FP8; ++g) turn_blocks(turned.data() + g * MOST, d);
  given_back.resize(BLOCK * 2 * d);
  Block<float> coded;
  const auto see_coded = [&] {
    std::fill_n(coded.biases, coded.count, 0.0f);
    std::fill(coded.biases + coded.count, coded.biases + BLOCK, LOWEST);
    take<float, D>(coded, task, turned.data(), group, d);
    coded.count = 0;
  };
  for (int64_t number = std::max(task.first, s.base) - s.base; number < task.last - s.base; ++number) {
    const char* codes = kept_slot<T>(s, r, number);
    if (!codes) continue;
    float* slot = given_back.data() + coded.count * 2 * d;
    decode(s, reinterpret_cast<const uint8_t*>(codes), slot);
    coded.slots[coded.count] = slot;
    if (++coded.count == BLOCK) see_coded();
  }
  if (coded.count) see_coded();
}

// The parts of one row together, into its outputs.
template <typename T>
void join(const Step& s, int64_t row, const Task* tasks, int64_t count) {
  const int64_t d = s.head_dim;
  T* out = reinterpret_cast<T*>(s.out) + row * s.group * d;
  for (int64_t g = 0; g < s.group; ++g, out += d) {
    float highest = LOWEST, total = 0, sum[MOST];
    for (int64_t t = 0; t < count; ++t) highest = std::max(highest, tasks[t].highest[g]);
    std::fill_n(sum, d, 0.0f);
    for (int64_t t = 0; t < count; ++t) {
      const float shrinks = power(tasks[t].highest[g] - highest);
      total += tasks[t].total[g] * shrinks;
      for (int64_t i = 0; i < d; ++i) sum[i] += tasks[t].parts[g * d + i] * shrinks;
    }
    for (int64_t i = 0; i < d; ++i) narrow(total == 0 ? 0.0f : sum[i] / total, out + i);
  }
}

template <typename T>
void step(const Step& s) {
  const int64_t rows = s.batch * s.kv_heads, size = s.group * (s.head_dim + 2);
  std::vector<int64_t> length(rows), start(rows + 1, 0);
  // Threads that wait for one another on a busy machine cost more than little work does.
#pragma omp parallel for schedule(static) num_threads(int(s.threads)) if (rows >= 32)
  for (int64_t row = 0; row < rows; ++row) length[row] = advance_one<T>(s, row);
  std::vector<Task> tasks;
  int64_t slots = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t first = 0; first < length[row]; first += SHARE)
      tasks.push_back({row, first, std::min(first + SHARE, length[row]), nullptr, nullptr, nullptr});
    start[row + 1] = int64_t(tasks.size());
    slots += length[row];
  }
  std::vector<float> parts(tasks.size() * size);
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(s.threads)) if (slots * size >= MUCH)
  for (size_t t = 0; t < tasks.size(); ++t) {
    Task& task = tasks[t];
    task.parts = parts.data() + t * size;
    task.highest = task.parts + s.group * s.head_dim;
    task.total = task.highest + s.group;
    if (s.head_dim == 64) attend<T, 64>(s, task);
    else if (s.head_dim == 128) attend<T, 128>(s, task);
    else attend<T, 0>(s, task);
  }
  for (int64_t row = 0; row < rows; ++row) join<T>(s, row, tasks.data() + start[row], start[row + 1] - start[row]);
}
"""

_ENTRIES = r"""
}  // namespace

extern "C" int64_t megatron_dmc_step_size() { return sizeof(Step); }

// One new token of each sequence.
extern "C" void megatron_dmc_step(const Step* s) {
  if (s->cache_type == BFLOAT16) step<bfloat16>(*s);
  else step<float>(*s);
}

// As many as ``counts`` says.
extern "C" void megatron_dmc_take_in(const Step* s) {
  if (s->cache_type == BFLOAT16) take_in<bfloat16>(*s);
  else take_in<float>(*s);
}

extern "C" void megatron_dmc_kept_after(const Step* s, int64_t* kept) {
  for (int64_t row = 0; row < s->batch * s->kv_heads; ++row) kept[row] = kept_after(*s, row);
}
"""

SOURCE = "\n".join(
    [
        *(
            f"#include <{name}>"
            for name in ("algorithm", "cmath", "cstdint", "cstring", "type_traits", "utility", "vector")
        ),
        "struct Step {",
        *(f"  {_C_TYPES[kind]} {name};" for name, kind in FIELDS),
        "};",
        _NUMBERS,
        CODES,
        _STEP,
        CHUNK,
        _ENTRIES,
    ]
)
