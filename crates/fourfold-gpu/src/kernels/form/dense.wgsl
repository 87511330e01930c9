// One float an element, row after row.
override DTYPE: u32 = 0u;

fn weights8(r: u32, c: u32) -> Eight {
    let i = r * p.cols + c;
    if (DTYPE == 0u) {
        return Eight(
            bitcast<vec4<f32>>(vec4<u32>(weight[i], weight[i + 1u], weight[i + 2u], weight[i + 3u])),
            bitcast<vec4<f32>>(vec4<u32>(weight[i + 4u], weight[i + 5u], weight[i + 6u], weight[i + 7u])),
        );
    }
    if ((i & 1u) == 0u) {
        let at = i >> 1u;
        let words = vec4<u32>(weight[at], weight[at + 1u], weight[at + 2u], weight[at + 3u]);
        if (DTYPE == 1u) {
            return Eight(
                vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y)),
                vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w)),
            );
        }
        let low = bitcast<vec4<f32>>(words << vec4<u32>(16u));
        let high = bitcast<vec4<f32>>(words & vec4<u32>(0xffff0000u));
        return Eight(vec4<f32>(low.x, high.x, low.y, high.y), vec4<f32>(low.z, high.z, low.w, high.w));
    }
    return Eight(
        vec4<f32>(
            float_at(0u, i, DTYPE), float_at(0u, i + 1u, DTYPE), float_at(0u, i + 2u, DTYPE), float_at(0u, i + 3u, DTYPE),
        ),
        vec4<f32>(
            float_at(0u, i + 4u, DTYPE), float_at(0u, i + 5u, DTYPE), float_at(0u, i + 6u, DTYPE), float_at(0u, i + 7u, DTYPE),
        ),
    );
}
