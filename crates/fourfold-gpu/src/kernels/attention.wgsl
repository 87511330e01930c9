// Causal softmax attention over a cache, a workgroup for each query and head: 64 positions at a time, whose scores the 64 threads
// compute, one each, and whose values they then add, each for its columns (online softmax, Milakov & Gimelshein 2018).
struct Params {
    heads: u32,
    kv_heads: u32,
    key_dim: u32,
    value_dim: u32,
    scale: f32,
    first_position: u32,
    window: u32,
    key_words: u32,
    value_words: u32,
    // Columns of a key or value head, in its cache's rows.
    value_stride: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> keys: array<u32>;
@group(0) @binding(2) var<storage, read> values: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

// 0: f32; 1: f16; 2: bf16.
override DTYPE: u32 = 1u;

var<workgroup> query: array<f32, 1024>;
var<workgroup> shared_scores: array<f32, 64>;

fn widened(word: u32, high: bool) -> f32 {
    if (DTYPE == 1u) {
        let pair = unpack2x16float(word);
        return select(pair.x, pair.y, high);
    }
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, high));
}

fn key_at(row: u32, c: u32) -> f32 {
    if (DTYPE == 0u) {
        return bitcast<f32>(keys[row + c]);
    }
    return widened(keys[row + (c >> 1u)], (c & 1u) == 1u);
}

fn value_at(row: u32, c: u32) -> f32 {
    if (DTYPE == 0u) {
        return bitcast<f32>(values[row + c]);
    }
    return widened(values[row + (c >> 1u)], (c & 1u) == 1u);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let head = group.x;
    let t = group.y;
    let kv_head = head * p.kv_heads / p.heads;
    let base = (t * p.heads + head) * p.key_dim;
    for (var c = thread; c < p.key_dim; c += 64u) {
        query[c] = q[base + c];
    }
    workgroupBarrier();
    let last = p.first_position + t;
    var first = 0u;
    if (p.window > 0u && last + 1u > p.window) {
        first = last + 1u - p.window;
    }
    var highest = -3.0e38;
    var total = 0.0;
    var sums: array<f32, 16>;
    for (var j = 0u; j < 16u; j += 1u) {
        sums[j] = 0.0;
    }
    for (var start = first; start <= last; start += 64u) {
        let position = start + thread;
        var score = -3.0e38;
        if (position <= last) {
            let row = position * p.key_words;
            let begin = kv_head * p.key_dim;
            var sum = 0.0;
            if (DTYPE != 0u && (p.key_dim & 1u) == 0u) {
                for (var c = 0u; c < p.key_dim; c += 2u) {
                    let word = keys[row + ((begin + c) >> 1u)];
                    sum += query[c] * widened(word, false) + query[c + 1u] * widened(word, true);
                }
            } else {
                for (var c = 0u; c < p.key_dim; c += 1u) {
                    sum += query[c] * key_at(row, begin + c);
                }
            }
            score = sum * p.scale;
        }
        shared_scores[thread] = score;
        workgroupBarrier();
        let count = min(64u, last - start + 1u);
        var best = highest;
        for (var i = 0u; i < count; i += 1u) {
            best = max(best, shared_scores[i]);
        }
        workgroupBarrier();
        shared_scores[thread] = exp(score - best);
        workgroupBarrier();
        let shrink = exp(highest - best);
        highest = best;
        var sum = 0.0;
        for (var i = 0u; i < count; i += 1u) {
            sum += shared_scores[i];
        }
        total = total * shrink + sum;
        for (var j = 0u; j * 64u < p.value_dim; j += 1u) {
            let c = j * 64u + thread;
            var mixed = sums[j] * shrink;
            if (c < p.value_dim) {
                for (var i = 0u; i < count; i += 1u) {
                    mixed += shared_scores[i] * value_at((start + i) * p.value_words, kv_head * p.value_stride + c);
                }
            }
            sums[j] = mixed;
        }
        workgroupBarrier();
    }
    for (var j = 0u; j * 64u < p.value_dim; j += 1u) {
        let c = j * 64u + thread;
        if (c < p.value_dim) {
            y[(t * p.heads + head) * p.value_dim + c] = sums[j] / total;
        }
    }
}
