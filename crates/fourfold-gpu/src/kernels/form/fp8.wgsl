// E4M3 codes, a byte each, row after row; a scale for each block of BLOCK_ROWS rows and BLOCK_COLS columns, row of blocks after row of
// blocks. `columns` rows of the first block stand before this part.
override BLOCK_ROWS: u32 = 128u;
override BLOCK_COLS: u32 = 128u;
override SCALE_TYPE: u32 = 0u;

// A normal code's fields moved to where an f32 has them, the exponent's bias changed from 7 to 127; eighths of 2^-6 below. A device may
// take small numbers for zero, so none is made on the way.
fn value_of(code: u32) -> f32 {
    let normal = bitcast<f32>(((code & 0x7fu) << 20u) + (120u << 23u));
    let magnitude = select(normal, f32(code & 7u) * 0.001953125, (code & 0x78u) == 0u);
    return select(magnitude, -magnitude, (code & 0x80u) != 0u);
}

fn scale_of(r: u32, c: u32) -> f32 {
    let across = (p.cols + BLOCK_COLS - 1u) / BLOCK_COLS;
    let down = (r + p.columns) / BLOCK_ROWS;
    return float_at(p.scales, down * across + min(c, p.cols - 1u) / BLOCK_COLS, SCALE_TYPE);
}

fn weights8(r: u32, c: u32) -> Eight {
    let i = r * p.cols + c;
    let shift = (i & 3u) * 8u;
    let at = i >> 2u;
    var low = weight[at];
    var high = weight[at + 1u];
    if (shift != 0u) {
        low = (low >> shift) | (high << (32u - shift));
        high = (high >> shift) | (weight[at + 2u] << (32u - shift));
    }
    let a = vec4<f32>(
        value_of(low & 0xffu), value_of((low >> 8u) & 0xffu), value_of((low >> 16u) & 0xffu), value_of(low >> 24u),
    );
    let b = vec4<f32>(
        value_of(high & 0xffu), value_of((high >> 8u) & 0xffu), value_of((high >> 16u) & 0xffu), value_of(high >> 24u),
    );
    if (c / BLOCK_COLS == (c + 7u) / BLOCK_COLS) {
        let scale = scale_of(r, c);
        return Eight(a * scale, b * scale);
    }
    return Eight(
        a * vec4<f32>(scale_of(r, c), scale_of(r, c + 1u), scale_of(r, c + 2u), scale_of(r, c + 3u)),
        b * vec4<f32>(scale_of(r, c + 4u), scale_of(r, c + 5u), scale_of(r, c + 6u), scale_of(r, c + 7u)),
    );
}
