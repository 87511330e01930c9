// A bit an element, and the values that are kept, row after row; how many values stand before each 256 columns of a row.
// 0 to 2: floats of that type; 3: codes of BITS bits with a scale for each GROUP columns.
override VALUES: u32 = 0u;
override BITS: u32 = 4u;
override GROUP: u32 = 64u;
override SCALE_TYPE: u32 = 0u;

// Value i, which stands at `extra`, after the `columns` bits (of codes) or values (of floats) of the row's predecessors.
fn value_at(i: u32, r: u32, c: u32) -> f32 {
    if (VALUES < 3u) {
        return float_at(p.extra, i + p.columns, VALUES);
    }
    let bit = i * BITS + p.columns;
    let at = p.extra + (bit >> 5u);
    let shift = bit & 31u;
    var code = weight[at] >> shift;
    if (shift + BITS > 32u) {
        code |= weight[at + 1u] << (32u - shift);
    }
    code &= (1u << BITS) - 1u;
    let count = (p.cols + GROUP - 1u) / GROUP;
    let scale = float_at(p.scales, r * count + c / GROUP, SCALE_TYPE);
    return scale * (f32(code) - f32(1u << (BITS - 1u)));
}

fn weights8(r: u32, c: u32) -> Eight {
    let word = r * p.words + (c >> 5u);
    let mask = weight[word];
    let shift = c & 31u;
    var kept = (mask >> shift) & 0xffu;
    var i = weight[p.offsets + r * p.offset_span + (c >> 8u)];
    for (var before = r * p.words + ((c >> 8u) << 3u); before < word; before += 1u) {
        i += countOneBits(weight[before]);
    }
    i += countOneBits(mask & ((1u << shift) - 1u));
    var values = array<f32, 8>(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
    for (var k = 0u; k < 8u; k += 1u) {
        if ((kept & 1u) == 1u) {
            values[k] = value_at(i, r, c + k);
            i += 1u;
        }
        kept >>= 1u;
    }
    return Eight(
        vec4<f32>(values[0], values[1], values[2], values[3]),
        vec4<f32>(values[4], values[5], values[6], values[7]),
    );
}
