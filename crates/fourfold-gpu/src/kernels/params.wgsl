// What a kernel over a weight is told: where the weight's sections begin, in words, and the shapes of x and y.
struct Params {
    first: u32,
    rows: u32,
    cols: u32,
    words: u32,
    scales: u32,
    scale_floats: u32,
    scale_span: u32,
    offsets: u32,
    offset_floats: u32,
    offset_span: u32,
    extra: u32,
    columns: u32,
    tokens: u32,
    x_stride: u32,
    x_first: u32,
    y_stride: u32,
    y_first: u32,
    flags: u32,
    weight_first: u32,
    heads: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> weight: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;

const BIAS: u32 = 1u;
const ADD: u32 = 2u;

// Eight neighbours of a row of the weight.
struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

fn float_at(base: u32, i: u32, dtype: u32) -> f32 {
    if (dtype == 0u) {
        return bitcast<f32>(weight[base + i]);
    }
    let word = weight[base + (i >> 1u)];
    if (dtype == 1u) {
        let pair = unpack2x16float(word);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
}

fn byte_at(base: u32, i: u32) -> u32 {
    return (weight[base + (i >> 2u)] >> (8u * (i & 3u))) & 0xffu;
}

fn signed_byte_at(base: u32, i: u32) -> f32 {
    return f32(bitcast<i32>(byte_at(base, i) << 24u) >> 24u);
}

// Writes output `row` of token `t`.
fn store(t: u32, row: u32, value: f32) {
    let at = t * p.y_stride + p.y_first + row;
    var sum = value;
    if ((p.flags & BIAS) != 0u) {
        sum += bias[p.weight_first + row];
    }
    if ((p.flags & ADD) != 0u) {
        sum += y[at];
    }
    y[at] = sum;
}
