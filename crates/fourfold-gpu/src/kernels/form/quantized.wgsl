// Codes of BITS bits, least significant bit first, each row beginning at a new word; scales and offsets for groups of columns.
override BITS: u32 = 4u;
override GROUP: u32 = 32u;
// 0: a float a group; 1: one float; 2: an unsigned byte a group and a float for a run of groups; 3: the same, signed.
override SCALES: u32 = 0u;
override SCALE_TYPE: u32 = 0u;
// 0: symmetric; 1: a byte a group; 2: one byte; 3: a float a group; 4: an unsigned byte a group and a float for a run of groups;
// 5: the same, signed; 6: codes are looked up.
override OFFSETS: u32 = 0u;
override OFFSET_TYPE: u32 = 0u;
// Whether eight columns that begin at a multiple of eight have one scale.
override UNIFORM: u32 = 1u;
// Whether each column names its group.
override NAMED: u32 = 0u;

fn groups() -> u32 {
    return (p.cols + GROUP - 1u) / GROUP;
}

fn double_at(base: u32, floats: u32, span: u32, r: u32, g: u32, dtype: u32, is_signed: bool) -> f32 {
    let count = groups();
    let spans = (count + span - 1u) / span;
    let i = r * count + g;
    let factor = float_at(floats, r * spans + g / span, dtype);
    if (is_signed) {
        return factor * signed_byte_at(base, i);
    }
    return factor * f32(byte_at(base, i));
}

fn scale_of(r: u32, g: u32) -> f32 {
    if (SCALES == 0u) {
        return float_at(p.scales, r * groups() + g, SCALE_TYPE);
    }
    if (SCALES == 1u) {
        return float_at(p.scales, 0u, SCALE_TYPE);
    }
    return double_at(p.scales, p.scale_floats, p.scale_span, r, g, SCALE_TYPE, SCALES == 3u);
}

// The zero point of an integer grid, or what is subtracted of a real one.
fn offset_of(r: u32, g: u32) -> f32 {
    if (OFFSETS == 0u) {
        return f32(1u << (BITS - 1u));
    }
    if (OFFSETS == 1u) {
        return f32(byte_at(p.offsets, r * groups() + g));
    }
    if (OFFSETS == 2u) {
        return f32(byte_at(p.offsets, 0u));
    }
    if (OFFSETS == 3u) {
        return float_at(p.offsets, r * groups() + g, OFFSET_TYPE);
    }
    if (OFFSETS == 6u) {
        return 0.0;
    }
    return double_at(p.offsets, p.offset_floats, p.offset_span, r, g, OFFSET_TYPE, OFFSETS == 5u);
}

fn value_of(code: u32, scale: f32, offset: f32) -> f32 {
    if (OFFSETS == 6u) {
        return scale * signed_byte_at(p.extra, code);
    }
    if (OFFSETS < 3u) {
        return scale * (f32(code) - offset);
    }
    return scale * f32(code) - offset;
}

fn group_of(c: u32) -> u32 {
    if (NAMED == 1u) {
        return weight[p.columns + min(c, p.cols - 1u)];
    }
    return min(c, p.cols - 1u) / GROUP;
}

fn pick(low: u32, high: u32, i: u32) -> u32 {
    let bit = i * BITS;
    let mask = (1u << BITS) - 1u;
    if (bit >= 32u) {
        return (high >> (bit - 32u)) & mask;
    }
    if (bit + BITS <= 32u) {
        return (low >> bit) & mask;
    }
    return ((low >> bit) | (high << (32u - bit))) & mask;
}

fn element(r: u32, c: u32, code: u32) -> f32 {
    let g = group_of(c);
    return value_of(code, scale_of(r, g), offset_of(r, g));
}

fn weights8(r: u32, c: u32) -> Eight {
    let bit = c * BITS;
    let at = r * p.words + (bit >> 5u);
    let shift = bit & 31u;
    var low = weight[at] >> shift;
    var high = 0u;
    if (shift + 8u * BITS > 32u) {
        let next = weight[at + 1u];
        high = next >> shift;
        if (shift > 0u) {
            low |= next << (32u - shift);
        }
        if (shift > 0u && shift + 8u * BITS > 64u) {
            high |= weight[at + 2u] << (32u - shift);
        }
    }
    let codes = array<u32, 8>(
        pick(low, high, 0u), pick(low, high, 1u), pick(low, high, 2u), pick(low, high, 3u),
        pick(low, high, 4u), pick(low, high, 5u), pick(low, high, 6u), pick(low, high, 7u),
    );
    if (UNIFORM == 1u) {
        let g = min(c, p.cols - 1u) / GROUP;
        let s = scale_of(r, g);
        let o = offset_of(r, g);
        return Eight(
            vec4<f32>(value_of(codes[0], s, o), value_of(codes[1], s, o), value_of(codes[2], s, o), value_of(codes[3], s, o)),
            vec4<f32>(value_of(codes[4], s, o), value_of(codes[5], s, o), value_of(codes[6], s, o), value_of(codes[7], s, o)),
        );
    }
    return Eight(
        vec4<f32>(
            element(r, c, codes[0]), element(r, c + 1u, codes[1]), element(r, c + 2u, codes[2]), element(r, c + 3u, codes[3]),
        ),
        vec4<f32>(
            element(r, c + 4u, codes[4]), element(r, c + 5u, codes[5]), element(r, c + 6u, codes[6]), element(r, c + 7u, codes[7]),
        ),
    );
}
